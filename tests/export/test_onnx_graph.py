"""The float ONNX graph: every family equals its stock transformers model, cached, padded, in both file layouts."""

from __future__ import annotations

from collections.abc import Callable
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
from dwindle.export.options import ExportOptions
from dwindle.export.parity import decode_parity, parity_prompts

OPTIONS = ExportOptions(formats=("onnx",))


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


def feeds(ids: np.ndarray, mask: np.ndarray, runner: OnnxRunner, past: dict[str, np.ndarray] | None = None) -> Any:
    """Inputs as transformers builds them for a padded batch: positions count the tokens that are not padding."""
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
    empty = {name: np.repeat(value, len(ids), axis=0) for name, value in runner._empty.items()}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **(past or empty)}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_left_padded_batch_equals_single_rows(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle(family, sliding_window=32) if family != "llama" else tiny_bundle(family)
    runner = exported(bundle, tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 250, (1, n), generator=generator) for n in (12, 5, 9)]
    longest = 11
    ids, mask = np.full((3, longest), 258, np.int64), np.zeros((3, longest), np.int64)
    for i, row in enumerate(rows):
        ids[i, longest - row.shape[1] + 1 :], mask[i, longest - row.shape[1] + 1 :] = row[0, :-1].numpy(), 1
    names = [output.name for output in runner.session.get_outputs()]
    first = dict(zip(names, runner.session.run(None, feeds(ids, mask, runner)), strict=True))
    assert np.isfinite(first["logits"]).all()
    past = {name: first["present" + name.removeprefix("past_key_values")] for name in runner._empty}
    last = np.concatenate([row[:, -1:].numpy() for row in rows])
    second = runner.session.run(
        ["logits"], feeds(last, np.pad(mask, ((0, 0), (0, 1)), constant_values=1), runner, past)
    )
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = bundle.model(input_ids=row, use_cache=False).logits[0].numpy()
        found = np.concatenate([first["logits"][i, longest - row.shape[1] + 1 :], second[0][i]])
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_names_shapes_and_opset(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    exported(bundle, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    inputs = [value.name for value in model.graph.input]
    assert inputs[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs[3:] == [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [value.name for value in model.graph.output] == [
        "logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]  # fmt: skip
    assert {o.domain: o.version for o in model.opset_import} == OPSETS
    metadata = {p.key: p.value for p in model.metadata_props}
    assert metadata == {"dwindle.context_length": "64", "dwindle.source_sha256": bundle.content_sha256}


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
    outside = exported(bundle, tmp_path / "b", ExportOptions(external_data_above_bytes=0))
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
