"""On a real model: every step towards better codes lowers the KL on text that no calibration saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, calibration_set, evaluation_set
from dwindle.measure import Meter
from dwindle.quantize import QuantizeOptions, run

ENDS = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def stories(assets: Path) -> tuple[ModelBundle, Any, Meter]:
    """stories260K, 96 calibration windows of 128 tokens, and a meter on 6,144 other tokens."""
    bundle = ModelBundle.load(assets / "models" / "stories260K")
    text = assets / "data" / "text"
    options = DataOptions(train=(str(text / "tinystories_train.txt"),), calibration_windows=96, context=128)
    calibration = calibration_set(options, bundle.tokenizer, 128)
    evaluation = evaluation_set(text / "tinystories_valid.txt", bundle.tokenizer, max_tokens=6144)
    return bundle, calibration, Meter(evaluation, teacher=bundle, context=128)


@pytest.mark.slow
def test_integers_get_better_step_by_step(stories: tuple[ModelBundle, Any, Meter]) -> None:
    bundle, calibration, meter = stories
    found = []
    for options in (
        QuantizeOptions("integer", bits=2, keep_float=ENDS, method="rtn"),
        QuantizeOptions("integer", bits=2, keep_float=ENDS),
        QuantizeOptions("integer", bits=2, keep_float=ENDS, method="learned", scope="block", iterations=60),
        QuantizeOptions("integer", bits=2, keep_float=ENDS, method="learned", iterations=100),
    ):
        found.append(meter.measure(run(bundle, options, calibration)[0]).kl_nats_per_token or 0.0)
    assert found[0] > 2 * found[1]
    assert found[1] > 1.1 * found[2]
    assert found[1] > 1.5 * found[3]


@pytest.mark.slow
def test_a_mixed_plan_keeps_its_prediction(stories: tuple[ModelBundle, Any, Meter]) -> None:
    bundle, calibration, meter = stories
    uniform = run(bundle, QuantizeOptions(bits=4, group_size="tensor", keep_float=ENDS), calibration)
    options = QuantizeOptions(target_bits_per_weight=4.0, group_size="tensor", keep_float=ENDS)
    mixed, record = run(bundle, options, calibration)
    plan = record.details["plan"]
    assert plan["predicted_kl"] == pytest.approx(plan["measured_kl"], rel=0.2)
    assert mixed.size().bits_per_weight_linear <= 4.0 < uniform[0].size().bits_per_weight_linear
    kl = [meter.measure(b).kl_nats_per_token or 0.0 for b in (mixed, uniform[0])]
    assert kl[0] < 1.1 * kl[1]
