"""Integer codes in ONNX: bit for bit ours, near the bits stored, and computed in float32 exactly as in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from dwindle.errors import RecipeError
from dwindle.export.onnx_builder import GraphBuilder
from dwindle.export.onnx_graph import export_onnx
from dwindle.export.onnx_quantized import block_size, gather, matmul, planes
from dwindle.export.onnx_runner import OnnxRunner
from dwindle.export.options import ExportOptions
from dwindle.export.parity import ParityLimits, decode_parity, parity_prompts
from dwindle.quantized_model import apply_quantized_weights, quantized_weights
from dwindle.weights import AffineWeight, PalettizedWeight

FLOAT32 = ExportOptions(formats=("onnx",), decode_steps=32)
INT8 = replace(FLOAT32, activations="int8")


PRODUCTS = {
    "self_attn.qkv_proj": [f"self_attn.{part}_proj" for part in "qkv"], "self_attn.o_proj": ["self_attn.o_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj": ["mlp.down_proj"],
}  # fmt: skip
"""Products of a layer of alike linears, and whose rows they hold."""


def affine(weight: torch.Tensor, bits: int, group: int, *, symmetric: bool = True,
           balanced: bool = False) -> AffineWeight:  # fmt: skip
    """Round to nearest; good enough for a test of packing."""
    outputs, inputs = weight.shape
    grouped = weight.detach().view(outputs, inputs // group, group)
    top = 2**bits - 1
    if balanced:
        scales = (grouped.abs().amax(-1) / (top / 2)).clamp(min=1e-4).half()
        zeros = torch.full(scales.shape, top / 2)
    elif symmetric:
        scales = (grouped.abs().amax(-1) / max(1, 2 ** (bits - 1) - 1)).clamp(min=1e-4).half()
        zeros = torch.full(scales.shape, 2.0 ** (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / top).clamp(min=1e-4).half()
        zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top).to(torch.uint8)
    stored = None if symmetric or balanced else zeros.to(torch.uint8)
    return AffineWeight(codes.view(outputs, inputs), scales, stored, bits, group, balanced)


def quantize(bundle: Any, bits: int = 4, group: int = 32, embedding_bits: int | None = 8, *,
             symmetric: bool = True, balanced: bool = False) -> Any:  # fmt: skip
    weights, anatomy = {}, bundle.anatomy
    for name in anatomy.linear_names():
        dense = bundle.model.get_submodule(name).weight
        weights[name] = affine(dense, bits, group or dense.shape[1], symmetric=symmetric, balanced=balanced)
    if embedding_bits:
        table = bundle.model.get_submodule(anatomy.embedding).weight
        weights[anatomy.embedding] = affine(table, embedding_bits, table.shape[1], symmetric=symmetric,
                                            balanced=balanced)  # fmt: skip
    tied = {anatomy.head: anatomy.embedding} if anatomy.tied and embedding_bits else {}
    apply_quantized_weights(bundle.model, weights, tied)
    return bundle


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """The runtime's documented layout, read independently of the code under test: low bits of a byte first."""
    places = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(places, axis=-1).reshape(len(data), -1)


def parity_of(bundle: Any, folder: Path, options: ExportOptions = FLOAT32, limits: ParityLimits | None = None) -> Any:
    folder.mkdir(exist_ok=True)
    export_onnx(bundle, folder, options)
    return decode_parity(bundle, OnnxRunner(folder, threads=1), parity_prompts(bundle, 1, 16), 32, limits)


def test_codes_and_scales_in_the_file_are_ours_bit_for_bit(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = quantize(tiny_bundle("llama"))
    export_onnx(bundle, tmp_path, FLOAT32)
    model = onnx.load(tmp_path / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    nodes = {n.input[1]: n for n in model.graph.node if n.op_type == "MatMulNBits"}
    ours = quantized_weights(bundle.model)
    products = {f"model.layers.{i}.{label}": [f"model.layers.{i}.{part}" for part in parts]
                for i in range(2) for label, parts in PRODUCTS.items()}  # fmt: skip
    for label, names in products.items():
        codes, scales = (torch.cat([getattr(ours[n], part) for n in names]).numpy() for part in ("codes", "scales"))
        node = nodes[f"{label}.weight_Q4"]
        attributes = {a.name: a.i for a in node.attribute}
        outputs, inputs = codes.shape
        assert attributes == {"K": inputs, "N": outputs, "bits": 4, "block_size": 32, "accuracy_level": 1}
        assert stored[node.input[1]].shape == (outputs, inputs // 32, 16)
        assert np.array_equal(unpacked(stored[node.input[1]].reshape(outputs, -1), 4), codes)
        assert stored[f"{label}.scales"].dtype == np.float16
        assert np.array_equal(stored[f"{label}.scales"], scales)
    high, low = (stored[f"model.embed_tokens.weight_Q4{suffix}"] for suffix in ("", "_1"))
    codes = 16 * unpacked(high.reshape(272, -1), 4) + unpacked(low.reshape(272, -1), 4)
    assert np.array_equal(codes, ours["model.embed_tokens"].codes.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_every_bit_width_is_exact(bits: int, symmetric: bool, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = quantize(tiny_bundle("llama"), bits=bits, group=32, symmetric=symmetric)
    parity = parity_of(bundle, tmp_path)
    assert parity.passed, parity


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 0])
def test_balanced_codes_are_exact(bits: int, group: int, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    """Per group and per channel with padding (44 inputs); table and head of the same bits, tied."""
    bundle = tiny_bundle("llama") if group else tiny_bundle("llama", intermediate_size=44)
    parity = parity_of(quantize(bundle, bits=bits, group=group, embedding_bits=bits, balanced=True), tmp_path)
    assert parity.passed, parity


def test_every_layer_may_have_its_own_bits(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("mistral")
    anatomy, weights = bundle.anatomy, {}
    for index, name in enumerate([*anatomy.linear_names(), anatomy.embedding, anatomy.head]):
        dense, kind = bundle.model.get_submodule(name).weight, index % 3
        weights[name] = affine(dense, (2, 4, 8)[kind], dense.shape[1] if index % 2 else 16,
                               symmetric=index % 4 != 1, balanced=index % 4 == 2)  # fmt: skip
    apply_quantized_weights(bundle.model, weights, {})
    parity = parity_of(bundle, tmp_path)
    assert parity.passed, parity
    kinds = {a.i for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "MatMulNBits"
             for a in n.attribute if a.name == "bits"}  # fmt: skip
    assert kinds == {2, 4}


def test_two_bits_are_stored_as_two(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    """The codes as they are, packed four a byte; zero points of one value take no bytes in the file."""
    for balanced in (True, False):
        bundle = quantize(tiny_bundle("llama"), bits=2, group=16, balanced=balanced)
        export_onnx(bundle, tmp_path, FLOAT32)
        stored = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
        ours = quantized_weights(bundle.model)
        for label, parts in PRODUCTS.items():
            data = numpy_helper.to_array(stored[f"model.layers.1.{label}.weight_Q2"])
            codes = torch.cat([ours[f"model.layers.1.{part}"].codes for part in parts])
            assert np.array_equal(unpacked(data.reshape(len(data), -1), 2), codes.numpy())
        assert not any("zero_points" in name for name in stored)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_activations_stay_near_in_every_form(
    bits: int, balanced: bool, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    parity = parity_of(quantize(tiny_bundle("llama"), bits=bits, balanced=balanced), tmp_path, INT8)
    assert parity.max_abs_logit_error <= 0.05 * parity.limits["max_abs_logit"], parity


@pytest.mark.parametrize("bits", [3, 5])
def test_the_runtime_itself_refuses_other_widths(bits: int, tmp_path: Path) -> None:
    """`formats.RUNTIMES` says so; should a later runtime take 3 bits, this fails and the table can grow."""
    import onnxruntime

    with GraphBuilder(tmp_path / "m.onnx", external_data=False) as graph:
        x = graph.input("x", onnx.TensorProto.FLOAT, ["t", 32])
        data = graph.weight("data", lambda: torch.zeros(4, 1, 4 * bits, dtype=torch.uint8))
        y = graph.op("MatMulNBits", x, data, graph.weight("scales", lambda: torch.ones(4, 1)), domain="com.microsoft",
                     K=32, N=4, bits=bits, block_size=32)  # fmt: skip
        graph.output(y, "y", 1, ["t", 4])
        graph.save({})
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="nbits"):
        onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("width", "ffn", "group"), [(32, 64, 16), (64, 128, 64), (32, 44, None), (40, 72, None)])
def test_blocks_per_channel_and_padding(
    width: int, ffn: int, group: int | None, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama", hidden_size=width, intermediate_size=ffn, head_dim=16)
    parity = parity_of(quantize(bundle, bits=8, group=group or 0), tmp_path)
    assert parity.passed, parity


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3", "olmo2"])
def test_families_biases_fused_and_untied(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    parity = parity_of(quantize(tiny_bundle(family)), tmp_path)
    assert parity.passed, parity


def test_float_embedding_under_integer_linears(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    assert parity_of(quantize(tiny_bundle("llama"), embedding_bits=None), tmp_path).passed


def test_int8_activations_use_the_native_eight_bit_form_and_miss_the_float32_gate(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = quantize(tiny_bundle("llama"))
    parity = parity_of(bundle, tmp_path, INT8)
    assert not parity.passed
    assert parity.max_abs_logit_error <= 0.05 * parity.limits["max_abs_logit"], parity
    model = onnx.load(tmp_path / "model.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    codes = stored["model.embed_tokens.weight_Q8"].reshape(272, -1)[:, :32]
    assert np.array_equal(codes, quantized_weights(bundle.model)["model.embed_tokens"].codes.numpy())


def test_the_file_is_near_the_bits_stored(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = quantize(tiny_bundle("llama", hidden_size=256, intermediate_size=512, head_dim=64), group=32)
    export_onnx(bundle, tmp_path, FLOAT32)
    model = onnx.load(tmp_path / "model.onnx")
    weights = sum(len(i.raw_data) for i in model.graph.initializer)
    assert weights <= bundle.size().bytes + 16_000


def test_block_of_a_group() -> None:
    assert block_size(288, 288, 8) == 32
    assert block_size(48, 24, 4) is None
    with pytest.raises(ValueError, match="group_size=24 has no block"):
        planes(affine(torch.ones(2, 48), 4, 24), "float32")


def test_lookup_and_product_read_the_same_numbers(tmp_path: Path) -> None:
    """One shared store, both operators, against dequantize()."""
    import onnxruntime

    table = affine(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)), 8, 40, symmetric=False)
    with GraphBuilder(tmp_path / "m.onnx", external_data=False) as graph:
        ids = graph.input("ids", onnx.TensorProto.INT64, ["b", "t"])
        x = graph.input("x", onnx.TensorProto.FLOAT, ["b", "t", 40])
        graph.output(gather(graph, ids, "e", table, "float32", tied=True), "rows", 1, ["b", "t", 40])
        graph.output(matmul(graph, x, "e", table, "float32"), "y", 1, ["b", "t", 24])
        graph.save({})
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    chosen, vector = np.array([[0, 5, 23]]), np.random.default_rng(0).standard_normal((1, 3, 40)).astype(np.float32)
    rows, y = session.run(None, {"ids": chosen, "x": vector})
    dense = table.dequantize().numpy()
    assert np.abs(rows[0] - dense[[0, 5, 23]]).max() <= 1e-6
    assert np.abs(y - vector @ dense.T).max() <= 1e-5


def test_palettes_and_odd_groups_are_refused_before_any_work(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    name = "model.layers.0.mlp.up_proj"
    palettes = torch.zeros(1, 16, dtype=torch.float16)
    indices = torch.zeros(64, 32, dtype=torch.uint8)
    apply_quantized_weights(bundle.model, {name: PalettizedWeight(indices, palettes, 4, 64)})
    with pytest.raises(RecipeError, match=r"1 weights are palettes: model\.layers\.0\.mlp\.up_proj"):
        export_onnx(bundle, tmp_path, FLOAT32)
    odd = quantize(tiny_bundle("llama"), group=8, embedding_bits=None)
    with pytest.raises(RecipeError, match=r"14 weights have a group_size .* Set group_size=32"):
        export_onnx(odd, tmp_path, FLOAT32)
    assert not list(tmp_path.iterdir())
