from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.bundle import ModelBundle
from dwindle.prune import PruneOptions, plan, run
from dwindle.prune.compensation import refit, refitted_readers
from dwindle.prune.head_rows import head_rows
from dwindle.prune.moments import input_moments
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))


def calibration_of(bundle: Any, windows: int = 24, tokens: int = 16) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def seen_by(bundle: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """The input of a linear [tokens, I] in float64."""
    found: list[torch.Tensor] = []
    hook = module(bundle.model, name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].double()))
    with torch.no_grad():
        bundle.model(ids)
    hook.remove()
    return found[0].flatten(0, 1)


def test_moments_are_streamed(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    calibration = calibration_of(bundle)
    names = [bundle.anatomy.parts(layer)[part] for layer in (0, 1) for part in ("down", "o")]
    monkeypatch.setattr("dwindle.prune.calibration_pass._BATCH_TOKENS", 48)
    whole = dict(input_moments(bundle, calibration, names))
    monkeypatch.setattr("dwindle.prune.moments._PASS_BYTES", 40_000)  # one or two linears in a pass
    for name, moment in input_moments(bundle, calibration, names):
        rows = seen_by(bundle, name, calibration.ids)
        assert torch.allclose(moment, rows.T @ rows, rtol=1e-5, atol=1e-5)
        assert torch.equal(moment, whole[name])


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_refitted_weights_are_those_of_least_squares(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    keep = plan(bundle, PruneOptions(ffn_keep=0.5, heads_keep=0.5), calibration)
    found = refitted_readers(bundle, keep, calibration, damping=1e-12)
    assert len(found) == 4
    for layer, one in enumerate(keep.layers):
        parts = bundle.anatomy.parts(layer)
        assert one.kv_groups is not None
        for name, kept in ((parts["down"], list(one.ffn_units or ())),
                           (parts["o"], head_rows(keep.shape, one.kv_groups).tolist())):  # fmt: skip
            rows = seen_by(bundle, name, calibration.ids)
            weight = module(bundle.model, name).weight.detach().double()
            wanted = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
            assert torch.allclose(found[name].double(), wanted, atol=2e-4)


def test_damping_pulls_towards_the_plain_cut() -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(3, 6).double(), torch.randn(40, 6).double()
    rows[:, 5] = rows[:, 0] + rows[:, 2]
    moment, kept = rows.T @ rows, torch.tensor([0, 2, 3])
    plain = weight[:, kept]
    distances = [float((refit(weight, moment, kept, damping) - plain).norm()) for damping in (1e-9, 0.1, 1e6)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4
    exact = refit(weight[:, [0, 2, 5]], moment[[0, 2, 5]][:, [0, 2, 5]], torch.tensor([0, 1]), 1e-12)
    assert torch.allclose(exact, weight[:, [0, 2]] + weight[:, 5:], atol=1e-6)


def test_inputs_that_are_always_zero_leave_the_plain_cut() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0]]).double()
    moment = torch.zeros(3, 3).double()
    moment[2, 2] = 5
    assert refit(weight, moment, torch.tensor([0, 1]), 0.1).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2"])
def test_the_pruned_model_is_the_compensated_reference(tiny_bundle: Any, family: str) -> None:
    """The full model with the cut inputs of down and o masked, and the refitted weights in the kept columns."""
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    options = PruneOptions(ffn_keep=0.5, heads_keep=1.0 if family == "olmo2" else 0.5)
    keep = plan(bundle, options, calibration)
    pruned, record = run(bundle, options, calibration, keep_plan=keep)
    plain, _ = run(bundle, PruneOptions(compensate=False), calibration, keep_plan=keep)
    readers = refitted_readers(bundle, keep, calibration, options.damping)
    assert record.details["refitted_linears"] == len(readers) == (2 if family == "olmo2" else 4)
    with torch.no_grad():
        for one in keep.layers:
            parts = bundle.anatomy.parts(one.layer)
            for name, weight in readers.items():
                if name in (parts["down"], parts["o"]):
                    rows = one.ffn_units if name == parts["down"] else head_rows(keep.shape, one.kv_groups or ())
                    full = module(bundle.model, name).weight
                    full.zero_()[:, list(rows or ()) if isinstance(rows, tuple) else rows] = weight
        wanted = bundle.model(IDS).logits
        assert (pruned.model(IDS).logits - wanted).abs().max() <= 1e-5
        assert (plain.model(IDS).logits - wanted).abs().max() > 1e-2


def test_without_data_the_record_says_that_nothing_was_refitted(tiny_bundle: Any) -> None:
    _, record = run(tiny_bundle(), PruneOptions(ffn_keep=0.5, method="magnitude"))
    assert [skipped.what for skipped in record.skipped] == ["compensation"]
    assert record.details["refitted_linears"] == 0
    _, record = run(tiny_bundle(), PruneOptions(ffn_keep=0.5, method="magnitude", compensate=False))
    assert record.skipped == ()


def test_a_trained_model_loses_less(tmp_path: Path) -> None:
    """On the embedded teacher, FFN and heads cut, nats per token: full < compensated < plain."""
    from dwindle import Meter
    from dwindle.data import DataOptions, calibration_set, evaluation_set
    from dwindle.starter import TEACHER, corpus

    bundle = ModelBundle.load(TEACHER)
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    train.write_text("\n\n".join(corpus(0, 120)))
    valid.write_text("\n\n".join(corpus(1, 10)))
    text = DataOptions(train=(str(train),), context=128, calibration_windows=24)
    calibration = calibration_set(text, bundle.tokenizer, bundle.anatomy.context)
    meter = Meter(evaluation_set(str(valid), bundle.tokenizer, max_tokens=1200), context=128)
    keep = plan(bundle, PruneOptions(ffn_keep=0.34, heads_keep=0.67), calibration)
    found = [meter.measure(bundle).nats_per_token]
    for compensate in (True, False):
        pruned, _ = run(bundle, PruneOptions(compensate=compensate), calibration, keep_plan=keep)
        found.append(meter.measure(pruned).nats_per_token)
    full, compensated, plain = (value for value in found if value is not None)
    assert full < compensated < plain - 0.1
