"""Plots as SVG text: no fonts, no scripts, no library. Colours are CSS variables, so a page can be light or dark.

    lines([Line("train", points, colour=0)], x="step", y="loss (nats per token)")
    scatter([Point(3.1, 2.4, "fr", "French: …", colour=0)], x="unigram", y="trained", diagonal=True)

Hovering over a point or a line shows its `tip`; every axis carries a label with its unit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Number = int | float

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 14, 50
COLOURS = ("#2b6cb0", "#d9480f", "#2f9e44", "#ae3ec9", "#e67700", "#0c8599", "#c2255c", "#5f3dc4")  # then grey
MUTED = len(COLOURS)
LETTER = 6.6  # width of a label's letter, at most
LINE = 13.0  # height of a label


@dataclass(frozen=True)
class Line:
    """points: (x, y), x rising. colour: of COLOURS, or MUTED: thin and grey, without a label."""

    label: str
    points: Sequence[tuple[Number, Number]]
    colour: int = 0
    tip: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Point:
    """label: written beside the point where there is room."""

    x: Number
    y: Number
    label: str
    tip: str
    colour: int = MUTED


def lines(
    series: Sequence[Line], *, x: str, y: str, zero: bool = False, marks: Sequence[tuple[Number, str]] = ()
) -> str:
    """Lines over a common x axis; coloured ones carry their label at the right end. marks: (y, text) of dashed levels.

    zero: the y axis begins at 0. Without any point, a sentence that says so.
    """
    points = [p for line in series for p in line.points]
    if not points:
        return '<p class="nothing">No values were logged.</p>'
    named = [line for line in series if line.colour < MUTED and line.points]
    room = LEFT + 12 + LETTER * max((len(line.label) for line in named), default=0)
    values = [p[1] for p in points] + [level for level, _ in marks]
    frame = _Frame(
        (min(p[0] for p in points), max(p[0] for p in points)), (0.0 if zero else min(values), max(values)), room
    )
    parts = [frame.axes(x, y)]
    for level, text in marks:
        place = frame.y(level)
        parts.append(f'<path class="mark" d="M{frame.left} {place:.1f}H{frame.right:.1f}"/>')
        parts.append(f'<text class="small" x="{frame.left + 6}" y="{place - 5:.1f}">{escape(text)}</text>')
    for line in sorted(series, key=lambda line: -line.colour):
        if not line.points:
            continue
        path = "M" + "L".join(f"{frame.x(a):.1f} {frame.y(b):.1f}" for a, b in line.points)
        kind = "muted" if line.colour >= MUTED else "line"
        parts.append(
            f'<path class="{kind}" style="stroke:{_colour(line.colour)}" d="{path}">'
            f"<title>{escape(line.tip or line.label)}</title></path>"
        )
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3.5" style="fill:{_colour(line.colour)}">'
                f"<title>{escape(line.tip or line.label)} at {a:,.10g}: {b:.3f}</title></circle>"
                for a, b in line.points
            ]
    ends = sorted(((frame.y(line.points[-1][1]), line) for line in named), key=lambda end: end[0])
    for place, (_, line) in zip(_apart([end for end, _ in ends], frame.top, frame.bottom), ends, strict=True):
        parts.append(
            f'<text class="label" x="{frame.right + 6:.1f}" y="{place + 4:.1f}" '
            f'style="fill:{_colour(line.colour)}">{escape(line.label)}</text>'
        )
    return _svg(parts)


def scatter(
    points: Sequence[Point],
    *,
    x: str,
    y: str,
    diagonal: str = "",
    legend: Sequence[tuple[str, int]] = (),
    height: int = 560,
) -> str:
    """Points with labels where there is room. diagonal: text of a line x = y, then both axes have one scale.

    legend: (text, colour) in order, above the plot.
    """
    if not points:
        return '<p class="nothing">No values were measured.</p>'
    across, up = [p.x for p in points], [p.y for p in points]
    top = TOP + 22 * math.ceil(len(legend) / 6)
    if diagonal:
        across = up = across + up
    frame = _Frame((min(across), max(across)), (min(up), max(up)), RIGHT, top, height)
    parts = [frame.axes(x, y), _legend(legend)]
    if diagonal:
        low, high = frame.span
        x0, y0, x1, y1 = frame.x(low), frame.y(low), frame.x(high), frame.y(high)
        parts.append(f'<path class="mark" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
        parts.append(
            f'<text class="small" text-anchor="end" x="{x1 - 60:.1f}" y="{y1 + 14:.1f}">{escape(diagonal)}</text>'
        )
    placed = [(frame.x(p.x), frame.y(p.y), p) for p in points]
    for a, b, point in sorted(placed, key=lambda entry: -entry[2].colour):
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" class="dot" style="fill:{_colour(point.colour)}">'
            f"<title>{escape(point.tip)}</title></circle>"
        )
    for left, baseline, point in _labels(placed, frame):
        parts.append(f'<text class="small" x="{left:.1f}" y="{baseline:.1f}">{escape(point.label)}</text>')
    return _svg(parts, height)


class _Frame:
    """Data to picture coordinates, and the two axes."""

    def __init__(
        self,
        across: tuple[Number, Number],
        up: tuple[Number, Number],
        room: Number,
        top: Number = TOP,
        height: int = HEIGHT,
    ):
        self.left, self.right, self.top, self.bottom = LEFT, WIDTH - room, top, height - BOTTOM
        self._across, self.x_ticks = _scale(*across)
        self._up, self.y_ticks = _scale(*up)

    @property
    def span(self) -> tuple[Number, Number]:
        """Values that both axes reach."""
        return max(self._across[0], self._up[0]), min(self._across[1], self._up[1])

    def x(self, value: Number) -> float:
        low, high = self._across
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: Number) -> float:
        low, high = self._up
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(self, x: str, y: str) -> str:
        parts = []
        for value in self.y_ticks:
            place = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left} {place:.1f}H{self.right:.1f}"/>')
            parts.append(
                f'<text class="tick" text-anchor="end" x="{self.left - 8}" y="{place + 4:.1f}">{_tick(value)}</text>'
            )
        for value in self.x_ticks:
            place = self.x(value)
            parts.append(f'<path class="grid" d="M{place:.1f} {self.top}V{self.bottom}"/>')
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{place:.1f}" y="{self.bottom + 18}">{_tick(value)}</text>'
            )
        middle = (self.left + self.right) / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" x="{middle:.1f}" y="{self.bottom + 40}">{escape(x)}</text>'
        )
        centre = (self.top + self.bottom) / 2
        turn = f'transform="translate(16 {centre:.1f}) rotate(-90)"'
        parts.append(f'<text class="axis" text-anchor="middle" {turn}>{escape(y)}</text>')
        return "".join(parts)


def _scale(low: Number, high: Number) -> tuple[tuple[Number, Number], list[Number]]:
    """The span of an axis and its ticks at multiples of 1, 2 or 5 · 10^n; ticks reach beyond the data."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return (first * step, last * step), [n * step for n in range(first, last + 1)]


def _tick(value: Number) -> str:
    if abs(value) >= 1e5:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:,.10g}" if abs(value) >= 1e-6 else "0"


def _apart(places: Sequence[Number], top: Number, bottom: Number) -> list[Number]:
    """Rising places, moved so that neighbours are a line apart and none leaves the frame."""
    moved: list[Number] = []
    for place in places:
        moved.append(max(place, moved[-1] + LINE if moved else top))
    limit = bottom
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - LINE
    return moved


def _labels(placed: Sequence[tuple[Number, Number, Point]], frame: _Frame) -> list[tuple[Number, Number, Point]]:
    """(left, baseline, point) of the labels that cover neither a point nor another label; loneliest points first."""
    boxes = [(a - 5, b - 5, a + 5, b + 5) for a, b, _ in placed]
    free: Callable = lambda box: all(  # noqa: E731
        box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3] for other in boxes
    )

    def distance(entry):
        a, b, _ = entry
        return -min((math.hypot(a - c, b - d) for c, d, p in placed if p is not entry[2]), default=0.0)

    found = []
    for a, b, point in sorted(placed, key=distance):
        width = LETTER * len(point.label)
        for left, baseline in ((a + 7, b + 4), (a - 7 - width, b + 4), (a - width / 2, b - 8), (a - width / 2, b + 17)):
            box = (left, baseline - 10, left + width, baseline + 2)
            if frame.left < box[0] and box[2] < frame.right + 10 and box[3] < frame.bottom and free(box):
                boxes.append(box)
                found.append((left, baseline, point))
                break
    return found


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    parts = []
    for index, (text, colour) in enumerate(entries):
        row, column = divmod(index, 6)
        x, y = LEFT + column * 130, TOP + 2 + row * 22
        parts.append(f'<circle cx="{x + 6}" cy="{y}" r="5" class="dot" style="fill:{_colour(colour)}"/>')
        parts.append(f'<text class="small" x="{x + 16}" y="{y + 4}">{escape(text)}</text>')
    return "".join(parts)


def _colour(index: int) -> str:
    return COLOURS[index] if index < MUTED else "var(--muted)"


def _svg(parts: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="plot">{"".join(parts)}</svg>'
