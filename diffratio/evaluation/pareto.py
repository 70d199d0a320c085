"""Quality against cost: Pareto plots, and at one budget the arms side by side, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffratio.evaluation.plots import INK, Look, finish, legend, legend_rows, new_figure, plain, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FROM = 12.0  # a wider range of qualities than this hides what lies at its good end
FONT = 9
CROWD = 16  # with more points only the front, learned arms and the dense model are named
_OFFSETS = ((8, 0), (-8, 0), (0, 11), (0, -11), (7, 9), (-7, 9), (7, -9), (-7, -9))  # points from a mark to its name


@dataclass(frozen=True)
class Point:
    """One arm at one budget; lower is better on both axes.

    Args:
        arm: its name.
        x: cost.
        y: quality (a distance or a loss).
        low: lower end of the interval of y, or None.
        high: upper end of it, or None.
        seeds: the values of y of the single seeds.
    """

    arm: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Box:
    """A rectangle in points of the figure."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def inside(self, other: Box) -> bool:
        """Whether it lies wholly in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.bottom >= other.bottom
            and self.top <= other.top
        )


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats on both axes, by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def pareto(
    points: Sequence[Point], arms: Mapping[str, Look], x_label: str, y_label: str, name: str, spread: bool = False
) -> str:
    """Quality against cost, with intervals, the dense model as a line and the Pareto front as steps.

    Args:
        points: one per (arm, budget).
        arms: the look of every arm of the report.
        x_label: cost with its unit.
        y_label: quality with its unit.
        name: unique prefix for the ids inside the SVG.
        spread: draw arms whose costs are equal but for the rounding of a budget side by side; the front stays exact.

    Returns:
        SVG text.
    """
    shown = [arm for arm in arms if arm in {p.arm for p in points}]
    figure, axes = new_figure(5.6, 3.7 + 0.24 * legend_rows(len(shown)))
    places = _spread(points) if spread else [p.x for p in points]
    for point, x in zip(points, places, strict=True):
        look = arms[point.arm]
        if point.low is not None and point.high is not None:
            width = 1.8 if look.kind == "learned" else 1.1
            colour = INK if look.kind == "dense" else look.colour
            axes.vlines(x, point.low, point.high, color=colour, linewidth=width, alpha=0.8)
        axes.plot([x], [point.y], **look.style)
        if look.kind == "dense":
            axes.axhline(point.y, color=INK, linewidth=0.9, linestyle="--", alpha=0.55, zorder=0)
    front = pareto_front(points)
    # Steps, not a slope: between two arms' costs nothing better than the cheaper one has been shown.
    axes.step(
        [p.x for p in front], [p.y for p in front], where="post", color=INK, linewidth=0.9, linestyle=":", zorder=0
    )
    axes.margins(x=0.09, y=0.1)
    note = _log_where_wide(axes, points)
    finish(axes, x_label, y_label + note)
    legend(figure, shown, arms)
    order = sorted(
        range(len(points)), key=lambda i: (points[i] not in front, arms[points[i].arm].kind != "learned", points[i].y)
    )
    if len(points) > CROWD:
        order = [i for i in order if points[i] in front or arms[points[i].arm].kind in ("learned", "dense")]
    lines = [(a.x, a.y, b.x, a.y) for a, b in zip(front, front[1:], strict=False)]
    lines += [(b.x, a.y, b.x, b.y) for a, b in zip(front, front[1:], strict=False)]
    left, right = axes.get_xlim()
    lines += [(left, p.y, right, p.y) for p in points if arms[p.arm].kind == "dense"]
    _name_points(figure, axes, points, places, order, lines)
    return svg(figure, name, f"{y_label} against {x_label}")


def forest(points: Sequence[Point], arms: Mapping[str, Look], x_label: str, name: str, dense: Point | None) -> str:
    """The arms of one budget, best on top, each with its interval and its single seeds; x is unused.

    Args:
        points: one per arm, of equal cost.
        arms: the look of every arm of the report.
        x_label: quality with its unit.
        name: unique prefix for the ids inside the SVG.
        dense: the dense model, drawn as a line with its interval as a band, or None.

    Returns:
        SVG text.
    """
    ranked = sorted(points, key=lambda p: p.y)
    figure, axes = new_figure(5.6, 0.75 + 0.27 * len(ranked))
    for place, point in enumerate(ranked):
        look = arms[point.arm]
        if point.low is not None and point.high is not None:
            axes.hlines(
                place, point.low, point.high, color=look.colour, linewidth=1.8 if look.kind == "learned" else 1.1
            )
        if len(point.seeds) > 1:
            ticks = [place + 0.3] * len(point.seeds)
            axes.plot(point.seeds, ticks, color=INK, marker="|", markersize=4, linestyle="", alpha=0.6)
        axes.plot([point.y], [place], **look.style)
    if dense is not None:
        axes.axvline(dense.y, color=INK, linewidth=0.9, linestyle="--", alpha=0.7, zorder=0)
        if dense.low is not None and dense.high is not None:
            axes.axvspan(dense.low, dense.high, color=INK, alpha=0.08, linewidth=0, zorder=0)
    axes.set_yticks(range(len(ranked)), [plain(p.arm if len(p.arm) <= 28 else f"{p.arm[:27]}…") for p in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    note = _log_where_wide(axes, [*points, *([dense] if dense else [])], vertical=False)
    finish(axes, x_label + note, "")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return svg(figure, name, f"{x_label} of the arms at equal cost")


def _log_where_wide(axes: Axes, points: Sequence[Point], vertical: bool = True) -> str:
    """A logarithmic quality axis where the worst arm would press the others together; returns what to say of it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ends = [p.y for p in points] + [p.low for p in points if p.low is not None]
    if min(ends) <= 0 or max(p.y for p in points) / min(p.y for p in points) < LOG_FROM:
        return ""
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return ", logarithmic"


def _name_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Point],
    places: Sequence[float],
    order: Sequence[int],
    lines: Sequence[tuple[float, float, float, float]],
) -> None:
    """Writes names where they cover no mark, no name and, where that can be, no line; the legend has the rest."""
    figure.draw_without_rendering()  # settles the layout, so that data have places in points
    at = axes.transData.transform
    frame = axes.get_window_extent()
    bounds = Box(frame.x0, frame.y0, frame.x1, frame.y1)
    taken = []
    for point, x in zip(points, places, strict=True):
        px, py = at((x, point.y))
        taken.append(Box(px - 5, py - 5, px + 5, py + 5))
        if point.low is not None and point.high is not None:
            taken.append(Box(px - 2, at((x, point.low))[1], px + 2, at((x, point.high))[1]))
    ends = [(*at((x0, y0)), *at((x1, y1))) for x0, y0, x1, y1 in lines]
    thin = [Box(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for a, b, c, d in ends]
    for i in order:
        px, py = at((places[i], points[i].y))
        text = points[i].arm if len(points[i].arm) <= 22 else f"{points[i].arm[:21]}…"
        options = [(dx, dy, _text_box(text, px + dx, py + dy, dx)) for dx, dy in _OFFSETS]
        free = [(dx, dy, box) for dx, dy, box in options if box.inside(bounds) and not _hits(box, taken)]
        clear = [option for option in free if not _hits(option[2], thin)]
        for dx, dy, box in (clear or free)[:1]:
            taken.append(box)
            where = "left" if dx > 0 else "right" if dx < 0 else "center"
            note = axes.annotate(
                    plain(text), (places[i], points[i].y), xytext=(dx, dy), textcoords="offset points",
                    ha=where, va="center", fontsize=FONT, color=INK,
                )  # fmt: skip
            note.set_in_layout(False)


def _hits(box: Box, others: Sequence[Box]) -> bool:
    return any(box.meets(other) for other in others)


def _text_box(text: str, x: float, y: float, side: float) -> Box:
    """About what a line takes; the page chooses the font, so with something to spare."""
    width, height = 0.65 * FONT * len(text), 1.15 * FONT
    left = x if side > 0 else x - width if side < 0 else x - width / 2
    return Box(left, y - height / 2, left + width, y + height / 2)


def _span(points: Sequence[Point]) -> float:
    return max(p.x for p in points) - min(p.x for p in points) or max(abs(points[0].x), 1e-9)


def _spread(points: Sequence[Point]) -> list[float]:
    """Moves points with nearly equal x apart, by name: an order by y would look like a trend. The others stay."""
    span = _span(points)
    order = sorted(range(len(points)), key=lambda i: points[i].x)
    clusters: list[list[int]] = []
    for i in order:
        if clusters and points[i].x - points[clusters[-1][0]].x <= 0.03 * span:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    places = [p.x for p in points]
    for cluster in clusters:
        pitch = min(0.035, 0.24 / len(cluster)) * span
        middle = sum(points[i].x for i in cluster) / len(cluster)
        if len(cluster) > 1:
            for rank, i in enumerate(sorted(cluster, key=lambda i: points[i].arm)):
                places[i] = middle + (rank - (len(cluster) - 1) / 2) * pitch
    return places
