from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dwindle.bundle import ModelBundle
from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.errors import DataError, OutputError, RecipeError, UnsupportedModel
from dwindle.families import FAMILIES
from dwindle.model_source import attention_of
from dwindle.quantize import QuantizeOptions, run
from dwindle.quantize.calibration import backward_walk, forward_walk
from dwindle.quantize.layer_plan import LayerFormat, ModelShapes, plan_layers
from dwindle.quantize.methods import Walk, layer_coder
from dwindle.quantize.streaming import joined_rows, quantize_checkpoint
from dwindle.quantized_model import apply_quantized_weights
from dwindle.shard_writer import ShardWriter
from dwindle.streamed_blocks import StreamedBlocks
from dwindle.weight_source import WeightSource

Factory = Callable[..., ModelBundle]


def text(windows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(text(2)).logits
    return found


def sharded(folder: Path, most_bytes: int = 20_000) -> None:
    """Cut a saved checkpoint into shards, as published ones are."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    (folder / "model.safetensors").unlink()
    with ShardWriter(folder, len(tensors), most_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


@pytest.mark.parametrize("family", tuple(FAMILIES))
def test_streamed_blocks_compute_what_the_whole_model_does(family: str, tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle, ids = tiny_bundle(family, storage_dtype=torch.float16), text()
    bundle.save(tmp_path / "model")
    sharded(tmp_path / "model")
    streamed, whole = StreamedBlocks(tmp_path / "model"), InMemoryBlocks(bundle)
    for blocks in (streamed, whole):
        hidden = blocks.embed(ids)
        for layer in range(bundle.anatomy.layers):
            with blocks.block(layer) as module:
                assert not any(parameter.is_meta for parameter in module.parameters())
                with torch.no_grad():
                    hidden = blocks.forward(layer, hidden)
        with torch.no_grad(), blocks.head():
            found = blocks.logits(hidden)
            expected = bundle.model(ids).logits
        assert torch.equal(found, expected)
    assert all(parameter.is_meta for parameter in streamed._model.parameters())
    for walk in (backward_walk, forward_walk):
        for a, b in zip(walk(streamed, ids), walk(whole, ids), strict=True):
            ours, theirs = (x[1] if isinstance(x, tuple) else x.statistics for x in (a, b))
            assert all(torch.equal(ours[name].hessian, theirs[name].hessian) for name in theirs)


@pytest.mark.parametrize("family", tuple(FAMILIES))
@pytest.mark.parametrize("scheme", ["palettize", "integer"])
def test_the_folder_is_that_of_the_in_memory_step(
    family: str, scheme: Any, tiny_bundle: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.quantize.streaming._SLICE_WEIGHTS", 1024)
    tiny_bundle(family, storage_dtype=torch.bfloat16).save(tmp_path / "model")
    sharded(tmp_path / "model")
    bundle = ModelBundle.load(tmp_path / "model")
    options = QuantizeOptions(scheme=scheme, bits=3)
    expected, record = run(bundle, options)
    plan = plan_layers(ModelShapes.stored(WeightSource(tmp_path / "model")), options)
    layers = quantize_checkpoint(tmp_path / "model", tmp_path / "out", plan, layer_coder(options, _cheapest(scheme)),
                                 Walk(), options=asdict(options))  # fmt: skip
    found = ModelBundle.load(tmp_path / "out")
    assert found.content_sha256 == expected.content_sha256
    assert torch.equal(logits(found.model), logits(expected.model))
    assert found.lineage.entries[-1].options == json.loads(json.dumps(asdict(options)))
    assert found.lineage.steps == expected.lineage.steps
    for ours, theirs in zip(layers, record.details["layers"], strict=True):
        assert ours.pop("relative_mse") == pytest.approx(theirs.pop("relative_mse"), rel=1e-4)
        assert ours == theirs
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=attention_of(bundle.model.config)
    )
    assert torch.equal(logits(stock), logits(expected.model))


def _cheapest(scheme: str) -> str:
    return {"palettize": "kmeans", "integer": "rtn"}[scheme]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_calibrated_codes_are_those_of_the_walk_in_memory(
    direction: Any, tiny_bundle: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle, ids = tiny_bundle("gemma2", storage_dtype=torch.float16), text()
    bundle.save(tmp_path / "model")
    options = QuantizeOptions(bits=3, keep_float=("model.layers.1.mlp.down_proj",))
    plan, coder = plan_layers(bundle, options), layer_coder(options, "lnq")
    weights = {}
    blocks = InMemoryBlocks(bundle)
    dense = {layer.name: bundle.model.get_submodule(layer.name).weight.detach() for layer in plan.layers}
    if direction == "forward":
        for block in forward_walk(blocks, ids):
            made = {n: coder(plan.formats[n], dense[n], s) for n, s in block.statistics.items() if n in dense}
            block.continue_with({name: weight.dequantize() for name, weight in made.items()})
            weights |= made
    else:
        for _, statistics in backward_walk(blocks, ids, seed=5):
            weights |= {n: coder(plan.formats[n], dense[n], s) for n, s in statistics.items() if n in dense}
    weights |= {n: coder(plan.formats[n], weight, None) for n, weight in dense.items() if n not in weights}
    apply_quantized_weights(bundle.model, weights, plan.tied)
    with caplog.at_level(logging.INFO, logger="dwindle"):
        quantize_checkpoint(
            tmp_path / "model", tmp_path / "out", plan, coder, Walk(direction, hessian=True), ids, seed=5
        )
    assert torch.equal(logits(ModelBundle.load(tmp_path / "out").model), logits(bundle.model))
    assert f"quantize {len(plan.layers)}/{len(plan.layers)} model.embed_tokens, about 0 s left" in caplog.text


def test_output_is_sharded_and_indexed_when_large(tiny_bundle: Factory, tmp_path: Path) -> None:
    tiny_bundle("qwen2").save(tmp_path / "model")
    options = QuantizeOptions(bits=3, group_size="tensor")
    plan = plan_layers(ModelBundle.load(tmp_path / "model"), options)
    coder = layer_coder(options, "kmeans")
    for name, most in (("one", 10**9), ("many", 4000)):
        quantize_checkpoint(tmp_path / "model", tmp_path / name, plan, coder, Walk(), shard_bytes=most)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    one, many = (ModelBundle.load(tmp_path / name) for name in ("one", "many"))
    assert one.content_sha256 == many.content_sha256
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_written_file_is_aligned_and_readable(tmp_path: Path) -> None:
    given = {"odd": torch.arange(5, dtype=torch.uint8), "half": torch.arange(3).half(), "single": torch.arange(3.0),
             "even": torch.arange(8, dtype=torch.uint8), "brain": torch.ones(2, 4, dtype=torch.bfloat16)}  # fmt: skip
    with ShardWriter(tmp_path, len(given)) as writer:
        for name, tensor in given.items():
            writer.add(name, tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(given)
        for name, tensor in given.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_rows_join_to_what_was_cut() -> None:
    dense = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for options in (
        QuantizeOptions(group_size=4, row_scales=True),
        QuantizeOptions(scheme="integer", group_size=16),
        QuantizeOptions(scheme="integer", group_size=16, symmetric=False),
    ):
        layer = LayerFormat("x", options.scheme, 4, int(options.group_size or 0), options.symmetric, options.row_scales)
        coder = layer_coder(options, _cheapest(options.scheme))
        whole, parts = coder(layer, dense, None), [coder(layer, dense[i : i + 4], None) for i in range(0, 16, 4)]
        assert joined_rows(parts).spec() == whole.spec()
        assert torch.equal(joined_rows(parts).dequantize(), whole.dequantize())


def test_stored_rows_and_extremes(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle("phi3", storage_dtype=torch.bfloat16)
    bundle.save(tmp_path / "model")
    source = WeightSource(tmp_path / "model")
    stored = {name: parameter.detach() for name, parameter in bundle.model.named_parameters()}
    assert set(source.names) == set(stored)
    for name, largest in source.extremes():
        assert torch.equal(source.read(name).float(), stored[name])
        assert float(largest) == float(stored[name].abs().max())
    rows = torch.tensor([3, 0, 271])
    assert torch.equal(source.gather("model.embed_tokens.weight", rows), stored["model.embed_tokens.weight"][rows])
    assert torch.equal(source.read("lm_head.weight", 5, 9).float(), stored["lm_head.weight"][5:9])


def test_refusals_come_before_any_output(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    bundle.save(tmp_path / "model")
    options = QuantizeOptions()
    plan, coder = plan_layers(bundle, options), layer_coder(options, "kmeans")

    def attempt(output: str = "out", walk: Walk = Walk(), ids: Tensor | None = None) -> None:  # noqa: B008  (frozen)
        quantize_checkpoint(tmp_path / "model", tmp_path / output, plan, coder, walk, ids)

    with pytest.raises(DataError, match="24 tokens found"):
        attempt(walk=Walk("backward", fisher=True), ids=text(1))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("x")
    (tmp_path / "taken" / "photos").mkdir()
    with pytest.raises(OutputError, match="photos"):
        attempt("taken")
    with torch.no_grad():
        bundle.model.get_submodule("model.layers.1.self_attn.k_proj").weight[0, 0] = torch.nan
    from safetensors.torch import save_file

    save_file(bundle.stored_tensors(), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model.layers.1.self_attn.k_proj.weight \(not finite\)"):
        attempt()
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_plain_floats_are_refused(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    run(bundle, QuantizeOptions())[0].save(tmp_path / "quantized")
    with pytest.raises(RecipeError, match="is quantized already"):
        WeightSource(tmp_path / "quantized")
    bundle.save(tmp_path / "odd")
    from safetensors.torch import save_file

    tensors = bundle.stored_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors .* no plain floats: model.norm.weight \(I32\)"):
        WeightSource(tmp_path / "odd")
