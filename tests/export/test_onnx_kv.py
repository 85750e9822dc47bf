"""The KV cache of an ONNX export: its types, the scales of int8, the runner's shared buffers, and a disk that fills."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dwindle.errors import ExportFailed, OutputError, RecipeError
from dwindle.export.onnx_builder import GraphBuilder
from dwindle.export.onnx_graph import export_onnx, onnx_problems
from dwindle.export.onnx_kv import HEADROOM, kv_scales, minimum_runtime
from dwindle.export.onnx_runner import OnnxRunner
from dwindle.export.options import ExportOptions, KVCache, Operators
from dwindle.export.parity import decode_parity, parity_prompts
from dwindle.storage import atomic_folder

OPTIONS = ExportOptions(formats=("onnx",), decode_steps=32)
SHARES = {"float32": 1e-5, "float16": 2e-3, "int8": 0.1}
"""Largest |logit error| over the largest |logit| on random models; trained ones lie below."""


def exported(bundle: Any, folder: Path, options: ExportOptions = OPTIONS) -> OnnxRunner:
    folder.mkdir(exist_ok=True)
    export_onnx(bundle, folder, options)
    return OnnxRunner(folder, threads=1)


@pytest.mark.parametrize(("kind", "operators"), [(kind, form) for kind in SHARES for form in ("fused", "plain")][:-1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "smollm3"])
def test_every_type_follows_the_model(
    family: str, kind: KVCache, operators: Operators, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """All pairs but int8 in plain operators, which is refused; see below."""
    bundle = tiny_bundle(family, head_dim=16)
    runner = exported(bundle, tmp_path, replace(OPTIONS, kv_cache=kind, operators=operators))
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 1, 16), 32)
    assert parity.max_abs_logit_error <= SHARES[kind] * parity.limits["max_abs_logit"], parity
    stored = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}[kind]
    values = [*runner.session.get_inputs(), *runner.session.get_outputs()]
    assert {value.type for value in values if value.name.startswith(("past", "present"))} == {stored}


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_padded_batch_over_a_growing_cache_equals_its_rows(
    kind: KVCache, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """Fed by hand, as a consumer does that keeps no shared buffer; windows of 8 are outgrown."""
    bundle = tiny_bundle("mistral", head_dim=16)
    runner = exported(bundle, tmp_path, replace(OPTIONS, kv_cache=kind))
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 16, dtype=torch.int64)
    ids[1, :5], mask[1, :5] = 258, 0
    past = {name: np.repeat(value, 2, axis=0) for name, value in runner._empty.items()}
    found = []
    for start, end in ((0, 13), (13, 14), (14, 15), (15, 16)):
        feeds = {"input_ids": ids[:, start:end].numpy(), "attention_mask": mask[:, :end].numpy(), **past}
        logits, *present = runner.session.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        found.append(torch.from_numpy(logits))
    whole = torch.cat(found, dim=1)
    for row, padding in ((0, 0), (1, 5)):
        runner.reset()
        expected = torch.cat([runner.step(piece[None]) for piece in torch.split(ids[row, padding:], 1)])
        error = float((whole[row, padding:] - expected).abs().max())
        assert error <= {"float16": 1e-3, "int8": 0.02}[kind] * float(expected.abs().max())


def test_int8_needs_the_kernel(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    options = replace(OPTIONS, kv_cache="int8", operators="plain")
    with pytest.raises(RecipeError, match=r"kv_cache=int8 needs operators=fused \(found plain\)"):
        export_onnx(tiny_bundle("llama"), tmp_path, options)
    found = onnx_problems(tiny_bundle("llama", head_dim=12), replace(OPTIONS, kv_cache="int8"))
    assert "multiple of 8 (found 12)" in found[0]
    assert not list(tmp_path.iterdir())


def test_scales_hold_at_every_position(tiny_bundle: Callable[..., Any]) -> None:
    """A key's two rotated halves share the length of their pair, which no rotation changes."""
    bundle = tiny_bundle("llama", head_dim=16)
    ids = torch.arange(1)[None]
    near = kv_scales(bundle, [ids])
    assert near[0].key.shape == near[0].value.shape == (2, 1, 16)
    assert torch.equal(near[0].key[..., :8], near[0].key[..., 8:])
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        bundle.model(input_ids=ids, position_ids=torch.tensor([[50]]), past_key_values=cache, use_cache=True)
    key, value = cache.layers[0].keys[0], cache.layers[0].values[0]
    pair = torch.hypot(key[..., :8], key[..., 8:])
    assert torch.allclose(near[0].key[..., :8], HEADROOM * pair / 127, rtol=1e-5)
    assert torch.allclose(near[0].value, HEADROOM * value.abs() / 127, rtol=1e-5)


def test_scales_grow_with_the_texts(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("gemma3_text")
    one, two = torch.arange(12)[None], torch.arange(12, 40)[None]
    both, alone = kv_scales(bundle, [one, two]), kv_scales(bundle, [one])
    assert all(bool((both[i].key >= alone[i].key).all()) for i in range(2))
    assert any(bool((both[i].value > alone[i].value).any()) for i in range(2))


def test_the_runners_buffers_grow_and_keep_what_they_hold(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", head_dim=16, max_position_embeddings=600)
    runner = exported(bundle, tmp_path)
    assert runner.context == 600
    ids = torch.randint(0, 250, (1, 600), generator=torch.Generator().manual_seed(0))
    pieces = (250, 1, 1, 3, 1, 1, 200, 1, 100, 42)
    found = torch.cat([runner.step(piece) for piece in torch.split(ids, pieces, dim=1)])
    with torch.no_grad():
        expected = bundle.model(input_ids=ids, use_cache=False).logits[0]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_the_oldest_runtime_is_stated() -> None:
    assert minimum_runtime(OPTIONS) == "onnxruntime 1.24"
    assert minimum_runtime(replace(OPTIONS, operators="plain")) == "onnxruntime 1.23"
    assert minimum_runtime(replace(OPTIONS, kv_cache="int8")) == "onnxruntime 1.28"


def test_a_model_of_someone_else_is_refused(tmp_path: Path) -> None:
    with GraphBuilder(tmp_path / "model.onnx", external_data=False) as graph:
        x = graph.input("x", onnx.TensorProto.FLOAT, ["t"])
        graph.output(graph.op("Neg", x), "y", onnx.TensorProto.FLOAT, ["t"])
        graph.save({})
    with pytest.raises(OutputError, match="does not say its context length"):
        OnnxRunner(tmp_path)
    with pytest.raises(OutputError, match=r"holds no model\.onnx"):
        OnnxRunner(tmp_path / "absent")


def test_what_the_checker_and_the_runtime_refuse_names_operator_and_module(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    with GraphBuilder(tmp_path / "model.onnx", external_data=False) as graph:
        x = graph.input("x", onnx.TensorProto.FLOAT, ["t"])
        graph.output(graph.op("Nagate", x, name="model.layers.0.mlp"), "y", onnx.TensorProto.FLOAT, ["t"])
        with pytest.raises(ExportFailed, match=r"(?s)refuses the graph of model\.onnx: .*Nagate"):
            graph.save({})
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportFailed, match=r"onnxruntime .* refuses .*model\.onnx"):
        OnnxRunner(tmp_path)
    for kind, error in (("fused", "GroupQueryAttention"), ("plain", "Gather")):
        runner = exported(tiny_bundle("llama", head_dim=16), tmp_path / kind, replace(OPTIONS, operators=kind))  # type: ignore[arg-type]
        with pytest.raises(ExportFailed, match=rf"(?s)refuses a step: .*{error}"):
            runner.step(torch.full((1, 70), 0 if kind == "fused" else 999))


@pytest.mark.parametrize("external", [True, False])
def test_a_disk_that_fills_leaves_nothing(
    external: bool, tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, store = [], GraphBuilder._store

    def full(self: GraphBuilder, name: str, tensor: torch.Tensor) -> None:
        if len(stored) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        stored.append(name)
        store(self, name, tensor)

    monkeypatch.setattr(GraphBuilder, "_store", full)
    options = replace(OPTIONS, external_data_above_bytes=0 if external else 1_000_000)
    with pytest.raises(OutputError, match="no space left on the device"), atomic_folder(tmp_path / "onnx") as partial:
        export_onnx(tiny_bundle("llama"), partial, options)
    assert not list(tmp_path.iterdir())
