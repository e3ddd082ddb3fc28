"""Memory given back to the system."""

from __future__ import annotations

import ctypes


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps blocks under 32 MiB, which is most of a large model's weights."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another system, which has its own way
        return
