"""The processor that sessions run on."""

from __future__ import annotations

import platform
from pathlib import Path

BLOCKS = {"avx512f": 16}
"""Channels that ONNX Runtime's blocked convolution kernels work on at a time, by processor flag; 8 otherwise."""


def block_size() -> int:
    """Channels to which ranks are aligned for the CPU of this machine."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the size that both kinds of kernel divide by
        return 16
    return next((size for flag, size in BLOCKS.items() if flag in flags), 8)


def processor() -> str:
    """What this machine calls its processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
