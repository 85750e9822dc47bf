"""The report: round trip, exit code, failures."""

from __future__ import annotations

import json

import pytest

from dwindle.errors import DataError, GateFailed, MissingExtra, offenders
from dwindle.report import Artifact, Measurement, Metric, Parity, Report, Skipped, StepRecord, TargetVerdict

SIZE = Measurement(parameters=10, bytes=5, bits_per_weight=4.0, nats_per_token=1.5)


def parity(passed: bool) -> Parity:
    return Parity(1e-5, 1e-9, 1.0, 64, "onnxruntime", passed)


def full(parity_passed: bool = True, budget_passed: bool | None = True) -> Report:
    metric = Metric("tokens_per_second", 20.0, "tokens/s", "estimated", ">= 30", budget_passed)
    return Report(inputs={"a": 1}).adding(
        steps=(StepRecord("prune", SIZE, SIZE, skipped=(Skipped("layer 3", "width 7"),)),),
        artifacts=(Artifact("onnx", "export/onnx", 7, "00", parity(parity_passed)),),
        targets=(TargetVerdict("pixel-9", (metric,)),),
    )


def test_json_round_trip() -> None:
    report = full()
    assert Report.from_json(json.loads(report.dumps())) == report


def test_schema_and_contract_keys() -> None:
    data = full().to_json()
    assert data["schema"] == 1
    assert {"steps", "artifacts", "targets", "skipped", "exit_code"} <= set(data)
    assert {"parameters", "bytes", "bits_per_weight", "nats_per_token", "bits_per_byte", "kl_nats_per_token",
            "top1_agreement"} <= set(data["steps"][0]["after"])  # fmt: skip
    assert {"name", "variant", "seconds", "peak_rss_bytes", "before", "after"} <= set(data["steps"][0])
    assert {"max_abs_logit_error", "kl_nats_per_token", "top1_agreement", "tokens_checked",
            "executed_by"} <= set(data["artifacts"][0]["parity"])  # fmt: skip
    assert {"name", "value", "unit", "basis", "budget", "passed"} <= set(data["targets"][0]["metrics"][0])
    assert data["skipped"] == [{"what": "layer 3", "why": "width 7"}]


@pytest.mark.parametrize(
    ("report", "code", "told"),
    [
        (full(), 0, ""),
        (full(budget_passed=None), 0, ""),
        (full(parity_passed=False), 1, "parity: onnx"),
        (full(budget_passed=False), 1, "tokens_per_second = 20 tokens/s (estimated), needed >= 30"),
    ],
)
def test_gates_decide_the_exit_code(report: Report, code: int, told: str) -> None:
    assert report.exit_code == code
    assert told in "\n".join(report.failures)


def test_an_unknown_metric_under_a_budget_fails() -> None:
    metric = Metric("tokens_per_second", None, "tokens/s", "estimated", ">= 30", False)
    report = Report(targets=(TargetVerdict("x", (metric,)),))
    assert report.exit_code == 1
    assert "is not known" in report.failures[0]


def test_exit_codes_of_errors() -> None:
    assert DataError("x").exit_code == 2
    assert GateFailed("x").exit_code == 1
    assert "pip install 'dwindle[onnx]'" in str(MissingExtra("ONNX export", "onnx"))
    assert offenders([str(i) for i in range(25)]).endswith("and 5 more")
