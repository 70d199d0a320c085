"""The report: its words follow from the records, nothing is dropped, and it stands alone."""

from __future__ import annotations

import csv
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricate import make_folder, make_record, png

from diffratio.errors import DiffratioError
from diffratio.evaluation import report
from diffratio.evaluation.equal_time import equal_time_table
from diffratio.evaluation.metrics import METRICS
from diffratio.evaluation.records import Arm, Record, write_record
from diffratio.evaluation.report import COMPACT_LIMIT, ReportPaths, write_report
from diffratio.evaluation.summary import Group, summarise
from diffratio.evaluation.verdicts import flags, gaps, headline, notices
from diffratio.evaluation.view import kind_of

NASTY = '<script>alert(1)</script> & $x_1$ | "q"'


class Outline(HTMLParser):
    """Collects headings, sources, links, tables' status cells and ids; checks that tags nest."""

    VOID = {"col", "meta", "link", "img", "br", "use", "path", "rect"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    assert found.open == []
    return found


def groups_of(*records: Record) -> list[Group]:
    return summarise(records)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], ReportPaths]:
    """A made-up comparison with class names on its samples, and its report in every form; tests only read it."""
    folder = tmp_path_factory.mktemp("trial")
    records = make_folder(folder)
    for place, record in enumerate(records):
        if record.arm.name == "dense":
            named = {**record.images, "labels": [f"class{i}" for i in range(12)]}
            records[place] = replace(record, images=named)
            write_record(folder, records[place], replace=True)
    return records, write_report(folder, "Trial", compact=True)


def test_a_report_has_every_part_in_order_and_stands_alone(trial: tuple[list[Record], ReportPaths]) -> None:
    _, paths = trial
    found = outline(paths.html.read_text(encoding="utf-8"))
    assert found.headings == [
        "Summary",
        "How to read this",
        "Quality at equal cost",
        "Quality at equal time",
        "Quality against cost",
        "Where each schedule keeps tokens",
        "Excess loss by noise region",
        "Samples",
        "Where tokens went",
        "Benchmarks",
        "Not reached, failed or cancelled",
        "Provenance",
    ]
    outside = [source for source in found.sources if not source.startswith(("#", "data:"))]
    assert outside == []
    assert sum(source.startswith("data:image/png;base64,") for source in found.sources) == 9 + 2 + 5 + 5
    assert len(found.ids) == len(set(found.ids))
    assert "@import" not in "".join(found.text) and "url(http" not in "".join(found.text)
    text = " ".join(found.text)
    assert "out of memory" in text and "todo cannot reach a budget of 0.6" in text


def test_markdown_shows_the_same_and_its_links_lead_to_files(trial: tuple[list[Record], ReportPaths]) -> None:
    tmp_path = trial[1].markdown.parent
    text = trial[1].markdown.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) > 15 and all((tmp_path / link).is_file() for link in links)
    for link in links:
        if link.endswith(".svg"):
            content = (tmp_path / link).read_text(encoding="utf-8")
            ElementTree.fromstring(content)
            assert "currentColor" not in content
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    assert len(tables) > 8
    assert all(len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1 for table in tables)


def test_at_equal_time_each_arm_shows_what_fits() -> None:
    """By time alone: the slowest budget within the share, whatever its quality."""
    plan = [("mod", 0.8, 3.1, 0.84), ("mod", 0.6, 3.6, 0.66), ("tome", 0.8, 5.2, 0.97), ("tome", 0.6, 9.1, 0.92)]
    records = [make_record("dense", 1.0, ratio=1.0)]
    records += [make_record(name, budget, kid=kid, ratio=ratio) for name, budget, kid, ratio in plan]
    found = equal_time_table(groups_of(*records), [(1, "eager"), (8, "eager")], "kid_lite0", "KID")
    assert found is not None and found["columns"][1:3] == ["≤ 0.9 of dense", "≤ 0.8 of dense"]
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert rows["mod"] == ["3.10, 2.80 to 3.40 (0.84)", *["3.60, 3.30 to 3.90 (0.66)"] * 2, "–", "–", "–"]
    assert rows["tome"] == ["–"] * 6
    assert equal_time_table(groups_of(*records[:2]), [(8, "eager")], "kid_lite0", "KID") is None
    assert equal_time_table(groups_of(*records), [], "kid_lite0", "KID") is None


def test_the_csv_has_every_record_with_its_figures(trial: tuple[list[Record], ReportPaths]) -> None:
    records, paths = trial
    with open(paths.csv, encoding="utf-8", newline="") as handle:
        rows = {row["id"]: row for row in csv.DictReader(handle)}
    assert set(rows) == {record.id for record in records}
    for record in records:
        value = rows[record.id]["quality.kid_lite0.value"]
        assert (float(value) if value else None) == (record.quality.get("kid_lite0") or {}).get("value")
    assert float(rows["mod-80-s0"]["latency.8.eager.median_ms"]) == pytest.approx(1240 * 0.84)
    assert rows["dato-80-s0"]["message"] == "out of memory"


def test_a_report_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("diffcr", "tome"):
        write_record(tmp_path, make_record(name, schedule={"bins": [[10, 1]]}))
    first = write_report(tmp_path)
    before = {path: path.read_bytes() for path in (first.html, first.markdown, first.csv)}
    write_report(tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    record = make_record(NASTY, schedule={"bins": [[10, 1]]}, message=NASTY, sampler=NASTY)
    table = {"block": {"title": NASTY, "rows": [{NASTY: NASTY}]}}
    write_record(tmp_path, replace(record, extra=table))
    write_record(tmp_path, Record(Arm("_hidden", NASTY, {"name": NASTY}), 0.8, 1, status="failed", message=NASTY))
    write_record(tmp_path, make_record("_shown", kid=1.0))
    paths = write_report(tmp_path, NASTY)
    html = paths.html.read_text(encoding="utf-8")
    assert "<script" not in html and "alert(1)" in html
    outline(html)
    assert "<script" not in paths.markdown.read_text(encoding="utf-8")
    svg = (tmp_path / "plots" / "pareto-macs.svg").read_text(encoding="utf-8")
    words = [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert any(word.startswith("<script>alert(1)") for word in words)


def test_a_winner_needs_an_interval_clear_of_all_others() -> None:
    (clear,) = groups_of(make_record("a", kid=1.0), make_record("b", kid=2.0), make_record("c", kid=3.0))
    assert clear.winner("kid_lite0") == "a"
    # c is worse than b, but its wide interval reaches down to a's
    (wide,) = groups_of(make_record("a", kid=1.0), make_record("b", kid=2.0), make_record("c", kid=3.0, half=4.5))
    assert wide.winner("kid_lite0") is None and wide.rivals("kid_lite0") == ["c"]
    (close,) = groups_of(make_record("a", kid=1.0), make_record("b", kid=1.2))
    assert close.winner("kid_lite0") is None
    (alone,) = groups_of(make_record("a"))
    assert alone.winner("kid_lite0") is None
    bare = make_record("b", kid=9.0)
    (unknown,) = groups_of(make_record("a", kid=1.0), replace(bare, quality={"kid_lite0": {"value": 9.0}}))
    assert unknown.winner("kid_lite0") is None


def test_only_a_clear_winner_gets_a_star(tmp_path: Path) -> None:
    for place, other in ((tmp_path / "clear", 5.0), (tmp_path / "close", 2.2)):
        for name, kid in (("diffcr", 2.0), ("tome", other)):
            record = make_record(name, kid=kid)
            write_record(place, replace(record, quality={"kid_lite0": record.quality["kid_lite0"]}, cost={}))
        html = write_report(place).html.read_text(encoding="utf-8")
        assert html.count('class="number best"') == (1 if place.name == "clear" else 0)


def test_the_headline_says_what_the_records_say() -> None:
    dense = make_record("dense", 1.0, kid=1.8, ratio=1.0)
    (clear,) = headline(groups_of(dense, make_record("diffcr", kid=1.0), make_record("tome", kid=5.0)))
    assert clear.startswith(
        "At 80 % of the dense MACs diffcr has the lowest KID (1.00, interval 0.70 to 1.30; 1 seed, n = 500)"
    )
    assert "clear of the next best, tome" in clear and "better than the dense model" in clear
    (close,) = headline(groups_of(make_record("diffcr", kid=1.9), make_record("tome", kid=2.0)))
    assert "not certain: it is not separated from tome" in close and "not told apart from the dense model" in close
    (worse,) = headline(groups_of(make_record("diffcr", kid=3.0), make_record("tome", kid=9.0)))
    assert "worse than the dense model" in worse
    (alone,) = headline(groups_of(make_record("diffcr")))
    assert "only arm measured" in alone
    failed = Record(Arm("tome", "w", {"name": "tome"}), 0.8, 0, status="failed")
    (nothing,) = headline(groups_of(failed))
    assert "no arm has a measured quality" in nothing and "1 arm gave no result" in nothing


def test_excess_loss_decides_where_there_is_no_kid() -> None:
    records = [
        replace(record, quality={"excess_loss": record.quality["excess_loss"]})
        for record in (make_record("a", excess=0.004), make_record("b", excess=0.001))
    ]
    (sentence,) = headline(summarise(records))
    assert "b has the lowest excess loss" in sentence


def test_seeds_give_a_mean_a_spread_and_a_hull() -> None:
    records = [make_record(seed=seed, kid=kid) for seed, kid in enumerate((1.0, 2.0, 3.0))]
    ((row,),) = (group.rows for group in summarise(records))
    figure = row.figures["kid_lite0"]
    assert (figure.value, figure.spread, figure.seeds) == (2.0, 1.0, 3)
    assert figure.interval == pytest.approx((0.7, 3.3))
    assert row.figures["ratio, batch 1, eager"].value == pytest.approx(0.85)


def test_a_failed_seed_is_counted_beside_the_measured_ones(tmp_path: Path) -> None:
    write_record(tmp_path, make_record(seed=0))
    write_record(tmp_path, make_record(seed=1, status="cancelled", message="stopped by hand", kid=99.0))
    paths = write_report(tmp_path)
    html = paths.html.read_text(encoding="utf-8")
    assert "1 of 2 seeds" in html and "stopped by hand" in html
    assert "99.00" not in html


def test_what_does_not_compare_is_said() -> None:
    assert notices([make_record("a"), make_record("b")]) == []
    (n,) = notices([make_record("a"), make_record("b", n=100)])
    assert "number of samples (500, 100)" in n
    (off,) = notices([make_record("a", fraction=0.75)])
    assert "a costs 0.750" in off
    (seeds,) = notices([make_record("a"), make_record("a", seed=1), make_record("b")])
    assert "same seeds" in seeds


def test_nothing_measured_still_makes_a_report(tmp_path: Path) -> None:
    write_record(tmp_path, Record(Arm("todo", "w", {"name": "todo"}), 0.6, 0, status="unreachable", message="too dear"))
    html = write_report(tmp_path).html.read_text(encoding="utf-8")
    found = outline(html)
    assert "too dear" in html and "Quality against cost" not in found.headings


def test_missing_and_broken_images(tmp_path: Path) -> None:
    write_record(tmp_path, make_record(images={"samples": "images/a.png"}))
    assert "images/a.png is missing" in write_report(tmp_path).html.read_text(encoding="utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no picture")
    with pytest.raises(DiffratioError, match="not a PNG"):
        write_report(tmp_path)
    (tmp_path / "images" / "a.png").unlink()
    png(tmp_path.parent / "outside.png", 4, 4)
    (tmp_path / "images" / "a.png").symlink_to(tmp_path.parent / "outside.png")
    with pytest.raises(DiffratioError, match="outside"):
        write_report(tmp_path)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib.figure"])
def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    write_record(tmp_path, make_record())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DiffratioError, match=r"pip install diffratio\[report\]"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_higher_is_better_where_the_metric_says_so() -> None:
    name = next(name for name in METRICS if METRICS[name].better == "higher")
    records = [
        replace(make_record(arm), quality={name: {"value": value, "low": value - 1, "high": value + 1}})
        for arm, value in (("a", 10.0), ("b", 20.0))
    ]
    (group,) = groups_of(*records)
    assert list(group.figures(name)) == ["b", "a"] and group.winner(name) == "b"


def test_paired_differences_separate_what_the_intervals_do_not() -> None:
    def arm(name: str, kid: float, paired: bool = True) -> Record:
        record = make_record(name, kid=kid, half=1.0)
        difference = {"value": kid - 1.8, "low": kid - 1.9, "high": kid - 1.7} if paired else None
        return replace(record, quality={**record.quality, "kid_lite0_vs_dense": difference})

    (paired,) = groups_of(arm("a", 2.0), arm("b", 2.5))
    assert paired.winner("kid_lite0") == "a"
    (sentence,) = headline([paired])
    assert "paired on equal noise it lies clear of the next best, b" in sentence
    (partly,) = groups_of(arm("a", 2.0), arm("b", 2.5, paired=False))
    assert partly.winner("kid_lite0") is None


def test_every_metric_of_the_records_gets_its_column(tmp_path: Path) -> None:
    record = make_record("a")
    extra = {"nearest_distance": {"value": 3.21}, "of_tomorrow": {"value": 0.01234}}
    write_record(tmp_path, replace(record, quality={**record.quality, **extra}))
    paths = write_report(tmp_path)
    html = unescape(paths.html.read_text(encoding="utf-8"))
    assert f'title="{METRICS["nearest_distance"].description}"' in html
    assert "Of tomorrow" in html and "0.0123" in html
    markdown = paths.markdown.read_text(encoding="utf-8")
    assert "Nearest distance (higher is better)" in markdown and "3.21" in markdown


def test_the_summary_csv_has_means_and_spread_and_the_other_each_seed(tmp_path: Path) -> None:
    for seed, kid in enumerate((1.0, 2.0, 3.0)):
        write_record(tmp_path, make_record("tome@finetuned", seed=seed, kid=kid))
    paths = write_report(tmp_path)
    with open(paths.summary, encoding="utf-8", newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert row["arm"] == "tome@finetuned" and row["seeds"] == "0 1 2"
    assert (float(row["kid_lite0"]), float(row["kid_lite0.spread"])) == (2.0, 1.0)
    with open(paths.csv, encoding="utf-8", newline="") as handle:
        assert [float(row["quality.kid_lite0.value"]) for row in csv.DictReader(handle)] == [1.0, 2.0, 3.0]


def test_cells_without_a_record_are_named() -> None:
    records = [
        make_record("dense", 1.0), make_record("dense", 1.0, seed=1),
        make_record("a"), make_record("a", seed=1),
        make_record("a", 0.6), make_record("b"), make_record("b", seed=1),
        Record(Arm("b", "w", {"name": "b"}), 0.6, 0, status="unreachable", message="too dear"),
        Record(Arm("b", "w", {"name": "b"}), 0.6, 1, status="unreachable", message="too dear"),
    ]  # fmt: skip
    found = {(gap.arm, gap.budget, gap.status): gap.seeds for gap in gaps(records)}
    assert found == {("b", 0.6, "unreachable"): (0, 1), ("a", 0.6, "no record"): (1,)}
    (gap,) = gaps([make_record("a"), make_record("b", 0.6), make_record("b")])
    assert (gap.arm, gap.budget, gap.message) == ("a", 0.6, "this arm was not run at this budget")


def test_flags_stand_on_top_and_beside_their_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lying = make_record("a"), make_record("b")
    object.__setattr__(lying, "flags", ["MACs under-reported"])
    assert flags([plain, lying]) == [("MACs under-reported", ["b at 0.8"])] and flags([plain]) == []
    monkeypatch.setattr(report, "read_records", lambda folder: [plain, lying])
    paths = write_report(tmp_path)
    html = paths.html.read_text(encoding="utf-8")
    assert html.index("MACs under-reported") < html.index("<h2>Summary")
    assert html.count("⚑ MACs under-reported") == 1 + html.count("More figures")
    assert "Flagged: MACs under-reported" in paths.markdown.read_text(encoding="utf-8").replace("\\", "")


def test_kinds_of_arms() -> None:
    def kind(name: str, method: str) -> str:
        return kind_of(Arm(name, "w", {"name": method}))

    assert kind("dense", "dense") == "dense" and kind("dense_finetuned", "dense") == "control"
    assert kind("diffcr", "diffcr") == "learned" and kind("mod", "mod") == "control"
    assert kind("tome@finetuned", "tome") == "free" and kind("x", "of_another_version") == "free"


def test_samples_of_equal_noise_stand_in_one_figure(trial: tuple[list[Record], ReportPaths]) -> None:
    html = trial[1].html.read_text(encoding="utf-8")
    for budget in ("0.8", "0.6"):
        assert f"At {budget} of the dense MACs, seed 0" in html
    assert html.count("<span>class9</span>") == 2 and "class10" not in html
    assert html.count('alt="Samples of dense"') == 2 and html.count('alt="Samples of tome"') == 2
    assert (trial[1].html.parent / "plots" / "samples-80.png").read_bytes()[:4] == b"\x89PNG"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_compact_form_is_small_and_complete_in_itself(trial: tuple[list[Record], ReportPaths]) -> None:
    compact = trial[1].compact
    assert compact is not None
    text = compact.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) > 8 and all((compact.parent / link).is_file() for link in links)
    assert "did not fit" not in text and "out of memory" in text
    assert size_of(compact.parent) <= COMPACT_LIMIT


def test_what_does_not_fit_into_the_compact_form_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(tmp_path / "images" / "m.png", 400, 200)
    write_record(tmp_path, make_record(images={"masks": ["images/m.png"]}))
    monkeypatch.setattr(report, "COMPACT_LIMIT", 60_000)
    compact = write_report(tmp_path, compact=True).compact
    assert compact is not None and size_of(compact.parent) <= 60_000
    assert not (compact.parent / "images").exists() and (compact.parent / "plots").exists()
    assert re.search(r"[1-9] images? did not fit", compact.read_text(encoding="utf-8"))
