"""The report's plots as SVG text that takes its ink from the page around it (`currentColor`)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from diffratio.errors import DiffratioError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for currentColor until the SVG is written: matplotlib has no such colour
COLOURS = ("#3b82c4", "#d9772b", "#3a9d5d", "#c94f5d", "#8b6cc9", "#9a7448", "#c95fa6", "#7f8790", "#8f8a1e", "#1f98a5")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
BIN_COLOURS = (
    "#8d8d8d",
    "#3b0f4f",
    "#46287a",
    "#413f86",
    "#34618d",
    "#277e8e",
    "#1e9b89",
    "#3fb573",
    "#7acb4e",
    "#bcd935",
    "#f4e33a",
)


@dataclass(frozen=True)
class Point:
    """One arm at one budget in a Pareto plot; lower is better on both axes.

    Args:
        arm: its name.
        x: cost.
        y: quality (a distance or a loss).
        low: lower end of the interval of y, or None.
        high: upper end of it, or None.
    """

    arm: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bar:
    """One bar with the two ends of its interval, where they are known."""

    value: float
    low: float | None = None
    high: float | None = None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats on both axes, by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def pareto(
    points: Sequence[Point], arms: Sequence[str], x_label: str, y_label: str, name: str, spread: bool = False
) -> str:
    """Quality against cost, with intervals, the Pareto front as steps and its arms named.

    Args:
        points: one per (arm, budget).
        arms: every arm of the report in a fixed order, so that an arm looks the same in all plots.
        x_label: cost with its unit.
        y_label: quality with its unit.
        name: unique prefix for the ids inside the SVG.
        spread: draw arms whose costs are equal but for the rounding of a budget side by side; the front stays exact.

    Returns:
        SVG text.
    """
    figure, axes = _figure(5.4, 3.4 + 0.24 * _legend_rows(len({p.arm for p in points})))
    places = _spread(points) if spread else [p.x for p in points]
    for point, x in zip(points, places, strict=True):
        colour, marker = _style(point.arm, arms)
        if point.low is not None and point.high is not None:
            axes.vlines(x, point.low, point.high, color=colour, linewidth=1.3, alpha=0.75)
        axes.plot([x], [point.y], marker, color=colour, markersize=6.5, markeredgewidth=0)
    front = pareto_front(points)
    # Steps, not a slope: between two arms' costs nothing better than the cheaper one has been shown.
    axes.step(
        [p.x for p in front], [p.y for p in front], where="post", color=INK, linewidth=0.9, linestyle=":", zorder=0
    )
    for point, x in zip(points, places, strict=True):
        if point in front:
            # Nothing lies below and left of a point of the front, so its name does not cover another mark.
            style: dict[str, Any] = {
                "textcoords": "offset points",
                "ha": "right",
                "va": "top",
                "fontsize": 9,
                "color": INK,
            }
            axes.annotate(_plain(point.arm), (x, point.y), xytext=(-5, -3), **style)
    span = _span(points)
    axes.set_xlim(min(places) - 0.24 * span, max(places) + 0.08 * span)  # the names stand to the left
    axes.margins(y=0.12)
    _finish(axes, x_label, y_label)
    _legend(figure, list(dict.fromkeys(a for a in arms if a in {p.arm for p in points})), arms)
    return _svg(figure, name, f"{y_label} against {x_label}")


def heat_map(bins: Sequence[Sequence[int]], name: str, title: str) -> str:
    """Keep schedule as a grid: a row per layer (first on top), a column per noise region (cleanest left).

    Args:
        bins: integer bins 0..10, shape [layer][region]; bin j keeps j/10 of the tokens, 0 bypasses the block.
        name: unique prefix for the ids inside the SVG.
        title: what it is, for readers that cannot see it.

    Returns:
        SVG text.
    """
    layers, regions = len(bins), len(bins[0])
    cell = 0.25 if layers <= 30 else 0.18
    figure, axes = _figure(0.7 + 0.36 * regions, 0.6 + cell * layers)
    for layer, row in enumerate(bins):
        for region, value in enumerate(row):
            _cell(axes, region, layer, value, fontsize=9 if layers <= 30 else 7.5)
    axes.set(xlim=(0, regions), ylim=(layers, 0))
    axes.set_xticks([i + 0.5 for i in range(regions)], [str(i) for i in range(regions)])
    every = 1 if layers <= 12 else 2 if layers <= 30 else 4
    axes.set_yticks([i + 0.5 for i in range(0, layers, every)], [str(i) for i in range(0, layers, every)])
    _finish(axes, "region", "layer")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _svg(figure, name, title)


def bin_legend(name: str = "bins") -> str:
    """The key to `heat_map`: bins 0 to 10 with the keep ratio that each stands for. Returns SVG text."""
    figure, axes = _figure(5.0, 0.72)
    for value in range(11):
        _cell(axes, value, 0, value, fontsize=9)
    axes.set(xlim=(0, 11), ylim=(1, 0), yticks=[])
    axes.set_xticks([j + 0.5 for j in range(11)], ["bypass", *(f"{j / 10:.1f}" for j in range(1, 10)), "1.0"])
    _finish(axes, "", "")
    axes.set_title("bin, and the fraction of tokens it keeps", loc="left", fontsize=9, color=INK)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _svg(figure, name, "Key: bin 0 bypasses the block, bin j keeps j tenths of the tokens, bin 10 keeps all")


def region_bars(series: Mapping[str, Sequence[Bar]], arms: Sequence[str], y_label: str, name: str) -> str:
    """Grouped bars: one group per noise region (cleanest left), one bar per arm, with intervals.

    Args:
        series: bars by arm, one per region.
        arms: every arm of the report in a fixed order.
        y_label: what the bars are.
        name: unique prefix for the ids inside the SVG.

    Returns:
        SVG text.
    """
    figure, axes = _figure(5.4, 2.9 + 0.24 * _legend_rows(len(series)))
    width = 0.8 / len(series)
    for index, (arm, bars) in enumerate(series.items()):
        colour, _ = _style(arm, arms)
        for region, bar in enumerate(bars):
            x = region - 0.4 + (index + 0.5) * width
            axes.bar(x, bar.value, width * 0.86, color=colour)
            if bar.low is not None and bar.high is not None:
                axes.vlines(x, bar.low, bar.high, color=INK, linewidth=0.9)
    regions = max(len(bars) for bars in series.values())
    ends = ["cleanest", *[""] * (regions - 2), "noisiest"] if regions > 1 else [""]
    axes.set_xticks(range(regions), [f"{i}\n{end}".strip() for i, end in enumerate(ends)])
    axes.axhline(0, color=INK, linewidth=0.8)
    _finish(axes, "region", y_label)
    axes.grid(False, axis="x")
    _legend(figure, list(series), arms, bars=True)
    return _svg(figure, name, f"{y_label} by noise region")


def standalone(svg: str) -> str:
    """The same plot for use outside a page: dark ink on a white ground."""
    return svg.replace("currentColor", "#1d2126").replace("<svg ", '<svg style="background:#fff" ', 1)


def _cell(axes: Axes, column: int, row: int, value: int, fontsize: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, facecolor=BIN_COLOURS[value], linewidth=0))
    ink = "#ffffff" if 1 <= value <= 5 else "#000000"
    axes.text(column + 0.5, row + 0.53, str(value), ha="center", va="center", color=ink, fontsize=fontsize)


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
        pitch = min(0.025, 0.1 / len(cluster)) * span
        middle = sum(points[i].x for i in cluster) / len(cluster)
        if len(cluster) > 1:
            for rank, i in enumerate(sorted(cluster, key=lambda i: points[i].arm)):
                places[i] = middle + (rank - (len(cluster) - 1) / 2) * pitch
    return places


def _style(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    index = list(arms).index(arm)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise DiffratioError("plots need matplotlib, which is not installed: pip install diffratio[report]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(_plain(x_label), color=INK, fontsize=10)
    axes.set_ylabel(_plain(y_label), color=INK, fontsize=10)
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(True, color=INK, alpha=0.12, linewidth=0.7)
    axes.tick_params(colors=INK, labelsize=9, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=INK, linewidth=0.7)


def _legend_rows(entries: int) -> int:
    return -(-entries // 3)


def _legend(figure: Figure, names: Sequence[str], arms: Sequence[str], bars: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for arm in names:
        colour, marker = _style(arm, arms)
        mark: Any = (
            Patch(color=colour) if bars else Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6)
        )
        handles.append(mark)
    labels = [_plain(arm if len(arm) <= 22 else f"{arm[:21]}…") for arm in names]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=9, labelcolor=INK
    )


def _plain(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor hides (it drops labels that begin with an underscore)."""
    text = text.replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text


def _svg(figure: Figure, name: str, description: str) -> str:
    """Writes the figure without outlines for text (the page's font is used), without a date, with ids of its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
