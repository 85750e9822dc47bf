from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dwindle.pipeline.chart_axes import nice_ticks
from dwindle.pipeline.charts import Point, quality_against_size
from dwindle.pipeline.html_report import quality_points, render_html
from dwindle.pipeline.layer_tables import layer_tables
from dwindle.pipeline.step_facts import step_facts
from dwindle.report import Measurement, Report, Sample, Skipped, StepRecord, TargetVerdict

from .sample_report import DISTILLED, adapted_report, planned_report, sample_report

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


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
        if not {"style", "script"} & set(self.open):
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
                 "gate_proj", "no runtime", "version: 1", "12,000,000", "packages · torch", "onnx 1.23",
                 "nats/token", "Pareto front", "Lineage", "sha256 efefefefefef"):  # fmt: skip
        assert said in page.words, said


def test_basis_can_be_told_apart() -> None:
    html = render_html(sample_report())
    assert '<span class="basis measured">measured</span>' in html
    assert '<span class="basis estimated">estimated</span>' in html
    assert re.search(r'class="guess[^"]*"><span class="figure num">400 tokens/s', html)
    assert re.search(r'<td data-label="Decode" class="\s*"><span class="figure num">800 tokens/s', html)


def test_the_speed_on_top_is_of_what_the_run_ended_with() -> None:
    """A model exported in float for comparison may be faster; it is not what was made."""
    report = sample_report(speed=800)
    (measured,) = [t for t in report.targets if t.profile == "host"]
    metrics = tuple(replace(m, value=900.0) if m.name == "tokens_per_second" else m for m in measured.metrics)
    beside = replace(measured, metrics=metrics, variant="float", artifact="export/float/onnx")
    page = Page(render_html(replace(report, targets=(*report.targets, beside))))
    assert re.search(r"Speed\s+800 tokens/s\s+measured on host", page.words)
    alone = Page(render_html(replace(report, targets=(beside,))))
    assert re.search(r"Speed\s+900 tokens/s\s+measured on host, float", alone.words)


def test_failures_stand_at_the_top() -> None:
    report = sample_report(passed=False, speed=3.0)
    html = render_html(report)
    page = Page(html)
    assert "2 gates failed" in page.words
    assert html.index("What failed") < html.index("Before and after every step")
    assert "All gates passed" not in page.words
    assert "missed: >= 30 tokens/s" in page.words


def test_nothing_is_fetched_and_only_our_scripts_run() -> None:
    html = render_html(planned_report())
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    outward = [
        (name, value) for name, value in page.attributes if name in ("src", "srcset", "action") or name[:2] == "on"
    ]
    assert not outward
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in html
    assert "http" not in "".join(scripts)


EVIL = "</title></script><script>alert('x')</script>\"><img src=x onerror=alert(1)>&'<!--"


def test_texts_from_outside_are_escaped() -> None:
    report = planned_report(prefix=f"model.layers{EVIL}")
    report = replace(report, inputs={"teacher": {"model": EVIL, "sha256": EVIL}, "data": {EVIL: {"sha256": EVIL}}},
                     environment={EVIL: EVIL}, skipped=(Skipped(EVIL, EVIL),), samples=(Sample(EVIL, {EVIL: EVIL}),),
                     targets=(TargetVerdict(EVIL, report.targets[0].metrics, EVIL, EVIL),),
                     steps=(*report.steps, replace(report.steps[0], name=EVIL, variant=EVIL, details={EVIL: [EVIL]})),
                     artifacts=tuple(replace(a, path=EVIL, format=EVIL, variant=EVIL) for a in report.artifacts))  # fmt: skip
    html = render_html(report, EVIL, EVIL)
    page = Page(html)
    assert page.tags.count("script") == 3  # the two of the page and one of data
    assert "<img" not in html
    assert "<!--" not in html
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert('x')" in page.words
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)["layers"][0]["name"] == f"model.layers{EVIL}.0.self_attn.q_proj"


def test_adapters_tell_what_they_changed_and_end_no_line() -> None:
    page = Page(render_html(adapted_report()))
    for said in ("Adapters", "recover (onnx) rank 16 · 20 kB · 500k tokens", "60% of what quantization opened is closed",
                 "adapt titles (onnx) rank 8 · 10 kB · 1,200 records · from recovery", "exact match 10.0 % 75.0 %",
                 "KL on general text – 0.3", "variant onnx"):  # fmt: skip
        assert said in page.words, said
    assert "1.42 MB from 8 MB" in page.words  # the recovered model is the end of the line, not the task's
    assert [point.label for point in quality_points(adapted_report())][-1] == "recover (onnx)"


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
    assert "gate_proj" in Page(render_html(report)).words


def test_rows_of_a_quantize_step_are_read() -> None:
    row = {"name": "model.layers.0.mlp.up_proj", "kind": "palettized", "bits": 4, "shape": [100, 80], "bytes": 4010,
           "bits_per_weight": 4.01, "relative_mse": 0.0114}  # fmt: skip
    step = StepRecord("quantize", DISTILLED, DISTILLED, details={"layers": [row, {"name": "no row"}, 3]})
    (table,) = layer_tables(Report(steps=(step,)))
    (layer,) = table.layers
    assert (layer.format, layer.parameters, layer.bits, layer.error) == ("palette4", 8000, 4.01, 0.0114)
    page = Page(render_html(Report(steps=(step,))))
    assert "Rounding error" in page.words
    assert "0.0114" in page.words
    assert layer_tables(Report(steps=(StepRecord("quantize", DISTILLED, DISTILLED, details={"layers": "?"}),))) == []


def test_a_report_of_an_older_version_opens() -> None:
    old = sample_report().to_json()
    del old["samples"], old["environment"], old["inputs"], old["skipped"]
    for step in old["steps"]:
        step["details"] = {"plan": {"schema": 0}, "layers": {"a": 1}}
    for artifact in old["artifacts"]:
        artifact["details"] = {}
    page = Page(render_html(Report.from_json(old)))
    assert "All gates passed" in page.words
    assert not page.open


@pytest.mark.parametrize("spoilt", [{"shape": "?"}, {"bits": 5}, {"group_size": 0}, {"alternatives": [{}]}])
def test_a_plan_that_cannot_be_read_leaves_a_table_without_an_editor(spoilt: dict[str, object]) -> None:
    report = planned_report()
    step = report.steps[-1]
    plan = json.loads(json.dumps(step.details["plan"]))
    plan["layers"][0] |= spoilt
    html = render_html(Report(steps=(replace(step, details={**step.details, "plan": plan}),)))
    assert "data-editor" not in html.split("<script>")[0]
    assert "gate_proj" in Page(html).words


def test_samples_stand_side_by_side() -> None:
    sample = Sample("Once upon", {"teacher": "a time there was", "quantize (onnx)": "a time there is"})
    words = Page(render_html(replace(sample_report(), samples=(sample,)))).words
    assert "Once upon … teacher a time there was quantize (onnx) a time there is" in words


def test_details_of_any_step_are_told() -> None:
    history = [{"step": n, "loss": 2.0 - n / 10} for n in range(5)]
    details = {"rank": 16, "metrics": {"exact_match": 0.75}, "before": {"kl": 0.5}, "losses": history, "tokens": 2_000_000,
               "curve": list(range(40)), "plan": {"a": 1}}  # fmt: skip
    told = step_facts(StepRecord("adapt", DISTILLED, DISTILLED, "apple", details=details))
    assert told.title == "adapt (apple)"
    assert dict(told.facts) == {"rank": "16", "metrics · exact match": "0.75", "before · kl": "0.5",
                                "tokens": "2,000,000", "curve": "40 values, 0 to 39"}  # fmt: skip
    assert told.curve is not None
    assert "Loss over steps" in told.curve.wide


def test_chart_of_one_point_and_of_equal_points() -> None:
    one = Point("teacher", 100, 1.0)
    for points in ([one], [one, replace(one, label="again", made_from=0)]):
        svg = str(quality_against_size(points).svg())
        assert "nan" not in svg
        assert svg.count('r="5.5"') == len(points)
    assert quality_against_size([]).shapes == []


def test_labels_do_not_cover_each_other() -> None:
    points = [Point(f"quantize {i}", 1000 + i, 1.5 + i / 1000, made_from=0 if i else None) for i in range(6)]
    svg = str(quality_against_size([Point("teacher", 9000, 1.0), *points]).svg())
    places = [(float(x), float(y)) for x, y in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert len(set(places)) == 7
    heights = sorted(y for _, y in places)
    assert all(b - a > 3 for a, b in itertools.pairwise(heights)) or len({x for x, _ in places}) > 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.4, 1.5), (0.001, 0.0013), (10, 9000)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


@pytest.mark.parametrize("changes", [{"shape": [{}, 2]}, {"bytes": []}, {"bits_per_weight": {}}, {"parameters": 10**400},
                                     {"shape": [10**20] * 3}])  # fmt: skip
def test_a_layer_of_a_foreign_report_that_makes_no_sense_is_no_row(changes: dict[str, object]) -> None:
    from dwindle.pipeline.layer_tables import _rows

    good = {"shape": [4, 8], "bytes": 16}
    assert [row.name for row in _rows({"good": good, "odd": {**good, **changes}})] == ["good"]
