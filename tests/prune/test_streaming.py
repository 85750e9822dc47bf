"""A checkpoint that stays on disk is planned and cut as one in memory is, to the last bit."""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dwindle.anatomy import anatomy_of
from dwindle.bundle import ModelBundle
from dwindle.errors import DoesNotFit, GateFailed, OutputError, RecipeError, UnsupportedModel
from dwindle.lineage import Lineage
from dwindle.model_source import attention_of, skeleton_of
from dwindle.prune import KeepPlan, PruneOptions, plan, plan_folder, run, run_folder
from dwindle.prune.folder_bundle import FolderBundle
from dwindle.prune.folder_step import needs_whole_model
from dwindle.prune.keep_plan import weights_sha256
from dwindle.prune.parameters import parameter_names, read_parameter
from dwindle.prune.text_pass import run_pass
from dwindle.shard_writer import ShardWriter
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

Factory = Callable[..., ModelBundle]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
AXES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_keep": 0.5},
    "all": {"ffn_keep": 0.6, "heads_keep": 0.5, "width_keep": 0.75, "layers_keep": 0.6, "rotate": False},
    "magnitude": {"ffn_keep": 0.5, "heads_keep": 0.5, "width_keep": 0.75, "rotate": False, "method": "magnitude"},
}
LISTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def calibration_of(bundle: Any, windows: int = 5, tokens: int = 20) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits(model: Any) -> Tensor:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        found: Tensor = model(ids).logits
    return found


def sharded(folder: Path, most_bytes: int = 20_000) -> None:
    """Cut a saved checkpoint into shards, as published ones are."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    (folder / "model.safetensors").unlink()
    with ShardWriter(folder, len(tensors), most_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, slices of tables and the room for hidden states so small that there are several of each."""
    monkeypatch.setattr("dwindle.prune.calibration_pass._BATCH_TOKENS", 45)
    monkeypatch.setattr("dwindle.prune.parameters._SLICE_ELEMENTS", 1024)
    monkeypatch.setattr("dwindle.prune.text_pass._MEMORY_BYTES", 1000)


@pytest.fixture
def stored(tiny_bundle: Factory, tmp_path: Path) -> Callable[..., Path]:
    """Return the folder of a sharded tiny checkpoint of three layers."""

    def make(family: str = "llama", **overrides: Any) -> Path:
        values = {"num_hidden_layers": 3, "storage_dtype": torch.float16, **LISTS.get(family, {}), **overrides}
        tiny_bundle(family, **values).save(tmp_path / "model")
        sharded(tmp_path / "model")
        return tmp_path / "model"

    return make


def require_equal(bundle: ModelBundle, folder: Path, out: Path, options: PruneOptions, calibration: Any) -> None:
    """Plan, tensors, config, lineage, record and logits are those of the step in memory."""
    expected, record = run(bundle, options, calibration)
    expected.save(out.with_name("expected"))
    ours = run_folder(folder, out, options, calibration, shard_bytes=20_000)
    found = ModelBundle.load(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert found.content_sha256 == expected.content_sha256
    assert found.lineage == expected.lineage
    for file in ("config.json", "generation_config.json", "lineage.json"):
        assert (out / file).read_text() == (out.with_name("expected") / file).read_text()
    assert (ours.before, ours.after, ours.skipped) == (record.before, record.after, record.skipped)
    assert ours.details == record.details
    attention = attention_of(found.model.config)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation=attention)
    assert torch.equal(logits(stock), logits(expected.model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", AXES)
def test_the_folder_is_that_of_the_step_in_memory(
    family: str, axis: str, stored: Callable[..., Path], tmp_path: Path
) -> None:
    folder = stored(family)
    bundle = ModelBundle.load(folder)
    options = PruneOptions(**{"method": "activation", **AXES[axis]}, multiple=8)
    calibration = None if axis == "magnitude" else calibration_of(bundle)
    made = plan_folder(folder, options, calibration)
    assert made == plan(bundle, options, calibration)
    require_equal(bundle, folder, tmp_path / "out", options, calibration)


def test_budgets_depth_alone_and_a_plan_made_before(stored: Callable[..., Path], tmp_path: Path) -> None:
    folder = stored()
    bundle = ModelBundle.load(folder)
    calibration = calibration_of(bundle)
    for options in (
        PruneOptions(parameters=bundle.size().parameters * 3 // 5, multiple=8),
        PruneOptions(bytes=bundle.size().bytes * 4 // 5, multiple=8, compensate=False),
        PruneOptions(layers_keep=0.7),
    ):
        require_equal(bundle, folder, tmp_path / "out", options, calibration)
    options = PruneOptions(ffn_keep=0.5, multiple=8, method="activation")
    made = KeepPlan.from_json(json.loads(json.dumps(plan_folder(folder, options, calibration).to_json())))
    applied = run_folder(folder, tmp_path / "applied", options, keep_plan=made)
    assert applied.details["plan"] == made.to_json()
    assert applied.details["refitted_linears"] == 0
    assert [skipped.what for skipped in applied.skipped] == ["compensation"]
    expected = run(bundle, options, keep_plan=made)[0]
    assert ModelBundle.load(tmp_path / "applied").content_sha256 == expected.content_sha256


def test_a_vocabulary_goes_with_the_rest(stored: Callable[..., Path], tmp_path: Path) -> None:
    for overrides in ({}, {"tie_word_embeddings": False}):
        folder = stored("qwen2", **overrides)
        bundle = ModelBundle.load(folder)
        options = PruneOptions(ffn_keep=0.5, vocabulary_keep=0.97, multiple=4, method="activation")
        require_equal(bundle, folder, tmp_path / "out", options, calibration_of(bundle))
        assert ModelBundle.load(tmp_path / "out").vocabulary_map is not None


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_turned_width(family: str, stored: Callable[..., Path], tmp_path: Path) -> None:
    """The moments behind the axes are float64 sums in another order: equal to rounding, not to the bit."""
    folder = stored(family, storage_dtype=torch.float32, tie_word_embeddings=False)
    bundle = ModelBundle.load(folder)
    options = PruneOptions(width_keep=0.75, ffn_keep=0.5, multiple=8, method="activation")
    calibration = calibration_of(bundle, windows=12)
    expected = run(bundle, options, calibration)[0]
    record = run_folder(folder, tmp_path / "out", options, calibration)
    assert record.details["rotated"]
    found = ModelBundle.load(tmp_path / "out")
    assert torch.allclose(logits(found.model), logits(expected.model), atol=1e-4)


def test_parameters_and_hash_are_those_in_memory(stored: Callable[..., Path]) -> None:
    for family in ("llama", "gemma2", "phi3"):
        folder = stored(family, storage_dtype=torch.bfloat16)
        bundle, opened = ModelBundle.load(folder), FolderBundle.open(folder)
        assert parameter_names(opened) == parameter_names(bundle)
        for name in parameter_names(bundle):
            assert torch.equal(read_parameter(opened, name), read_parameter(bundle, name))
            assert torch.equal(read_parameter(opened, name, 3, 7), read_parameter(bundle, name, 3, 7))
        assert weights_sha256(opened) == weights_sha256(bundle)
        assert all(parameter.is_meta for parameter in opened.model.parameters())


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_a_pass_hears_what_one_in_memory_does(family: str, stored: Callable[..., Path]) -> None:
    folder = stored(family)
    heard: list[dict[str, list[Tensor]]] = []
    for bundle in (ModelBundle.load(folder), FolderBundle.open(folder)):
        values: dict[str, list[Tensor]] = {}

        def note(name: str, values: dict[str, list[Tensor]] = values) -> Callable[..., None]:
            return lambda *given: values.setdefault(name, []).extend(tensor.clone() for tensor in given)

        names = [*bundle.anatomy.parts(0).values(), bundle.anatomy.parts(2)["down"], bundle.anatomy.final_norm]
        run_pass(bundle, calibration_of(bundle), {name: note(name) for name in names}, purpose="listening",
                 layers={1: note("dropped"), 2: note("layer")}, last=note("last"), skipped=[1])  # fmt: skip
        values.pop("dropped", None)  # in memory it is run and its output thrown away
        heard.append(values)
    in_memory, streamed = heard
    assert in_memory.keys() == streamed.keys()
    for name, tensors in in_memory.items():
        assert len(tensors) == 3 * (1 + (name == "layer"))
        assert all(torch.equal(a, b) for a, b in zip(tensors, streamed[name], strict=True)), name


def test_one_layer_is_in_memory_and_its_progress_told(
    stored: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored()
    opened = FolderBundle.open(folder)
    read: list[int] = []
    fill = opened.blocks._fill

    def counted(module: Any, path: str) -> None:
        fill(module, path)
        read.append(sum(p.numel() for p in opened.blocks._model.parameters() if not p.is_meta))

    monkeypatch.setattr(opened.blocks, "_fill", counted)
    options = PruneOptions(ffn_keep=0.5, layers_keep=0.7, multiple=8, method="activation")
    with caplog.at_level(logging.INFO, logger="dwindle"):
        run_folder(opened, tmp_path / "out", options, calibration_of(opened))
    layer = sum(p.numel() for p in opened.model.get_submodule("model.layers.0").parameters())
    assert max(read) == layer
    assert len(read) == 3 + 1 + 2  # layers and final norm to score, kept layers to refit
    assert "prune: scoring, layer 3/3, about 0 s left" in caplog.text
    assert "prune: refitting and cutting, layer 1/2, about" in caplog.text
    with caplog.at_level(logging.INFO, logger="dwindle"):
        run_folder(opened, tmp_path / "plain", replace(options, compensate=False), calibration_of(opened))
    assert "prune: cutting, layer 2/2, about 0 s left" in caplog.text


def random_llama(folder: Path, tokenizer: Any) -> None:
    """Write a Llama of 77 million random weights, tensor by tensor."""
    config = LlamaConfig(vocab_size=272, hidden_size=512, intermediate_size=1408, num_hidden_layers=24,
                         num_attention_heads=8, max_position_embeddings=64)  # fmt: skip
    skeleton = skeleton_of(config)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    names = dict(skeleton.named_parameters())
    with ShardWriter(folder, len(names), 30_000_000) as writer:
        for name, parameter in names.items():
            writer.add(name, torch.randn(parameter.shape, generator=generator).mul_(0.05).half())
    lineage = Lineage.origin("random", {})
    ModelBundle(skeleton, tokenizer, anatomy_of(config), lineage, torch.float16).write_description(folder)


@pytest.fixture
def _freed_at_once() -> Iterator[None]:
    """Let the C library give memory back as it is freed, so that what is resident is what is held (glibc only)."""
    mallopt, threshold = getattr(ctypes.CDLL(None), "mallopt", None), -3
    if mallopt is None:
        pytest.skip("this C library does not say when it gives memory back")
    mallopt(threshold, 1 << 17)
    yield
    mallopt(threshold, 1 << 25)


@pytest.mark.usefixtures("_freed_at_once")
def test_peak_memory_is_that_of_a_layer(
    stored: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored, refitted and cut with less than half of what the model in float32 alone would take."""
    options = PruneOptions(ffn_keep=0.5, heads_keep=0.5, layers_keep=0.5, method="activation")
    tiny = FolderBundle.open(stored())
    run_folder(tiny, tmp_path / "tiny", options, calibration_of(tiny))  # what transformers imports is in memory by now
    monkeypatch.undo()
    random_llama(tmp_path / "random", tiny_tokenizer)
    opened = FolderBundle.open(tmp_path / "random")
    whole = 4 * opened.size().parameters
    before = psutil.Process().memory_info().rss
    record = run_folder(opened, tmp_path / "out", options, calibration_of(opened, windows=8, tokens=64))
    assert record.details["refitted_linears"] == 24
    assert record.peak_rss_bytes - before < whole / 2


def test_what_needs_the_whole_model_is_refused(stored: Callable[..., Path], tmp_path: Path) -> None:
    folder = stored()
    opened = FolderBundle.open(folder)
    calibration = calibration_of(opened)
    for values, named in (
        ({"ffn_keep": 0.5, "method": "taylor"}, "method=taylor"),
        ({"ffn_keep": 0.5, "method": "fisher"}, "method=fisher"),
        ({"ffn_keep": 0.5, "method": "soft_top_k"}, "method=soft_top_k"),
        ({"layers_keep": 0.5, "depth_method": "leave_one_out"}, "depth_method=leave_one_out"),
        ({"parameters": 9000, "depth_method": "leave_one_out"}, "depth_method=leave_one_out"),
    ):
        options = PruneOptions(**values)
        assert needs_whole_model(options, opened.anatomy) == [named]
        with pytest.raises(RecipeError, match=f"{named} needs the whole model in memory"):
            run_folder(opened, tmp_path / "out", options, calibration)
    assert needs_whole_model(PruneOptions(ffn_keep=0.5, depth_method="leave_one_out"), opened.anatomy) == []
    assert not (tmp_path / "out").exists()


def test_experts_are_refused(tiny_bundle: Factory, tmp_path: Path) -> None:
    bundle = tiny_bundle("mixtral")
    bundle.save(tmp_path / "model")
    options = PruneOptions(heads_keep=0.5, method="magnitude")
    made = plan(bundle, options)
    assert needs_whole_model(options, bundle.anatomy) == ["a model with experts (mixtral)"]
    for given in (None, made):
        with pytest.raises(RecipeError, match=r"a model with experts \(mixtral\) needs the whole model in memory"):
            run_folder(tmp_path / "model", tmp_path / "out", options, keep_plan=given)


def test_bad_input_leaves_nothing_behind(tiny_bundle: Factory, stored: Callable[..., Path], tmp_path: Path) -> None:
    folder = stored()
    opened = FolderBundle.open(folder)
    calibration = calibration_of(opened)
    options = PruneOptions(ffn_keep=0.5, multiple=8, method="activation")
    with pytest.raises(DoesNotFit, match="100 parameters cannot be reached"):
        run_folder(folder, tmp_path / "out", PruneOptions(parameters=100), calibration)
    other = plan(tiny_bundle("llama", num_hidden_layers=3, seed=5), options, calibration)
    with pytest.raises(RecipeError, match="made for the model with the weights"):
        run_folder(folder, tmp_path / "out", options, calibration, keep_plan=other)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photos").mkdir()
    with pytest.raises(OutputError, match="photos"):
        run_folder(folder, tmp_path / "taken", options, calibration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken"]


def test_weights_that_are_no_numbers_are_refused(tiny_bundle: Factory, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bundle = tiny_bundle("llama", storage_dtype=torch.float16)
    bundle.save(tmp_path / "model")
    tensors = bundle.stored_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 tensors hold NaN or infinity: model.layers.1.mlp.up_proj.weight"):
        FolderBundle.open(tmp_path / "model")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 0
    tensors["model.layers.1.input_layernorm.weight"][:] = 60000  # times sqrt(4 / 3) beyond float16
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    options = PruneOptions(width_keep=0.75, multiple=8, method="magnitude")
    with pytest.raises(GateFailed, match=r"do not fit into torch.float16: model.layers.1.input_layernorm.weight"):
        run_folder(tmp_path / "model", tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
