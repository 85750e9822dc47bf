"""The float ONNX graph: every family equals its stock transformers model, cached, padded, in both file layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dwindle.anatomy import FAMILIES
from dwindle.errors import RecipeError
from dwindle.export.onnx_builder import OPSETS
from dwindle.export.onnx_graph import export_onnx
from dwindle.export.onnx_runner import OnnxRunner
from dwindle.export.options import ExportOptions, Operators
from dwindle.export.parity import decode_parity, parity_prompts

OPTIONS = ExportOptions(formats=("onnx",), decode_steps=32)


def exported(bundle: Any, folder: Path, options: ExportOptions = OPTIONS) -> OnnxRunner:
    folder.mkdir(exist_ok=True)
    export_onnx(bundle, folder, options)
    return OnnxRunner(folder, threads=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_prefill_and_cached_decode(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle(family)
    runner = exported(bundle, tmp_path)
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 2, 16), 32)
    assert parity.passed, parity
    assert parity.tokens_checked == 2 * 48
    assert parity.max_abs_logit_error <= 1e-5 * parity.limits["max_abs_logit"], parity


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda s: s["rope_type"],
)  # fmt: skip
def test_rope_scalings(scaling: dict[str, Any], tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", rope_scaling=scaling)
    assert decode_parity(bundle, exported(bundle, tmp_path), parity_prompts(bundle, 1, 16), 32).passed


def test_biases_and_partial_rotation(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    biased = tiny_bundle("llama", attention_bias=True, mlp_bias=True)
    assert decode_parity(biased, exported(biased, tmp_path / "a"), parity_prompts(biased, 1, 16), 8).passed
    partial = tiny_bundle("phi3", partial_rotary_factor=0.5)
    assert decode_parity(partial, exported(partial, tmp_path / "b"), parity_prompts(partial, 1, 16), 8).passed


@pytest.mark.parametrize("operators", ["fused", "plain"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3"])
def test_left_padded_batch_equals_transformers(
    family: str, operators: Operators, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """Three unequal prompts, then cached steps, positions and windows of each row its own; windows are outgrown."""
    bundle = tiny_bundle(family)
    session = exported(bundle, tmp_path, replace(OPTIONS, operators=operators)).session
    generator = torch.Generator().manual_seed(0)
    lengths, longest, steps = (14, 5, 9), 14, 4
    ids = torch.randint(0, 250, (3, longest + steps), generator=generator)
    mask = torch.ones(3, longest + steps, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = 258, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = bundle.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    inputs = {value.name: value for value in session.get_inputs()}
    past = {name: np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in inputs.items() if name.startswith("past")}  # fmt: skip
    found = []
    for start, end in [(0, longest), *((i, i + 1) for i in range(longest, longest + steps))]:
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        given = {name: value.numpy() for name, value in feeds.items() if name in inputs}
        logits, *present = session.run(None, {**given, **past})
        past = dict(zip(past, present, strict=True))
        found.append(torch.from_numpy(logits))
    assert torch.isfinite(torch.cat(found, 1)).all()
    real = mask.bool()
    assert float((torch.cat(found, 1) - expected)[real].abs().max()) <= 1e-5 * float(expected[real].abs().max())


@pytest.mark.parametrize("head_dim", [8, 12, 16])
def test_a_head_the_kernel_does_not_take_keeps_the_standard_operator(
    head_dim: int, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """16 is rotated inside the kernel, 8 in front of it, 12 needs the operator of the standard domain."""
    bundle = tiny_bundle("llama", head_dim=head_dim)
    runner = exported(bundle, tmp_path)
    assert decode_parity(bundle, runner, parity_prompts(bundle, 1, 16), 16).passed
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert ("GroupQueryAttention" in kinds, "Attention" in kinds) == (head_dim != 12, head_dim == 12)
    assert ("RotaryEmbedding" in kinds) == (head_dim != 16)


@pytest.mark.parametrize("operators", ["fused", "plain"])
def test_names_shapes_and_opset(operators: Operators, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path, replace(OPTIONS, operators=operators))
    model = onnx.load(tmp_path / "model.onnx")
    inputs = [value.name for value in model.graph.input]
    first = ["input_ids", "attention_mask", *(["position_ids"] if operators == "plain" else [])]
    assert inputs[: len(first)] == first
    assert inputs[len(first) :] == [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [value.name for value in model.graph.output] == [
        "logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]  # fmt: skip
    assert {o.domain: o.version for o in model.opset_import} == OPSETS
    assert {node.domain for node in model.graph.node} == ({"", "com.microsoft"} if operators == "fused" else {""})
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata == {
        "dwindle.context_length": "64", "dwindle.source_sha256": bundle.content_sha256,
        "dwindle.operators": operators, "dwindle.kv_cache": "float32", "dwindle.activations": "float32",
        "dwindle.adapter_inputs": "none",
        "dwindle.minimum_runtime": "onnxruntime 1.24" if operators == "fused" else "onnxruntime 1.23",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_checkpoints_stay_two_bytes_a_weight(
    dtype: torch.dtype, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama", storage_dtype=dtype, hidden_size=64)
    runner = exported(bundle, tmp_path)
    assert decode_parity(bundle, runner, parity_prompts(bundle, 1, 16), 8).passed
    model = onnx.load(tmp_path / "model.onnx")
    weights = sum(len(i.raw_data) for i in model.graph.initializer)
    assert weights <= 1.03 * bundle.size().bytes


def test_external_data_is_byte_for_byte_the_same_model(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("qwen3")
    inside = exported(bundle, tmp_path / "a")
    outside = exported(bundle, tmp_path / "b", replace(OPTIONS, external_data_above_bytes=0))
    assert not (tmp_path / "a" / "model.onnx.data").exists()
    assert (tmp_path / "b" / "model.onnx.data").stat().st_size > (tmp_path / "b" / "model.onnx").stat().st_size
    ids = torch.arange(20)[None]
    assert torch.equal(inside.step(ids), outside.step(ids))


def test_exporting_twice_gives_the_same_file(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        exported(tiny_bundle("gemma2"), tmp_path / name)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_reset_empties_the_cache(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    runner = exported(tiny_bundle("llama"), tmp_path)
    ids = torch.arange(10)[None]
    first = runner.step(ids)
    assert not torch.equal(runner.step(ids), first)
    runner.reset()
    assert torch.equal(runner.step(ids), first)


def test_unknown_activation_is_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", hidden_act="tanh")
    with pytest.raises(RecipeError, match="activation 'tanh' has no graph"):
        export_onnx(bundle, tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())
