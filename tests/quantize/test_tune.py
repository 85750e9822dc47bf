from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, RecipeError
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.matching import Matching, pieces_of, training_windows
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.quantize.tune import TunedTables, tune_tables
from dwindle.token_set import TokenSet
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

Factory = Callable[..., ModelBundle]
OPTIONS = QuantizeOptions(tune_steps=12, batch_size=4)


def windows(role: Any = "calibration", count: int = 24, length: int = 32) -> TokenSet:
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, role, "windows", "0" * 64, 1, "1" * 64)


def coded(bundle: ModelBundle, scheme: str = "palettize") -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for name in [*bundle.anatomy.linear_names(), bundle.anatomy.embedding]:
        weight = bundle.model.get_submodule(name).weight.detach()
        found[name] = palettize(weight, 2, 16) if scheme == "palettize" else round_to_nearest(weight, 3, 32)
    return found


def divergence(bundle: ModelBundle, tuned: TunedTables, tokens: TokenSet) -> float:
    """KL of a plain model that holds the dequantized weights and the norms."""
    from copy import deepcopy

    model: Any = deepcopy(bundle.model)
    with torch.no_grad():
        for name, weight in tuned.weights.items():
            model.get_submodule(name).weight.copy_(weight.dequantize())
        for name, value in tuned.norms.items():
            model.get_parameter(name).copy_(value)
        return float(Matching(bundle).divergence(model, tokens.ids))


def codes(weight: QuantizedWeight) -> torch.Tensor:
    return weight.codes if isinstance(weight, AffineWeight) else weight.indices


@pytest.mark.parametrize("scheme", ["palettize", "integer"])
@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_tables_move_towards_the_unquantized_model_and_codes_stay(
    family: str, scheme: str, tiny_bundle: Factory
) -> None:
    bundle, tokens = tiny_bundle(family), windows()
    before = {name: value.clone() for name, value in bundle.model.named_parameters()}
    start = coded(bundle, scheme)
    tuned = tune_tables(bundle, start, tokens, OPTIONS)
    assert tuned.last_kl < 0.98 * tuned.first_kl
    assert tuned.steps > 0
    held = replace(tokens, ids=tokens.ids[7::8])
    assert divergence(bundle, tuned, held) == pytest.approx(tuned.last_kl, rel=1e-4)
    assert divergence(bundle, replace(tuned, weights=start, norms={}), held) == pytest.approx(tuned.first_kl, rel=1e-4)
    for name, weight in tuned.weights.items():
        assert torch.equal(codes(weight), codes(start[name]))
        assert weight.spec() == start[name].spec()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in bundle.model.named_parameters())


def test_norms_are_trained_only_if_asked_for(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("qwen2")
    start = coded(bundle)
    tables_only = tune_tables(bundle, start, windows(), OPTIONS, norms=False)
    assert tables_only.norms == {}
    assert tables_only.last_kl < tables_only.first_kl
    with_norms = tune_tables(bundle, start, windows(), OPTIONS)
    assert set(with_norms.norms) == {n for n, p in bundle.model.named_parameters() if p.dim() == 1}
    assert "model.layers.0.self_attn.q_proj.bias" in with_norms.norms


def test_row_scales_are_tuned_too(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    start = {
        name: PalettizedWeight(w.indices, w.palettes, 2, 16, torch.ones(len(w.indices), dtype=torch.float16))
        for name, w in coded(bundle).items()
        if isinstance(w, PalettizedWeight)
    }
    tuned = tune_tables(bundle, start, windows(), OPTIONS, norms=False)
    assert tuned.last_kl < tuned.first_kl
    assert all(isinstance(w, PalettizedWeight) and not torch.equal(w.row_scales, start[n].row_scales)
               for n, w in tuned.weights.items())  # fmt: skip


def test_a_rate_that_ruins_everything_returns_the_start(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    start = coded(bundle)
    tuned = tune_tables(bundle, start, windows(), replace(OPTIONS, learning_rate=1.0))
    assert (tuned.steps, tuned.last_kl) == (0, tuned.first_kl)
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.dequantize(), start[name].dequantize())
    assert all(torch.equal(value, bundle.model.get_parameter(name)) for name, value in tuned.norms.items())


def test_the_same_call_gives_the_same_bits(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    first, second = (tune_tables(bundle, coded(bundle), windows(), OPTIONS) for _ in range(2))
    assert all(torch.equal(w.dequantize(), second.weights[n].dequantize()) for n, w in first.weights.items())
    assert first.last_kl == second.last_kl


def test_few_windows_are_not_held_back(tiny_bundle: Factory) -> None:
    tuned = tune_tables(tiny_bundle(), coded(tiny_bundle()), windows(count=3), OPTIONS)
    assert tuned.last_kl < tuned.first_kl


def test_evaluation_text_is_refused(tiny_bundle: Factory) -> None:
    with pytest.raises(DataError, match=r"tune_steps trains on this text, and its role is 'evaluation'"):
        tune_tables(tiny_bundle(), coded(tiny_bundle()), windows("evaluation"), OPTIONS)


def test_no_steps_are_refused(tiny_bundle: Factory) -> None:
    with pytest.raises(RecipeError, match="steps=0"):
        tune_tables(tiny_bundle(), coded(tiny_bundle()), windows(), replace(OPTIONS, tune_steps=0))


def test_training_text_may_be_used_as_well() -> None:
    assert training_windows(windows("train"), "qat").role == "train"
    assert training_windows(windows(), "qat").role == "train"


@pytest.mark.parametrize(("batch", "expected"), [(8, 8), (6, 6), (1, 1)])
def test_a_batch_whose_logits_are_large_is_cut(batch: int, expected: int) -> None:
    assert pieces_of(batch, 2048, 152_000) == expected
    assert pieces_of(batch, 32, 256) == 1
