"""Geometry of charts: numbers in, places and paths out. What draws them is the template of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, BOTTOM = 46.0, 18.0, 14.0, 40.0
"""Margins around the plot, in units of the drawing: room for the ticks' labels."""

WIDTH, HEIGHT = 340.0, 216.0
"""Of a drawing: about a phone's width in pixels, so that its text is neither blown up nor shrunk there."""

TOLERANCE = 0.3
"""Units of the drawing, about pixels, that a path may be off by where it saves points."""

TICKS = 5
"""Ticks of an axis, about."""


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a side; where `logarithmic`, both are above 0."""

    label: str
    low: float
    high: float
    logarithmic: bool = False
    percent: bool = False

    def share(self, value: float) -> float:
        """Where `value` is between the ends, from 0 to 1; what lies outside is put at the end."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Round values, and what stands at them.

        Examples
        --------
        >>> [text for _, text in Axis("rank", 0, 64).ticks()]
        ['0', '20', '40', '60']
        >>> [text for _, text in Axis("share", 0, 1, percent=True).ticks()]
        ['0 %', '20 %', '40 %', '60 %', '80 %', '100 %']
        >>> [text for _, text in Axis("value", 0.01, 1, logarithmic=True).ticks()]
        ['0.01', '0.1', '1']
        """
        values = self._decades() if self.logarithmic else self._steps()
        return [(value, f"{100 * value:g} %" if self.percent else f"{value:g}") for value in values]

    def _steps(self) -> list[float]:
        span = self.high - self.low
        rough = span / TICKS if span > 0 else 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _decades(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        multiples = (1,) if math.log10(self.high / self.low) >= 1.5 else (1, 2, 5)
        values = [m * 10.0**power for power in range(first, last + 1) for m in multiples]
        return [round(v, 12) for v in values if self.low * 0.999 <= v <= self.high * 1.001]


@dataclass(frozen=True)
class Line:
    """A path; `kind` is what it belongs to, `text` what it is called."""

    kind: str
    path: str
    text: str
    dashed: bool = False


@dataclass(frozen=True)
class Rule:
    """A straight line across the plot, with a label beside it."""

    kind: str
    x1: float
    y1: float
    x2: float
    y2: float
    text: str
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True)
class Mark:
    """A point; `whisker` ends where its uncertainty does."""

    kind: str
    x: float
    y: float
    text: str
    whisker: float | None = None
    chosen: bool = False
    below: bool = False
    """Further down than the plot reaches."""


@dataclass
class Chart:
    """A drawing under construction: axes first, then what lies on them."""

    title: str
    description: str
    x: Axis
    y: Axis
    width: float = WIDTH
    height: float = HEIGHT
    lines: list[Line] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    left, top = LEFT, TOP

    @property
    def right(self) -> float:
        return self.width - RIGHT

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM

    def at_x(self, value: float) -> float:
        """Place of a value along the x axis, in units of the drawing."""
        return round(LEFT + self.x.share(value) * (self.right - LEFT), 1)

    def at_y(self, value: float) -> float:
        """Place of a value along the y axis, which grows upwards."""
        return round(self.bottom - self.y.share(value) * (self.bottom - TOP), 1)

    def line(self, kind: str, points: Sequence[tuple[float, float]], text: str, *, dashed: bool = False) -> None:
        """Join `points` by straight lines."""
        places = [f"{x:g} {y:g}" for x, y in simplified([(self.at_x(x), self.at_y(y)) for x, y in points])]
        if places:
            self.lines.append(Line(kind, "M" + "L".join(places), text, dashed))

    def across(self, kind: str, value: float, text: str) -> None:
        """A level of the y axis; its label stands above it, or below it at the top."""
        y = self.at_y(value)
        above = y - 5 if y - TOP > 14 else y + 13
        self.rules.append(Rule(kind, LEFT, y, self.right, y, text, self.right - 3, above, "end"))

    def upright(self, kind: str, value: float, text: str, row: int = 0) -> None:
        """A value of the x axis; labels of several stand in rows of their own."""
        x = self.at_x(value)
        beside = x < LEFT + 0.6 * (self.right - LEFT)
        place = x + 5 if beside else x - 5
        y = self.bottom - 6 - 14 * row
        self.rules.append(Rule(kind, x, TOP, x, self.bottom, text, place, y, "start" if beside else "end"))

    def mark(
        self, kind: str, x: float, y: float, text: str, *, down_to: float | None = None, chosen: bool = False
    ) -> None:
        """A point, with a whisker down to a value."""
        whisker = None if down_to is None else self.at_y(down_to)
        self.marks.append(Mark(kind, self.at_x(x), self.at_y(y), text, whisker, chosen, y < self.y.low))


def simplified(points: Sequence[tuple[float, float]], tolerance: float = TOLERANCE) -> list[tuple[float, float]]:
    """The points of a path that it cannot do without: none of the others is further than `tolerance` from it.

    References
    ----------
    Douglas & Peucker (1973), "Algorithms for the reduction of the number of points required to represent a digitized
    line or its caricature"; distances along y, since the paths here run from left to right.

    Examples
    --------
    >>> simplified([(0, 0), (1, 0.1), (2, 0), (3, 5)])
    [(0, 0), (2, 0), (3, 5)]
    """
    if len(points) < 3:
        return list(points)
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
    gaps = [abs(y - (y0 + slope * (x - x0))) for x, y in points]
    worst = max(range(len(points)), key=gaps.__getitem__)
    if gaps[worst] <= tolerance:
        return [points[0], points[-1]]
    return simplified(points[: worst + 1], tolerance)[:-1] + simplified(points[worst:], tolerance)


def ceiling(value: float) -> float:
    """The next round number from `value` up: where an axis ends well.

    Examples
    --------
    >>> ceiling(0.37), ceiling(0.82), ceiling(61), ceiling(0)
    (0.4, 1.0, 80.0, 1.0)
    """
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return round(next(m * power for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value * 0.9999), 12)
