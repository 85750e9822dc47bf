"""Every format is decided, shown or refused before any weight is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.quantize import QuantizeOptions
from dwindle.quantize.layer_plan import LayerFormat, ModelShapes, group_size_for, plan_layers, require_storable
from dwindle.weights import AffineWeight, PalettizedWeight

Factory = Callable[..., ModelBundle]


@pytest.mark.parametrize(
    ("scheme", "extent", "group"),
    [
        ("palettize", 64, 16), ("palettize", 24, 12), ("palettize", 40, 20), ("palettize", 172, 43),
        ("palettize", 8, 8), ("palettize", 6, 6), ("palettize", 134, 134), ("palettize", 44, 22),
        ("integer", 64, 32), ("integer", 48, 48), ("integer", 16, 16), ("integer", 80, 16), ("integer", 172, 172),
        ("integer", 112, 16), ("integer", 40, 40), ("integer", 144, 48),
    ],
)  # fmt: skip
def test_the_nearest_group_that_divides(scheme: Any, extent: int, group: int) -> None:
    shape = (extent, 7) if scheme == "palettize" else (7, extent)
    assert group_size_for(scheme, shape) == group


def test_a_layer_of_another_group_is_noted(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama", intermediate_size=172)
    plan = plan_layers(bundle, QuantizeOptions())
    assert plan.notes == (
        "group_size 43 instead of 16 in 4 layers: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj",
    )
    assert {plan.formats[name].group_size for name in bundle.anatomy.linear_names()} == {16, 43}
    plan = plan_layers(bundle, QuantizeOptions(scheme="integer"))
    assert plan.notes == (
        "group_size 172 instead of 32 in 2 layers: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj",
    )
    assert plan_layers(tiny_bundle("llama"), QuantizeOptions()).notes == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 16}, ["4 of 14 layers have a number of output rows", "up_proj (172)", "one of 2, 4, tensor"]),
        ({"scheme": "integer", "group_size": 32},
         ["2 of 14 layers have an input width", "model.layers.1.mlp.down_proj (172)", "one of channel, leave it out"]),
        ({"scheme": "integer", "group_size": 64, "keep_float": "*.down_proj"}, ["12 of 12", "one of 16, 32, channel"]),
    ],
)  # fmt: skip
def test_a_group_that_was_asked_for_is_refused(options: dict[str, Any], words: list[str], tiny_bundle: Factory) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_layers(tiny_bundle("llama", intermediate_size=172), QuantizeOptions(**options))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_wholes(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama", intermediate_size=172)
    plan = plan_layers(bundle, QuantizeOptions(group_size="tensor", row_scales=True))
    assert plan.formats["model.layers.0.mlp.up_proj"] == LayerFormat(
        "model.layers.0.mlp.up_proj", "palettize", 4, 172, row_scales=True
    )
    plan = plan_layers(bundle, QuantizeOptions(scheme="integer", group_size="channel", symmetric=False))
    assert plan.formats["model.layers.0.mlp.down_proj"] == LayerFormat(
        "model.layers.0.mlp.down_proj", "integer", 4, 172, symmetric=False
    )


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_embedding_and_head(family: str, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family)
    ends = ["model.embed_tokens"] if bundle.anatomy.tied else ["model.embed_tokens", "lm_head"]
    plan = plan_layers(bundle, QuantizeOptions(row_scales=True, embedding_scheme="palettize", embedding_bits=6))
    assert [f for f in plan.layers if f.name in ends] == [LayerFormat(name, "palettize", 6, 272) for name in ends]
    plan = plan_layers(bundle, QuantizeOptions(scheme="integer", symmetric=False, embedding_bits=4))
    assert [f for f in plan.layers if f.name in ends] == [LayerFormat(name, "integer", 4, 32) for name in ends]
    assert plan.tied == ({"lm_head": "model.embed_tokens"} if bundle.anatomy.tied else {})


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "olmo2"])
def test_shapes_alone_give_the_same_plan(family: str, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    shapes = ModelShapes.from_anatomy(bundle.anatomy, torch.float16)
    assert shapes == ModelShapes.of(bundle)
    for options in (QuantizeOptions(keep_float=("*.down_proj", "lm_head")), QuantizeOptions(scheme="integer")):
        assert plan_layers(shapes, options) == plan_layers(bundle, options)


def test_stored_bits_are_those_of_the_weight() -> None:
    indices, palettes = torch.zeros(32, 48, dtype=torch.uint8), torch.zeros(2, 8).half()
    for row_scales in (None, torch.ones(32).half()):
        weight = PalettizedWeight(indices, palettes, 3, 16, row_scales)
        assert LayerFormat("x", "palettize", 3, 16, row_scales=row_scales is not None).stored_bits((32, 48)) == (
            weight.stored_bits
        )
    scales = torch.ones(32, 3).half()
    for zeros in (None, torch.zeros(32, 3, dtype=torch.uint8)):
        affine = AffineWeight(indices, scales, zeros, 2, 16)
        assert LayerFormat("x", "integer", 2, 16, symmetric=zeros is None).stored_bits((32, 48)) == affine.stored_bits


def test_other_bits_in_some_layers(tiny_bundle: Factory) -> None:
    plan = plan_layers(tiny_bundle("llama"), QuantizeOptions())
    mixed = plan.with_bits({"model.layers.0.mlp.up_proj": 2, "model.embed_tokens": 4})
    assert mixed.formats["model.layers.0.mlp.up_proj"].bits == 2
    assert mixed.formats["model.layers.0.mlp.up_proj"].group_size == 16
    assert mixed.formats["model.embed_tokens"].bits == 4
    assert sum(a != b for a, b in zip(plan.layers, mixed.layers, strict=True)) == 2
    assert plan.with_bits({}) == plan


def test_bits_that_cannot_be_meant_are_named_at_once(tiny_bundle: Factory) -> None:
    plan = plan_layers(tiny_bundle("llama"), QuantizeOptions())
    with pytest.raises(RecipeError) as caught:
        plan.with_bits({"model.layers.0.mlp.up_proj": 5, "lm_hed": 4, "model.embed_tokens": 6})
    message = str(caught.value)
    assert "3 entries" in message
    assert "lm_hed (not a layer that is quantized)" in message
    assert "up_proj: 5 bits (needed: 1, 2, 3, 4, 6, 8)" in message
    assert "model.embed_tokens: 6 bits (needed: 2, 3, 4, 8)" in message


def test_what_a_runtime_cannot_carry_is_refused_for_all_of_them_at_once(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(RecipeError) as caught:
        plan_layers(bundle, QuantizeOptions(bits=3, row_scales=True, runtimes=("coreml", "coreai-engine", "onnx")))
    message = str(caught.value)
    assert "Core AI (Neural Engine) cannot carry palettes of 3 bits" in message
    assert "row_scales" in message
    assert "MatMulNBits) cannot carry scheme=palettize" in message
    assert "Core ML" not in message
    plan_layers(bundle, QuantizeOptions(bits=2, target_bits_per_weight=3, runtimes=("coreml", "coreai")))


def test_a_mixed_plan_that_no_bits_fit_is_refused(tiny_bundle: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from dwindle.quantize import RUNTIMES

    monkeypatch.setitem(RUNTIMES, "coreai", replace(RUNTIMES["coreai"], palette_bits=(1,)))
    monkeypatch.setitem(RUNTIMES, "coreml", replace(RUNTIMES["coreml"], palette_bits=(2,)))
    options = QuantizeOptions(target_bits_per_weight=3, runtimes=("coreml", "coreai"))
    with pytest.raises(RecipeError) as caught:
        plan_layers(tiny_bundle("llama"), options)
    assert str(caught.value).count("no bits of 1, 2, 3, 4, 6, 8 with scheme=palettize are carried by all") == 1


def test_every_tensor_that_is_not_finite_is_named(tiny_bundle: Factory) -> None:
    """Norms and biases too: they stay float, but the model they are in computes nothing."""
    bundle = tiny_bundle("qwen2")
    layers = bundle.model.model.layers
    layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    layers[1].mlp.up_proj.weight.data[3, 0] = float("-inf")
    layers[1].input_layernorm.weight.data[2] = float("nan")
    layers[0].self_attn.k_proj.bias.data[0] = float("inf")
    layers[0].self_attn.o_proj.weight.data[0, 0] = 1e5
    bundle.model.model.norm.weight.data[0] = 1e6
    with pytest.raises(RecipeError) as caught:
        plan_layers(bundle, QuantizeOptions())
    message = str(caught.value)
    assert "5 of " in message
    for name in ("layers.0.self_attn.q_proj.weight (not finite)", "layers.1.mlp.up_proj.weight (not finite)",
                 "layers.1.input_layernorm.weight (not finite)", "layers.0.self_attn.k_proj.bias (not finite)",
                 "layers.0.self_attn.o_proj.weight (1e+05)"):  # fmt: skip
        assert f"model.{name}" in message


def test_a_stream_of_tensors_is_held_to_the_same() -> None:
    stream = ((name, torch.tensor([value])) for name, value in (("a.weight", 1e5), ("b.weight", 1e5), ("c", 1.0)))
    with pytest.raises(RecipeError, match=r"1 of 3 tensors .*: a\.weight \(1e\+05\)\."):
        require_storable(stream, {"a"})


def test_a_quantized_model_is_refused(tiny_bundle: Factory) -> None:
    shapes = ModelShapes.from_anatomy(tiny_bundle("llama").anatomy, torch.float16, quantized=True)
    with pytest.raises(RecipeError, match="quantized already"):
        plan_layers(shapes, QuantizeOptions())


def test_keep_float_that_matches_nothing_is_refused(tiny_bundle: Factory) -> None:
    with pytest.raises(RecipeError, match=r"keep_float names nothing .*near: model.layers.0.mlp.down_proj\), 'zz'"):
        plan_layers(tiny_bundle("llama"), QuantizeOptions(keep_float=("model.layers.0.mlp.down_prj", "zz")))
