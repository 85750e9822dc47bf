from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.bundle import ModelBundle
from dwindle.errors import UnsupportedModel
from dwindle.quantized_model import (
    PackedModule,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedHead,
    apply_quantized_weights,
    cache_dense,
    is_quantized,
    packed_buffer_names,
    packed_specs,
    quantized_weights,
)
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

Factory = Callable[..., ModelBundle]


def affine(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool = True) -> AffineWeight:
    grouped = weight.view(len(weight), -1, group_size)
    scales = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    codes = (grouped / scales.float()[..., None]).round() + 2 ** (bits - 1)
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).view(weight.shape)
    zeros = None if symmetric else torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return AffineWeight(codes, scales, zeros, bits, group_size)


def palettized(weight: torch.Tensor, bits: int, group_size: int) -> PalettizedWeight:
    groups = weight.view(len(weight) // group_size, -1)
    palettes = torch.quantile(groups, torch.linspace(0.01, 0.99, 2**bits), dim=1).T.half().contiguous()
    indices = (groups[..., None] - palettes.float()[:, None]).abs().argmin(-1)
    return PalettizedWeight(indices.to(torch.uint8).view(weight.shape), palettes, bits, group_size)


def packed(bundle: ModelBundle) -> tuple[Any, dict[str, QuantizedWeight]]:
    """A packed copy of the model: 3-bit palettes in the FFN, asymmetric int4 in attention, int8 embedding and head."""
    model, anatomy = copy.deepcopy(bundle.model), bundle.anatomy
    weights: dict[str, QuantizedWeight] = {}
    for name in anatomy.linear_names():
        dense = model.get_submodule(name).weight.data
        weights[name] = palettized(dense, 3, 16) if "mlp" in name else affine(dense, 4, 8, symmetric=False)
    for name in [anatomy.embedding] + ([] if anatomy.tied else [anatomy.head]):
        weights[name] = affine(model.get_submodule(name).weight.data, 8, anatomy.width)
    apply_quantized_weights(model, weights, {anatomy.head: anatomy.embedding} if anatomy.tied else {})
    return model, weights


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_packed_modules_compute_what_dense_ones_do(family: str, tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(family)
    model, weights = packed(bundle)
    dense = copy.deepcopy(bundle.model)
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight.dequantize()
    assert torch.equal(logits(model), logits(dense))
    assert quantized_weights(model).keys() == weights.keys()
    assert all(torch.equal(w.dequantize(), weights[n].dequantize()) for n, w in quantized_weights(model).items())
    assert packed_specs(model).keys() == weights.keys()
    assert all(spec.items() >= weights[name].spec().items() for name, spec in packed_specs(model).items())
    assert is_quantized(model)
    assert not is_quantized(dense)


def test_a_dense_cache_changes_no_bit(tiny_bundle: Factory) -> None:
    model, _ = packed(tiny_bundle("gemma3_text"))
    without = logits(model)
    cache_dense(model)
    linear = model.model.layers[0].mlp.up_proj
    assert torch.equal(logits(model), without)
    assert linear.weight is linear.weight
    cache_dense(model, enabled=False)
    assert linear.weight is not linear.weight
    assert torch.equal(logits(model), without)


def test_tables_survive_casts_and_moves(tiny_bundle: Factory) -> None:
    model, weights = packed(tiny_bundle("llama"))
    before = logits(model)
    nn.Module.to(model, torch.bfloat16)
    linear = model.model.layers[0].mlp.up_proj
    assert linear.palettes.dtype == torch.float16
    assert torch.equal(linear.palettes, weights["model.layers.0.mlp.up_proj"].palettes)  # type: ignore[union-attr]
    assert model.model.norm.weight.dtype == torch.bfloat16
    nn.Module.to(model, torch.float32)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert logits(model).dtype == before.dtype


def test_a_copied_model_has_its_own_tied_head(tiny_bundle: Factory) -> None:
    model, _ = packed(tiny_bundle("llama"))
    before = logits(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin.lm_head, TiedHead)
    twin.model.embed_tokens.scales.zero_()
    assert torch.equal(logits(model), before)
    assert not logits(twin).any()


def test_stock_from_pretrained_reads_stock_save_pretrained(tiny_bundle: Factory, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("llama", "gemma3_text", "phi3"):
        model, _ = packed(tiny_bundle(family))
        tiny_bundle(family).save(tmp_path / family)
        saved = ModelBundle.load(tmp_path / family)
        packed_bundle = saved.derive(model, "quantize", {}, {})
        packed_bundle.save(tmp_path / f"{family}-packed")
        first, problems = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-packed", output_loading_info=True)
        assert not any(problems[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(logits(first), logits(model))
        first.save_pretrained(tmp_path / f"{family}-again")
        second = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-again", dtype=torch.bfloat16)
        assert torch.equal(logits(second), logits(model))
        assert {second.state_dict()[n].dtype for n in packed_buffer_names(second)} <= {torch.uint8, torch.float16}


Maker = Callable[[tuple[int, int], torch.Generator], QuantizedWeight]


def handmade_palettes(bits: int, rows: int | None, scaled: bool) -> Maker:
    """Random indices into random palettes for `rows` output rows each; None: one palette for the tensor."""

    def make(shape: tuple[int, int], g: torch.Generator) -> PalettizedWeight:
        group = rows or shape[0]
        indices = torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8)
        palettes = (torch.randn(shape[0] // group, 2**bits, generator=g) * 0.1).half()
        scales = (torch.rand(shape[0], generator=g) + 0.5).half() if scaled else None
        return PalettizedWeight(indices, palettes, bits, group, scales)

    return make


def handmade_integers(bits: int, inputs: int | None, kind: str) -> Maker:
    """Random codes with a random scale for `inputs` inputs each; None: one for the row."""

    def make(shape: tuple[int, int], g: torch.Generator) -> AffineWeight:
        group = inputs or shape[1]
        codes = torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8)
        scales = ((torch.rand(shape[0], shape[1] // group, generator=g) + 0.1) / 2**bits).half()
        zeros = torch.randint(0, 2**bits, tuple(scales.shape), generator=g).to(torch.uint8)
        return AffineWeight(codes, scales, zeros if kind == "asymmetric" else None, bits, group, kind == "balanced")

    return make


PALETTES = [handmade_palettes(*form) for form in product((1, 2, 3, 4, 6, 8), (8, 16, 32, None), (False, True))]
INTEGERS = [
    handmade_integers(*form) for form in product((2, 3, 4, 8), (16, 32, None), ("symmetric", "balanced", "asymmetric"))
]
TABLES = [
    *(handmade_palettes(bits, None, False) for bits in (1, 2, 3, 4, 6, 8)),
    *(handmade_integers(bits, None, "symmetric") for bits in (2, 3, 4, 8)),
    handmade_integers(2, None, "balanced"),
    handmade_palettes(4, 16, True),
]


@pytest.mark.parametrize("number", range(len(TABLES)))
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_combination_of_formats_reloads_bit_for_bit(
    family: str, number: int, tiny_bundle: Factory, tmp_path: Path
) -> None:
    """14 linears a model: twelve models of a family hold all 84 formats of linears, and each table once."""
    from transformers import AutoModelForCausalLM

    bundle = tiny_bundle(family, storage_dtype=torch.float16, num_key_value_heads=4)
    model, anatomy, g = copy.deepcopy(bundle.model), bundle.anatomy, torch.Generator().manual_seed(number)
    linears = [*PALETTES, *INTEGERS]
    weights = {
        name: linears[(number * 14 + index) % len(linears)](tuple(model.get_submodule(name).weight.shape), g)
        for index, name in enumerate(anatomy.linear_names())
    }
    for name in [anatomy.embedding] + ([] if anatomy.tied else [anatomy.head]):
        weights[name] = TABLES[number]((anatomy.vocab, anatomy.width), g)
    apply_quantized_weights(model, weights, {anatomy.head: anatomy.embedding} if anatomy.tied else {})
    packed_bundle = bundle.derive(model, "quantize", {}, {})
    packed_bundle.save(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(packed_bundle.model))
    assert packed_specs(again) == packed_specs(packed_bundle.model)
    bits = sum(8 * b.nbytes for m in again.modules() if isinstance(m, PackedModule) for b in m.packed().values())
    assert bits == sum(weight.stored_bits for weight in weights.values())


def test_tie_weights_is_harmless(tiny_bundle: Factory) -> None:
    model, _ = packed(tiny_bundle("llama"))
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


def test_a_packed_model_generates(tiny_bundle: Factory) -> None:
    model, _ = packed(tiny_bundle("llama"))
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).shape[1] > 3


def test_rows_of_an_embedding_are_unpacked_alone() -> None:
    table = torch.randn(50, 12)
    g = torch.Generator().manual_seed(0)
    handmade = [make(tuple(table.shape), g)
                for make in (handmade_palettes(4, None, False), handmade_palettes(8, 10, True),
                             handmade_palettes(1, None, False), handmade_integers(2, 4, "balanced"))]  # fmt: skip
    for weight in (affine(table, 8, 12), affine(table, 4, 4), affine(table, 3, 12), affine(table, 4, 4, False),
                   palettized(table, 2, 10), *handmade):  # fmt: skip
        layer = QuantizedEmbedding.from_weight(weight, output_scale=3.0)
        ids = torch.tensor([[0, 49], [7, 7]])
        assert torch.equal(layer(ids), weight.dequantize()[ids] * 3.0)


def test_a_lookup_never_rebuilds_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    for make in (handmade_palettes(4, None, False), handmade_palettes(4, 10, True), handmade_integers(8, None, "x")):
        layer = QuantizedEmbedding.from_weight(make((50, 12), g))
        monkeypatch.setattr(layer, "quantized_weight", lambda: pytest.fail("the whole table was unpacked"))
        assert layer(torch.tensor([3, 4])).shape == (2, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_stand_where_the_model_does(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("mistral")
    on_host, weights = packed(bundle)
    model = copy.deepcopy(bundle.model).cuda()
    apply_quantized_weights(model, weights, {})
    assert {buffer.device.type for name, buffer in model.named_buffers() if "inv_freq" not in name} == {"cuda"}
    with torch.inference_mode():
        found = model(torch.arange(24, device="cuda").view(2, 12)).logits.cpu()
    assert torch.allclose(found, logits(on_host), atol=1e-3)


def test_linear_with_bias() -> None:
    weight, bias = affine(torch.randn(6, 8), 4, 4), torch.randn(6)
    layer = QuantizedLinear.from_weight(weight, bias)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, weight.dequantize(), bias))
    assert "6x8, affine, bits=4" in repr(layer)
    assert QuantizedLinear.from_weight(weight).bias is None


def test_a_newer_version_is_refused(tiny_bundle: Factory, tmp_path: Path) -> None:
    config = saved_config(tiny_bundle, tmp_path)
    config["quantization_config"]["version"] = 2
    with pytest.raises(UnsupportedModel, match=r"version 2; this dwindle reads version 1"):
        reload_with(config, tmp_path)


def test_a_config_of_another_model_is_refused(tiny_bundle: Factory, tmp_path: Path) -> None:
    config = saved_config(tiny_bundle, tmp_path)
    modules = config["quantization_config"]["modules"]
    modules["model.layers.7.mlp.up_proj"] = modules["model.layers.0.mlp.up_proj"]
    with pytest.raises(UnsupportedModel, match=r"1 modules that the model does not have: model.layers.7.mlp.up_proj"):
        reload_with(config, tmp_path)


def test_unknown_config_keys_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    from dwindle.transformers_quantizer import DwindleConfig

    assert DwindleConfig(colour="red").to_dict()["quant_method"] == "dwindle"
    assert "colour" in caplog.text


def saved_config(tiny_bundle: Factory, folder: Path) -> dict[str, Any]:
    bundle = tiny_bundle("llama")
    bundle.derive(packed(bundle)[0], "quantize", {}, {}).save(folder / "model")
    return dict(json.loads((folder / "model" / "config.json").read_text()))


def reload_with(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    (folder / "model" / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_a_bare_import_is_light_and_enough(tiny_bundle: Factory, tmp_path: Path) -> None:
    """In a fresh process: `import dwindle` loads no torch, and stock transformers then reads the folder."""
    bundle = tiny_bundle("llama", storage_dtype=torch.float16)
    packed_bundle = bundle.derive(packed(bundle)[0], "quantize", {}, {})
    packed_bundle.save(tmp_path / "model")
    torch.save(logits(packed_bundle.model), tmp_path / "logits.pt")
    code = f"""
import sys, warnings
import dwindle
assert not [m for m in ("torch", "transformers", "numpy") if m in sys.modules]
sys.modules["accelerate"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import transformers.quantizers.auto as table
assert type(table.__spec__.loader).__module__ != "dwindle.registration"
dwindle.registration.install()
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
with torch.inference_mode():
    logits = model(torch.arange(24).view(2, 12)).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert not model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_after_transformers_registers_at_once() -> None:
    code = """
import transformers.quantizers.auto as table
import dwindle
assert "dwindle" in table.AUTO_QUANTIZER_MAPPING and "dwindle" in table.AUTO_QUANTIZATION_CONFIG_MAPPING
dwindle.registration.install()
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_adapters_can_train_beside_a_cached_layer() -> None:
    layer = QuantizedLinear.from_weight(affine(torch.randn(6, 8), 4, 4))
    layer.cache_dense = True
    with torch.inference_mode():
        layer(torch.randn(2, 8))
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 8))  # type: ignore[arg-type]


def test_the_embedding_scale_is_the_replaced_modules_own() -> None:
    """transformers moved Gemma 2's scale from the decoder into the embedding: the checkpoint must not hold it."""
    from dwindle.quantized_model import replace_modules

    class Scaled(nn.Embedding):
        scalar_embed_scale = 3.0

    table = affine(torch.randn(10, 8), 8, 8)
    config = {"version": 1, "tied": {}, "modules": {"0": {"role": "embedding", **table.spec()}}}
    for embedding, scale in ((Scaled(10, 8), 3.0), (nn.Embedding(10, 8), 1.0)):
        model = nn.Sequential(embedding)
        replace_modules(model, config)
        model[0].fill(table)
        assert torch.equal(model(torch.arange(10)), table.dequantize() * scale)
    skeleton = nn.Sequential(nn.Embedding(10, 8))
    skeleton[0].register_buffer("embed_scale", torch.tensor(2.0, device="meta"))
    replace_modules(skeleton, config)
    assert skeleton[0].output_scale != skeleton[0].output_scale


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_backward_pass_keeps_no_dense_weight_and_gives_the_dense_gradients(with_bias: bool) -> None:
    torch.manual_seed(0)
    bias = torch.randn(32) if with_bias else None
    layer = QuantizedLinear.from_weight(palettized(torch.randn(32, 48), 4, 16), bias)
    outputs, inputs = layer.out_features, layer.in_features
    x = torch.randn(3, 5, inputs, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert sum(sizes) < outputs * inputs
    assert torch.equal(y.detach(), layer(x.detach()))
    outer = torch.randn_like(y)
    y.backward(outer)
    dense = torch.nn.Linear(inputs, outputs, bias=with_bias)
    dense.weight.data.copy_(layer.weight)
    if bias is not None:
        dense.bias.data.copy_(bias)
    again = x.detach().clone().requires_grad_(True)
    dense(again).backward(outer)
    torch.testing.assert_close(x.grad, again.grad)
    if bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
