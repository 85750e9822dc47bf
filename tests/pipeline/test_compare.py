from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dwindle.errors import RecipeError
from dwindle.pipeline.compare import Comparison, Row, Run, compare_runs, parse_percent
from dwindle.pipeline.comparison_page import comparison_page
from dwindle.pipeline.comparison_text import comparison_markdown, comparison_text
from dwindle.report import Metric, Report, TargetVerdict

from .sample_report import adapted_report, sample_report


def compare_reports(
    before: Report, after: Report, max_regression: float | None = None, metrics: tuple[str, ...] = ()
) -> Comparison:
    return compare_runs([Run("old", before, {}), Run("new", after, {})], max_regression, metrics)


def row(comparison: Comparison, what: str, name: str) -> Row:
    return next(r for r in comparison.rows if (r.what, r.name) == (what, name))


def with_final_nats(report: Report, nats: float | None) -> Report:
    last = report.steps[-1]
    return replace(report, steps=(*report.steps[:-1], replace(last, after=replace(last.after, nats_per_token=nats))))


def test_a_run_equals_itself() -> None:
    same = compare_reports(sample_report(), sample_report(), 0.0)
    assert same.exit_code == 0
    assert all(r.worse[1] in (0.0, None) for r in same.rows)
    json.dumps(same.to_json(), allow_nan=False)


def test_regressions_beyond_the_limit_fail() -> None:
    report = sample_report()
    worse = with_final_nats(report, 1.53 * 1.03)
    assert compare_reports(report, worse).failures == ()
    assert compare_reports(report, worse, 0.05).failures == ()
    (line,) = compare_reports(report, worse, 0.02).failures
    assert line == "quantize (onnx): nats_per_token 1.53 -> 1.576, 3.0% worse (allowed 2.0%)"
    assert compare_reports(worse, report, 0.02).exit_code == 0


def test_runs_of_other_vocabularies_are_judged_by_their_bytes() -> None:
    report = with_final_nats(sample_report(), 1.53)
    first, *others = report.steps
    cut = replace(
        report, steps=(replace(first, details={"vocabulary": [512, 384], "vocabulary_coverage": 1.0}), *others)
    )
    longer = with_final_nats(cut, 9.0)
    assert compare_reports(report, longer, 0.0).failures == ()
    assert (
        row(compare_reports(report, longer), "quantize (onnx)", "nats_per_token").notes[1].startswith("not comparable")
    )
    assert "nats_per_token" in compare_reports(cut, longer, 0.0).failures[0]
    last = longer.steps[-1]
    assert last.after.bits_per_byte is not None
    worse = replace(last, after=replace(last.after, bits_per_byte=last.after.bits_per_byte * 1.1))
    (line,) = compare_reports(report, replace(longer, steps=(*longer.steps[:-1], worse)), 0.02).failures
    assert "bits_per_byte" in line


def test_speed_is_better_when_higher() -> None:
    fast, slow = sample_report(speed=800), sample_report(speed=700)
    assert row(compare_reports(fast, slow), "host, export/onnx", "tokens_per_second").worse[1] == pytest.approx(0.125)
    assert "tokens_per_second" in compare_reports(fast, slow, 0.1).failures[0]
    assert compare_reports(slow, fast, 0.0).exit_code == 0


def test_steps_on_the_way_kl_and_times_are_not_judged() -> None:
    report = sample_report()
    prune = report.steps[0]
    after = replace(prune.after, nats_per_token=9.0)
    other = replace(report, steps=(replace(prune, after=after, seconds=900.0), *report.steps[1:]))
    assert compare_reports(report, other, 0.0).failures == ()


def test_a_number_that_disappeared_fails() -> None:
    report = sample_report()
    assert "not known any more" in compare_reports(report, with_final_nats(report, None), 0.5).failures[0]
    lines = compare_reports(
        report, replace(report, steps=report.steps[:3], artifacts=report.artifacts[:1]), 0.5
    ).failures
    assert any(line.startswith("quantize (onnx): bytes was") for line in lines)
    assert any(line.startswith("artifact export/coreml: bytes was") for line in lines)


def test_an_estimate_is_not_compared_with_a_measurement() -> None:
    report = sample_report()
    host = report.targets[1]
    guessed = TargetVerdict(
        "host", (replace(host.metrics[0], basis="estimated", value=1.0),), host.variant, host.artifact
    )
    found = compare_reports(report, replace(report, targets=(report.targets[0], guessed)), 0.0)
    assert row(found, "host, export/onnx", "tokens_per_second").notes[1] == "not comparable: measured, then estimated"
    assert not any("tokens_per_second" in line for line in found.failures)


def test_repeated_steps_keep_their_turn() -> None:
    report = sample_report()
    twice = replace(report, steps=(*report.steps[:2], report.steps[1]))
    assert {r.what for r in compare_reports(twice, twice).rows} >= {"distill", "distill #2"}


def test_text_shows_both_sides() -> None:
    text = comparison_text(compare_reports(sample_report(speed=800), sample_report(speed=400)))
    assert "800 -> 400" in text
    assert "50.0% worse" in text
    assert "nats_per_token" not in text
    assert "numbers are the same (--all shows them)." in text
    whole = comparison_text(compare_reports(sample_report(speed=800), sample_report(speed=400)), everything=True)
    assert whole.count("nats_per_token") == 2 * 5
    assert comparison_text(compare_reports(Report(), Report())) == "The runs have nothing in common."


@pytest.mark.parametrize("text", ["", "two", "-1%", "2 %%", "1e-2"])
def test_percent_is_checked(text: str) -> None:
    with pytest.raises(RecipeError, match="needed a share"):
        parse_percent(text)


def test_several_runs_are_held_to_the_first() -> None:
    speeds = (800, 790, 400)
    runs = [
        Run(f"run{speed}", sample_report(speed=speed), {"steps": [{"prune": {"ffn_keep": speed}}]}) for speed in speeds
    ]
    found = compare_runs(runs, 0.02)
    assert found.names == ("run800", "run790", "run400")
    assert row(found, "host, export/onnx", "tokens_per_second").values == speeds
    (line,) = found.failures
    assert line.startswith("run400: host, export/onnx: tokens_per_second 800 -> 400, 50.0% worse")
    (asked,) = found.differences
    assert (asked.key, asked.values) == ("recipe.steps.1.prune.ffn_keep", ("800", "790", "400"))
    with pytest.raises(RecipeError, match="two runs or more"):
        compare_runs(runs[:1])


def test_metrics_choose_what_is_judged() -> None:
    report = sample_report(speed=800)
    worse = with_final_nats(sample_report(speed=100), 9.0)
    names = {line.split(": ")[1].split()[0] for line in compare_reports(report, worse, 0.01).failures}
    assert names == {"nats_per_token", "tokens_per_second"}
    (line,) = compare_reports(report, worse, 0.01, ("tokens_per_second",)).failures
    assert "tokens_per_second" in line
    last = report.steps[-1]
    far = replace(report, steps=(*report.steps[:-1], replace(last, after=replace(last.after, kl_nats_per_token=0.2))))
    assert compare_reports(report, far, 0.01).failures == ()
    assert "kl_nats_per_token" in compare_reports(report, far, 0.01, ("kl_nats_per_token",)).failures[0]
    with pytest.raises(RecipeError, match="did you mean 'tokens_per_second'"):
        compare_reports(report, report, 0.01, ("token_per_second",))


def test_what_adapters_do_for_their_tasks_is_judged() -> None:
    good, poor = adapted_report(0.75), adapted_report(0.5)
    found = compare_reports(good, poor, 0.02)
    assert found.failures == ("adapt titles (onnx): exact_match 0.75 -> 0.5, 33.3% worse (allowed 2.0%)",)
    assert not row(found, "adapt titles (onnx)", "general_kl").judged
    assert not row(found, "adapt titles (onnx)", "nats_per_token").judged
    assert row(found, "recover (onnx)", "nats_per_token").judged
    assert compare_reports(poor, good, 0.0).failures == ()


def test_a_metric_of_a_task_on_a_target_is_better_when_higher() -> None:
    def held(value: float) -> Report:
        metric = Metric("task.titles.exact_match", value, "share", "measured")
        return Report(targets=(TargetVerdict("host", (metric,), "onnx", "export/onnx"),))

    assert compare_reports(held(0.5), held(0.6), 0.02).failures == ()
    assert "16.7% worse" in compare_reports(held(0.6), held(0.5), 0.02).failures[0]


def test_markdown_says_what_changed_and_escapes_it() -> None:
    slow = replace(sample_report(speed=400), inputs={"recipe": "a|b <script>"})
    told = comparison_markdown(compare_reports(sample_report(speed=800), slow, 0.02))
    assert "**1 regression of more than 2.0%**" in told
    assert r"| host, export/onnx | tokens_per_second | 800 | 400 | 50.0% worse |" in told
    assert "<script>" not in told
    assert "numbers are the same" in told
    assert "nats_per_token |" not in told
    assert "No regression of more than 2.0%." in comparison_markdown(
        compare_reports(sample_report(), sample_report(), 0.02)
    )


def test_names_of_metrics_from_a_foreign_report_cannot_break_out_of_markdown() -> None:
    report = sample_report()
    step = replace(
        report.steps[-1], name="adapt", details={"task": "t", "metrics_after": {"<b>|x": 0.5, "exact_match": 1}}
    )
    before = replace(report, steps=(*report.steps, replace(step, details={"task": "t"})))
    told = comparison_markdown(compare_reports(before, replace(report, steps=(*report.steps, step)), 0.02))
    assert r"| \<b\>\|x (not judged) |" in told
    assert "| exact_match |" in told


def test_long_keys_stand_in_a_column_of_their_own() -> None:
    key = "recipe.steps.5.validate.budgets.memory"
    found = compare_reports(sample_report(), replace(sample_report(), inputs={"a": "1", key: "2"}), None)
    lines = [line for line in comparison_text(found).splitlines() if " -> " in line and line.startswith("  inputs")]
    assert len(lines) > 1
    assert len({line.index(line.split()[1], 20) for line in lines if line.split()[1] == "\N{EN DASH}"}) == 1


def test_changes_that_nobody_judges_are_no_alarm() -> None:
    slow = tuple(replace(step, seconds=100 * (step.seconds or 1)) for step in sample_report().steps)
    reports = sample_report(), replace(sample_report(), steps=slow)
    runs = [Run(f"run {n}", report, {}) for n, report in enumerate(reports)]
    html = comparison_page(compare_runs(runs, 0.02), runs)
    assert 'class=" aside"><th scope="row">seconds' in html
