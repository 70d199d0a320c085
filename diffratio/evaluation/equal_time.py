"""Which arm of each method fits a time: quality at equal milliseconds, beside the tables at equal MACs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffratio.evaluation.summary import Group, Row, timing_key
from diffratio.evaluation.tables import DASH

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the dense model's time


def equal_time_table(
    groups: Sequence[Group], times: Sequence[tuple[int, str]], metric: str, label: str, scale: float = 1.0
) -> dict[str, Any] | None:
    """For each arm and time the slowest of its measured budgets that takes no longer.

    The choice is by time alone, so quality chooses nothing; an arm that was measured at few budgets may leave much of a
    time unused, which its own time says.

    Args:
        groups: all arms by budget.
        times: (batch, mode) pairs that were timed; the largest eager batch counts.
        metric: that is shown.
        label: of the metric.
        scale: by which it is shown.

    Returns:
        `title`, `columns` and `rows` of text; None where fewer than two budgets below 1 were timed.
    """
    eager = [pair for pair in times if pair[1] == "eager"]
    if not eager:
        return None
    batch, mode = max(eager)
    key = timing_key("ratio", batch, mode)
    below = [group for group in groups if group.budget < 1]
    timed = [row for group in below for row in group.rows if key in row.figures and metric in row.figures]
    if len({row.budget for row in timed}) < 2:
        return None
    rows = []
    for name in dict.fromkeys(row.name for row in timed):
        own = sorted((row for row in timed if row.name == name), key=lambda row: row.figures[key].value)
        rows.append([name, *(_cell(own, key, metric, share, scale) for share in SHARES)])
    return {
        "title": f"{label} at equal time, batch {batch}: of each arm the budget that takes most of it (its own time)",
        "columns": ["arm", *(f"≤ {share:g} of dense" for share in SHARES)],
        "rows": rows,
    }


def _cell(own: Sequence[Row], key: str, metric: str, share: float, scale: float) -> str:
    fitting = [row for row in own if row.figures[key].value <= share]
    if not fitting:
        return DASH
    figure, time = fitting[-1].figures[metric], fitting[-1].figures[key].value
    digits = 0 if abs(figure.value * scale) >= 100 else 2
    interval = ""
    if figure.interval is not None:
        low, high = (f"{end * scale:.{digits}f}" for end in figure.interval)
        interval = f", {low} to {high}"
    return f"{figure.value * scale:.{digits}f}{interval} ({time:.2f})"
