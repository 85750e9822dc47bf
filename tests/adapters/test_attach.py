"""An adapter on float linears and on packed codes: without effect at first, PEFT's arithmetic, the base untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.adapters.attach import adapter_config, adapter_tensors, attach, fill, target_names
from dwindle.adapters.merge import merged_weight
from dwindle.adapters.options import AdapterOptions, RecoverOptions
from dwindle.errors import RecipeError
from dwindle.low_rank import LowRank
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
IDS = torch.arange(5, 25)[None]
Factory = Callable[..., Any]


def logits(bundle: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = bundle.model(input_ids=IDS).logits
    return found


def packed(tiny_bundle: Factory, family: str = "llama", scheme: str = "palettize") -> Any:
    return quantized(tiny_bundle(family), QuantizeOptions(scheme=scheme, bits=2))[0]


def adapted(base: Any, **values: Any) -> Any:
    options = AdapterOptions(rank=4, **values)
    return attach(base, adapter_config(base, options, target_names(base, options.targets, options.rank)))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("scheme", [None, "palettize", "integer"])
def test_an_adapter_computes_the_dense_formula_over_codes(tiny_bundle: Factory, kind: str, scheme: str | None) -> None:
    base = tiny_bundle("llama") if scheme is None else packed(tiny_bundle, scheme=scheme)
    before, content = logits(base), base.content_sha256
    bundle = adapted(base, kind=kind, targets=("q", "down"))
    assert torch.allclose(logits(bundle), before, atol=1e-6)
    torch.manual_seed(5)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in adapter_tensors(bundle.model).items()}
    fill(bundle.model, tensors)
    name = "model.layers.1.mlp.down_proj"
    layer = bundle.model.get_submodule(name)
    x = torch.randn(3, layer.in_features)
    change = LowRank(tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"],
                     8 / (2 if kind == "rslora" else 4),
                     tensors.get(f"base_model.model.{name}.lora_magnitude_vector"))  # fmt: skip
    dense = merged_weight(base.model.get_submodule(name).weight.detach(), change)
    torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-5, rtol=1e-4)
    assert (logits(bundle) - before).abs().max() > 1e-3
    assert base.content_sha256 == content
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "qwen3"])
def test_every_family_takes_all_of_its_linears(tiny_bundle: Factory, family: str) -> None:
    base = packed(tiny_bundle, family)
    bundle = adapted(base)
    named = {name.partition(".lora_")[0] for name, p in bundle.model.named_parameters() if p.requires_grad}
    assert named == set(base.anatomy.linear_names())
    assert bundle.size().bits_per_weight_linear == pytest.approx(base.size().bits_per_weight_linear)


def test_codes_are_shared_and_only_the_adapter_learns(tiny_bundle: Factory) -> None:
    base = packed(tiny_bundle)
    bundle = adapted(base)
    name = base.anatomy.linear_names()[0]
    ours = bundle.model.get_submodule(name).base_layer.packed()
    theirs = base.model.get_submodule(name).packed()
    assert all(ours[key].data_ptr() == theirs[key].data_ptr() for key in theirs)
    assert all(p.requires_grad == (".lora_" in n) for n, p in bundle.model.named_parameters())
    assert all(p.requires_grad for p in base.model.parameters())


def test_the_seed_decides_the_start(tiny_bundle: Factory) -> None:
    base = packed(tiny_bundle)
    config = adapter_config(base, AdapterOptions(rank=2), target_names(base, ("q",), 2))
    first, again, other = (adapter_tensors(attach(base, config, seed).model) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_unknown_targets_and_ranks_too_large_are_named(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(
        RecipeError, match=r"2 targets are no linears .*dwn_proj \(nearest: down_proj\).*, qq \(nearest: q"
    ):
        target_names(bundle, ("o", "dwn_proj", "qq"), 2)
    with pytest.raises(RecipeError, match=r"rank=4096 is larger than .*model\.layers\.0\.self_attn\.q_proj \("):
        target_names(bundle, ("q",), 4096)


def test_tensors_of_another_shape_are_refused(tiny_bundle: Factory) -> None:
    bundle = adapted(tiny_bundle("llama"), targets=("q",))
    tensors = {name: tensor[:2] for name, tensor in adapter_tensors(bundle.model).items()}
    with pytest.raises(RecipeError, match=r"tensors do not fit this model: .*lora_A\.weight .*needed"):
        fill(bundle.model, tensors)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AdapterOptions, {"rank": 0, "alpha": -1.0, "kind": "vera", "dropout": 1.0, "targets": ()},
         r"rank=0 .*alpha=-1.0 .*kind='vera' .*targets=\[\] .*dropout=1.0"),
        (RecoverOptions, {"start": "svd"}, r"start='svd' \(needed: zero, error, outputs, fisher"),
        (RecoverOptions, {"start": "error", "kind": "dora"}, "start='error' with kind='dora'"),
        (RecoverOptions, {"temperature": 0.0}, "temperature=0.0"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kind(**values)
