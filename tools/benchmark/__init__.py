"""This tool beside others, on the same models and the same machine, in one run: `python -m tools.benchmark OUT`."""
