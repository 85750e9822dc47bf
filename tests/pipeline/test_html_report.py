from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dwindle.pipeline.charts import Point, nice_ticks, quality_against_size
from dwindle.pipeline.html_report import render_html
from dwindle.pipeline.layer_tables import layer_tables
from dwindle.report import Measurement, Report, StepRecord

from .sample_report import DISTILLED, LAYERS, sample_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
CLOSED_AT_ONCE = {"line", "circle", "path"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> while {self.open} are open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_page_is_whole_and_says_everything() -> None:
    page = Page(render_html(sample_report(), "A run", "version: 1\n"))
    assert not page.open
    for said in ("A run", "All gates passed", "teacher", "prune", "distill", "variant apple", "variant onnx", "8 MB",
                 "1.6× smaller", "iphone-15-pro", "host", "800 tokens/s", "400 tokens/s", "200 to 600 tokens/s",
                 "held: >= 30 tokens/s", "export/coreml", "not checked", "not known", "battery_share", "21 ms",
                 "gate_proj × 2", "no runtime", "version: 1", "12,000,000", "packages · torch", "onnx 1.23",
                 "nats/token"):  # fmt: skip
        assert said in page.words, said


def test_basis_can_be_told_apart() -> None:
    html = render_html(sample_report())
    assert '<span class="basis measured">measured</span>' in html
    assert '<span class="basis estimated">estimated</span>' in html
    assert re.search(r'class="guess[^"]*"><span class="figure num">400 tokens/s', html)
    assert re.search(r'<td class="\s*"><span class="figure num">800 tokens/s', html)


def test_failures_stand_at_the_top() -> None:
    report = sample_report(passed=False, speed=3.0)
    html = render_html(report)
    page = Page(html)
    assert "2 gates failed" in page.words
    assert html.index("What failed") < html.index("Before and after every step")
    assert "All gates passed" not in page.words
    assert "missed: >= 30 tokens/s" in page.words


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = render_html(sample_report())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name in ("src", "href", "srcset", "action") or name.startswith("on")
    ]
    assert "@import" not in html
    assert not re.findall(r"url\((?!#arrow\))", html)
    assert "default-src 'none'" in html


def test_texts_from_outside_are_escaped() -> None:
    evil = "</title><script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    report = sample_report(name=evil)
    report = replace(report, inputs={"teacher": {"model": evil}}, environment={evil: evil})
    html = render_html(report, evil, evil)
    page = Page(html)
    assert "<script" not in html
    assert "<img" not in html
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.words.replace("&", "&") or "alert('x')" in page.words


def test_an_empty_report_is_a_page() -> None:
    page = Page(render_html(Report()))
    assert "No gate was checked" in page.words
    assert "Nothing was skipped." in page.words
    assert "Before and after" not in page.words


def test_unmeasured_quality_is_a_dash_and_no_point() -> None:
    bare = Measurement(10, 20, 16.0)
    page = Page(render_html(Report(steps=(StepRecord("prune", bare, replace(bare, parameters=5, bytes=10)),))))
    assert "–" in page.words
    assert "Quality against size" not in page.words


def test_layers_come_from_the_artifacts_where_no_step_tells_them() -> None:
    report = sample_report()
    report = replace(report, steps=tuple(replace(s, details={"layers": {"a": "no row"}}) for s in report.steps))
    assert "gate_proj × 2" in Page(render_html(report)).words


def test_rows_of_a_quantize_step_are_read() -> None:
    row = {"name": "model.layers.0.mlp.up_proj", "kind": "palettized", "bits": 4, "shape": [100, 80], "bytes": 4010,
           "bits_per_weight": 4.01, "relative_mse": 0.0114}  # fmt: skip
    step = StepRecord("quantize", DISTILLED, DISTILLED, details={"layers": [row, {"name": "no row"}, 3]})
    (table,) = layer_tables(Report(steps=(step,)))
    (layer,) = table.layers
    assert (layer.format, layer.parameters, layer.bits, layer.error) == ("palette4", 8000, 4.01, 0.0114)
    page = Page(render_html(Report(steps=(step,))))
    assert "Relative error" in page.words
    assert "0.0114" in page.words
    assert layer_tables(Report(steps=(StepRecord("quantize", DISTILLED, DISTILLED, details={"layers": "?"}),))) == []


def test_many_layers_are_folded() -> None:
    many = {f"model.layers.{i}.up_proj": LAYERS["model.layers.0.mlp.up_proj"] for i in range(40)}
    report = Report(steps=(StepRecord("quantize", DISTILLED, DISTILLED, details={"layers": many}),))
    html = render_html(report)
    assert "<details><summary>All 40 layers" in html
    assert "<details open><summary>All 6 layers" in render_html(sample_report())


def test_chart_of_one_point_and_of_equal_points() -> None:
    one = Point("teacher", 100, 1.0)
    for points in ([one], [one, replace(one, label="again", made_from=0)]):
        svg = str(quality_against_size(points))
        assert "nan" not in svg
        assert svg.count("<circle") == len(points)
    assert quality_against_size([]) == ""


def test_labels_do_not_cover_each_other() -> None:
    points = [Point(f"quantize {i}", 1000 + i, 1.5 + i / 1000, made_from=0 if i else None) for i in range(6)]
    svg = str(quality_against_size([Point("teacher", 9000, 1.0), *points]))
    places = [(float(x), float(y)) for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(set(places)) == 7
    heights = sorted(y for _, y in places)
    assert all(b - a > 3 for a, b in itertools.pairwise(heights)) or len({x for x, _ in places}) > 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.4, 1.5), (0.001, 0.0013), (10, 9000)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


@pytest.mark.browser
def test_a_browser_shows_it(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    (tmp_path / "report.html").write_text(render_html(sample_report(), "Shown"), encoding="utf-8")
    quiet = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
             "disable-background-networking", "disable-component-update")  # fmt: skip
    flags = [*(f"--{flag}" for flag in quiet), f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    command = [
        chromium,
        *flags,
        "--window-size=1200,2400",
        f"--screenshot={shot}",
        f"file://{tmp_path / 'report.html'}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 50_000
