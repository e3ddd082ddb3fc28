"""Numbers as people read them: a few digits, and their unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

TIMES = "\N{MULTIPLICATION SIGN}"

PERCENT = ("top1", "top5", "agreement")
"""Metrics that are shares of the samples."""


def short(value: float) -> str:
    """Three digits and the prefix of a thousand, a million...

    Examples
    --------
    >>> short(41_238_912), short(999), short(1_000), short(999_900)
    ('41.2 M', '999', '1.00 k', '1.00 M')
    """
    for factor, prefix in PREFIXES:
        if abs(value) >= 0.9995 * factor:
            return f"{digits(value / factor)} {prefix}"
    return f"{value:.0f}"


def digits(value: float, count: int = 3) -> str:
    """`value` with `count` digits that say something, and no exponent.

    Examples
    --------
    >>> digits(41.238), digits(0.0123), digits(0), digits(1234.5)
    ('41.2', '0.0123', '0', '1234')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "no number"
    rounded = float(f"{value:.{count - 1}e}")  # 0.9999 has its digits where 1 has them
    behind = count - 1 - math.floor(math.log10(abs(rounded)))
    return f"{value:.{max(0, min(behind, 9))}f}"


def size(count: int) -> str:
    """Bytes, in units of a thousand.

    Examples
    --------
    >>> size(1_126_000), size(12)
    ('1.13 MB', '12 bytes')
    """
    return f"{short(count)}B" if count >= 1000 else f"{count} bytes"


def percent(share: float) -> str:
    """A share of one, in percent with three digits at most.

    Examples
    --------
    >>> percent(0.4981), percent(1), percent(0.0213), percent(1.5)
    ('49.8 %', '100 %', '2.13 %', '150 %')
    """
    if not math.isfinite(share):
        return "no number"
    value = 100 * share
    text = digits(value, 3 if abs(value) < 99.95 else len(f"{abs(value):.0f}"))
    return f"{text} %"


def milliseconds(value: float) -> str:
    """A time in milliseconds.

    Examples
    --------
    >>> milliseconds(3.2149)
    '3.21 ms'
    """
    return f"{digits(value)} ms"


def pair(before: float, after: float, show: Callable[[Any], str]) -> tuple[str, str]:
    """Two values as `show` writes them, with their unit once where it is the same.

    Examples
    --------
    >>> pair(16_900_000, 14_400_000, size), pair(2_000_000, 500_000, short), pair(12, 7, short)
    (('16.9', '14.4 MB'), ('2.00 M', '500 k'), ('12', '7'))
    """
    first, second = show(before), show(after)
    same = first.partition(" ")[2] == second.partition(" ")[2]
    return (first.partition(" ")[0] if same else first), second


def figure(metric: str, value: float) -> str:
    """A value of a metric: in percent where it is a share of the samples.

    Examples
    --------
    >>> figure("top1", 0.91), figure("cosine", 0.99912), figure("sqnr", 21.53)
    ('91.0 %', '0.9991', '21.53')
    """
    if not math.isfinite(value):
        return "no number"
    if metric in PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def difference(metric: str, value: float) -> str:
    """A difference of two values of a metric: in points of a percent where it is a share.

    Examples
    --------
    >>> difference("top1", 0.0125), difference("cosine", -0.5)
    ('1.25 points', '-0.5000')
    """
    if not math.isfinite(value):
        return "without bound"
    return f"{100 * value:.2f} points" if metric in PERCENT else f"{value:.4f}"
