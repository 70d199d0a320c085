"""The plots: every arm is told apart without colour, names cover nothing, and marks say what the figures say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest

from diffratio.evaluation import pareto, plots
from diffratio.evaluation.pareto import Box, Point


def words_of(svg: str) -> list[str]:
    return [(e.text or "").strip("\u200a") for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def test_names_are_drawn_as_they_are() -> None:
    arms = ["$x_1$", "_hidden"]
    looks = plots.looks({arm: "free" for arm in arms})
    words = words_of(pareto.pareto([Point(arm, 1.0 + i, 2.0 - i) for i, arm in enumerate(arms)], looks, "a", "b", "x"))
    assert [words.count(arm) for arm in arms] == [2, 2]  # beside the point, and in the legend


def test_the_front_holds_what_nothing_beats() -> None:
    a, b, c, d = (Point(n, x, y) for n, x, y in (("a", 1, 5), ("b", 2, 3), ("c", 2, 4), ("d", 3, 3)))
    assert pareto.pareto_front([d, c, b, a]) == [a, b]


def test_a_heat_map_shows_every_bin() -> None:
    svg = plots.heat_map([[10, 4], [0, 7], [3, 3]], "x", "a & b")
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == "a & b"
    shown = sorted(int(e.text or "") for e in root.iter() if e.tag.endswith("text") and (e.text or "").isdigit())
    assert shown == sorted([10, 4, 0, 7, 3, 3] + [0, 1] + [0, 1, 2])
    for value in (10, 4, 0, 7, 3):
        assert plots.BIN_COLOURS[value] in svg


def test_equal_costs_are_drawn_apart_and_others_stay() -> None:
    points = [Point("a", 0.798, 2), Point("b", 0.797, 1), Point("c", 1.0, 3)]
    a, b, c = pareto._spread(points)
    assert c == 1.0 and 0 < b - a < 0.02 and (a + b) / 2 == pytest.approx(0.7975)


def test_looks_differ_without_colour() -> None:
    looks = plots.looks({f"arm{i}": "free" for i in range(20)})
    assert len({(look.colour, look.marker) for look in looks.values()}) == 20
    for colour in plots.COLOURS:
        same = [look.marker for look in looks.values() if look.colour == colour]
        assert len(same) == len(set(same))
    kinds = plots.looks({kind: kind for kind in plots.KINDS})
    assert len({look.style["fillstyle"] for kind, look in kinds.items() if kind != "dense"}) == 3


def test_names_cover_neither_marks_nor_each_other() -> None:
    points = [
        Point(f"method_{i}", 0.6 + 0.01 * (i % 4), 2 + 0.3 * (i // 4), 1.9 + 0.3 * (i // 4), 2.1) for i in range(12)
    ]
    figure, axes = plots.new_figure(5.6, 4.0)
    for point in points:
        axes.plot([point.x], [point.y], "o")
    pareto._name_points(figure, axes, points, [p.x for p in points], range(len(points)), [])
    figure.draw_without_rendering()
    boxes = []
    for text in axes.texts:
        window = text.get_window_extent()
        boxes.append(Box(window.x0, window.y0, window.x1, window.y1))
    assert len(boxes) >= 4
    assert not any(a.meets(b) for a, b in combinations(boxes, 2))
    for point in points:
        x, y = axes.transData.transform((point.x, point.y))
        assert not any(box.meets(Box(x - 2, y - 2, x + 2, y + 2)) for box in boxes)


def test_a_forest_ranks_its_arms_and_a_wide_range_is_logarithmic() -> None:
    looks = plots.looks({"a": "learned", "b": "control", "dense": "dense"})
    points = [Point("b", 0, 3.0, 2.0, 4.0), Point("a", 0, 2.0, 1.5, 2.5, (1.9, 2.1))]
    words = words_of(pareto.forest(points, looks, "KID", "x", Point("dense", 1, 1.8, 1.6, 2.0)))
    assert [word for word in words if word in looks] == ["a", "b"] and "KID" in words
    words = words_of(pareto.forest([*points, Point("dense", 0, 90.0)], looks, "KID", "x", None))
    assert "KID, logarithmic" in words
    # a logarithm has no place for what lies at or below zero
    words = words_of(pareto.forest([*points, Point("dense", 0, 90.0, -1.0, 99.0)], looks, "KID", "x", None))
    assert "KID" in words


def test_a_crowd_names_what_matters_and_the_legend_has_the_rest() -> None:
    kinds = {f"m{i}": "free" for i in range(20)} | {"ours": "learned", "dense": "dense"}
    points = [Point(arm, 0.6 + 0.015 * i, 2.0 + 0.2 * i) for i, arm in enumerate(kinds)]
    words = words_of(pareto.pareto(points, plots.looks(kinds), "MACs", "KID", "x"))
    assert {arm: words.count(arm) for arm in kinds} == {
        arm: 2 if arm in ("m0", "ours", "dense") else 1 for arm in kinds
    }
