"""The least share of the MACs at which a way is good enough, and which shares have to be tried to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = dict[str, Any]

LOSS, AGREEMENT = 0.01, 0.99
ROUNDING = 1e-9
MISSES = 3
"""A scan from above ends after so many shares in a row that lose too much."""


def holds(result: Result) -> bool:
    """At most one point of top-1 lost, or 99 % the same answers."""
    if "failed" in result:
        return False
    return bool(result["loss"] <= LOSS + ROUNDING or result["agreement"] >= AGREEMENT - ROUNDING)


def scan(dear: bool, at: Callable[[float], Result], shares: Sequence[float], known: float) -> None:
    """Have results made at as many shares as it takes, from the highest down; by bisection where one takes minutes.

    Parameters
    ----------
    dear
        Bisect. It is taken that a way that loses too much at a share does so below it too: one that does not may be better than it
        is said to be, never worse.
    at
        The result at a share.
    shares
        To choose from, descending.
    known
        A share whose result is there already, where the bisection begins.
    """
    if dear:
        fine = holds(at(known))
        left = [share for share in shares if (share < known if fine else share > known)]
        low, high = 0, len(left)  # what stands before `low` holds, what stands from `high` on does not
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if holds(at(left[middle])) else (low, middle)
        return
    misses = 0
    for share in shares:
        misses = 0 if holds(at(share)) else misses + 1
        if misses == MISSES:
            return


def least(found: Mapping[str, Result], macs: int) -> tuple[str, Result] | None:
    """The share and result of fewest MACs that holds, of those that have fewer than the original."""
    fine = [(share, result) for share, result in found.items() if holds(result) and result["macs"] < macs]
    return min(fine, key=lambda pair: pair[1]["macs"], default=None)
