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
# Okabe and Ito's colours, which differ for colour-blind readers too; black and yellow, which one of the two grounds
# would swallow, are left out. Markers and hatches differ as well, for prints without colour.
COLOURS = ("#2b7fc3", "#dd8a00", "#009e73", "#d55e00", "#c76a9e", "#4ba8dd", "#8a9099")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
KINDS = {"learned": "full", "control": "left", "free": "none", "dense": "full"}
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
class Look:
    """How an arm is drawn everywhere: colour and marker are its own, the filling says what kind it is.

    Args:
        colour: hex colour.
        marker: matplotlib marker.
        hatch: matplotlib hatch of its bars.
        kind: `learned` (filled), `control` (half filled), `free` (hollow: training-free) or `dense`.
    """

    colour: str
    marker: str
    hatch: str
    kind: str

    @property
    def style(self) -> dict[str, Any]:
        """Keywords of a matplotlib line that draws the marker alone."""
        colour = INK if self.kind == "dense" else self.colour
        return {
            "color": colour,
            "marker": "*" if self.kind == "dense" else self.marker,
            "markersize": {"learned": 8.0, "dense": 9.0}.get(self.kind, 6.5),
            "markeredgewidth": 1.3,
            "fillstyle": KINDS[self.kind],
            "markerfacecoloralt": "none",
            "linestyle": "",
        }


@dataclass(frozen=True)
class Bar:
    """One bar with the two ends of its interval, where they are known."""

    value: float
    low: float | None = None
    high: float | None = None


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
    figure, axes = new_figure(0.7 + 0.36 * regions, 0.6 + cell * layers)
    for layer, row in enumerate(bins):
        for region, value in enumerate(row):
            _cell(axes, region, layer, value, fontsize=9 if layers <= 30 else 7.5)
    axes.set(xlim=(0, regions), ylim=(layers, 0))
    axes.set_xticks([i + 0.5 for i in range(regions)], [str(i) for i in range(regions)])
    every = 1 if layers <= 12 else 2 if layers <= 30 else 4
    axes.set_yticks([i + 0.5 for i in range(0, layers, every)], [str(i) for i in range(0, layers, every)])
    finish(axes, "region", "layer")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return svg(figure, name, title)


def bin_legend(name: str = "bins") -> str:
    """The key to `heat_map`: bins 0 to 10 with the keep ratio that each stands for. Returns SVG text."""
    figure, axes = new_figure(5.0, 0.72)
    for value in range(11):
        _cell(axes, value, 0, value, fontsize=9)
    axes.set(xlim=(0, 11), ylim=(1, 0), yticks=[])
    axes.set_xticks([j + 0.5 for j in range(11)], ["bypass", *(f"{j / 10:.1f}" for j in range(1, 10)), "1.0"])
    finish(axes, "", "")
    axes.set_title("bin, and the fraction of tokens it keeps", loc="left", fontsize=9, color=INK)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return svg(figure, name, "Key: bin 0 bypasses the block, bin j keeps j tenths of the tokens, bin 10 keeps all")


def region_bars(series: Mapping[str, Sequence[Bar]], arms: Mapping[str, Look], y_label: str, name: str) -> str:
    """Grouped bars: one group per noise region (cleanest left), one bar per arm, with intervals.

    Args:
        series: bars by arm, one per region.
        arms: the look of every arm of the report.
        y_label: what the bars are.
        name: unique prefix for the ids inside the SVG.

    Returns:
        SVG text.
    """
    figure, axes = new_figure(max(5.4, 0.5 * len(series)), 2.9 + 0.24 * legend_rows(len(series)))
    width = 0.8 / len(series)
    for index, (arm, bars) in enumerate(series.items()):
        fill = _fill(arms[arm])
        for region, bar in enumerate(bars):
            x = region - 0.4 + (index + 0.5) * width
            axes.bar(x, bar.value, width * 0.86, **fill)
            if bar.low is not None and bar.high is not None:
                axes.vlines(x, bar.low, bar.high, color=INK, linewidth=0.9)
    regions = max(len(bars) for bars in series.values())
    ends = ["cleanest", *[""] * (regions - 2), "noisiest"] if regions > 1 else [""]
    axes.set_xticks(range(regions), [f"{i}\n{end}".strip() for i, end in enumerate(ends)])
    axes.axhline(0, color=INK, linewidth=0.8)
    finish(axes, "region", y_label)
    axes.grid(False, axis="x")
    legend(figure, list(series), arms, bars=True)
    return svg(figure, name, f"{y_label} by noise region")


def standalone(svg: str) -> str:
    """The same plot for use outside a page: dark ink on a white ground."""
    return svg.replace("currentColor", "#1d2126").replace("<svg ", '<svg style="background:#fff" ', 1)


def _cell(axes: Axes, column: int, row: int, value: int, fontsize: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, facecolor=BIN_COLOURS[value], linewidth=0))
    ink = "#ffffff" if 1 <= value <= 5 else "#000000"
    axes.text(column + 0.5, row + 0.53, str(value), ha="center", va="center", color=ink, fontsize=fontsize)


def looks(arms: Mapping[str, str]) -> dict[str, Look]:
    """A look for every arm, from arm -> kind, so that an arm looks the same in all plots."""
    return {
        arm: Look(
            COLOURS[i % len(COLOURS)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            HATCHES[(i + i // len(COLOURS)) % len(HATCHES)],
            kind,
        )
        for i, (arm, kind) in enumerate(arms.items())
    }


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty plot of that many inches.

    Raises:
        DiffratioError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise DiffratioError("plots need matplotlib, which is not installed: pip install diffratio[report]") from None
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # an SVG's points
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Axis labels, a faint grid, and no frame."""
    axes.set_xlabel(plain(x_label), color=INK, fontsize=10)
    axes.set_ylabel(plain(y_label), color=INK, fontsize=10)
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(True, color=INK, alpha=0.12, linewidth=0.7)
    axes.tick_params(colors=INK, labelsize=9, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=INK, linewidth=0.7)


def legend_rows(entries: int) -> int:
    """Rows of `legend`."""
    return -(-entries // 3)


def legend(figure: Figure, names: Sequence[str], arms: Mapping[str, Look], bars: bool = False) -> None:
    """The arms below a plot, three in a row, as they are drawn in it."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(**_fill(arms[arm])) if bars else Line2D([], [], **arms[arm].style) for arm in names]
    labels = [plain(arm if len(arm) <= 22 else f"{arm[:21]}…") for arm in names]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=9, labelcolor=INK
    )


def _fill(look: Look) -> dict[str, Any]:
    return {"facecolor": look.colour, "edgecolor": INK, "linewidth": 0, "hatch": look.hatch}


def plain(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor hides (it drops labels that begin with an underscore)."""
    text = text.replace("$", r"\$")
    return f"\u200a{text}" if text.startswith("_") else text


def svg(figure: Figure, name: str, description: str) -> str:
    """Writes the figure without outlines for text (the page's font is used), without a date, with ids of its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "hatch.linewidth": 0.5}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
