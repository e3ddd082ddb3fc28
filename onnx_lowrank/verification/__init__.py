"""Accuracy, latency and placement of two models, side by side."""
