"""Calibration and evaluation data: every accepted form becomes one streamed `Dataset`."""

from onnx_lowrank.data.dataset import Dataset
from onnx_lowrank.data.feeds import load_function
from onnx_lowrank.data.pieces import Feeds
from onnx_lowrank.data.preprocess import Preprocess, apply_preprocess, load_preprocess
from onnx_lowrank.data.source import DataSource, open_data

__all__ = [
    "DataSource",
    "Dataset",
    "Feeds",
    "Preprocess",
    "apply_preprocess",
    "load_function",
    "load_preprocess",
    "open_data",
]
