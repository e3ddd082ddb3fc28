"""Memory given back to the system, or kept for what comes next."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of parameters of glibc."""

LARGEST_KEPT = 1 << 25
"""Bytes of a block: glibc takes no more for this."""


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps blocks under 32 MiB, which is most of a large model's weights."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another system, which has its own way
        return


def keep_freed_memory() -> None:
    """Let arrays take the place of those before them, as glibc learns to by itself.

    It does not where a threshold was set, and Dask sets one for its workers: then each array of more than 128 KB is mapped and
    unmapped by the system, which takes half as long again as the work on them.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_KEPT)
    except (OSError, AttributeError):  # another system, which has its own way
        return
