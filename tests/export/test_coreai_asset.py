"""The saved asset: our codes bit for bit and once, both functions over one set of weights, parity when executed."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwindle.errors import ExportFailed, MissingExtra, OutputError, RecipeError
from dwindle.export import coreai_asset, coreai_weights
from dwindle.export.coreai_asset import ASSET, MINIMUM_OS, PROGRAM, PROGRAM_HASH, CoreAIInfo, export_coreai
from dwindle.export.coreai_runner import CoreAIRunner
from dwindle.export.coreai_weights import coreai_notes, coreai_problems
from dwindle.export.options import ExportOptions
from dwindle.export.parity import ParityLimits, decode_parity, parity_prompts
from dwindle.quantized_model import apply_quantized_weights
from dwindle.storage import hash_folder
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

FLOAT32 = ParityLimits(logit_error_share=1e-5, kl_nats_per_token=1e-10, top1_agreement=1.0)
FLOAT16 = ParityLimits(logit_error_share=5e-3, kl_nats_per_token=1e-5, top1_agreement=0.97)
"""Floats stored in float16, as in Core ML packages."""
AS_SAVED = ParityLimits(logit_error_share=2e-2, kl_nats_per_token=1e-4, top1_agreement=0.9)
"""Sums of float16 numbers in float16; good for tiny widths only."""
DYNAMIC = ExportOptions(decode_steps=12)
STATIC = ExportOptions(decode_steps=12, shapes="static", prefill_tokens=16)
_SEEDS = itertools.count()
"""No two weights are alike: equal constants are kept once."""


def palettes(shape: tuple[int, int], bits: int, rows: int, *, scaled: bool = False) -> PalettizedWeight:
    """Return random indices and sorted random palettes, one of whose values is the smallest fp16 number."""
    made = torch.Generator().manual_seed(next(_SEEDS))
    table = (torch.randn((shape[0] // rows, 2**bits), generator=made) * 0.15).half().sort(dim=1).values
    table[0, 0] = 2.0**-24
    scales = (torch.rand(shape[0], generator=made) + 0.5).half() if scaled else None
    indices = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=made)
    return PalettizedWeight(indices, table, bits, rows, scales)


def integers(shape: tuple[int, int], bits: int, group: int, *, symmetric: bool = True,
             balanced: bool = False) -> AffineWeight:  # fmt: skip
    """Return random codes over their whole range, with random scales and, if asymmetric, zero points."""
    made = torch.Generator().manual_seed(next(_SEEDS))
    scales = ((torch.rand((shape[0], shape[1] // group), generator=made) + 0.5) / 2**bits * 0.4).half()
    zeros = torch.randint(0, 2**bits, tuple(scales.shape), dtype=torch.uint8, generator=made)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=made)
    return AffineWeight(codes, scales, None if symmetric else zeros, bits, group, balanced)


Make = Callable[[tuple[int, int]], QuantizedWeight]
EVERY_FORM: list[Make] = [
    lambda shape: palettes(shape, 2, 8),
    lambda shape: palettes(shape, 4, 16, scaled=True),
    lambda shape: palettes(shape, 6, 16),
    lambda shape: palettes(shape, 8, shape[0]),
    lambda shape: integers(shape, 4, 16),
    lambda shape: integers(shape, 4, shape[1], symmetric=False),
    lambda shape: integers(shape, 8, 8, symmetric=False),
    lambda shape: integers(shape, 8, shape[1]),
    lambda shape: palettes(shape, 4, 16),
]
ENGINE_FORMS: list[Make] = [EVERY_FORM[i] for i in (0, 2, 3, 7, 8)] + [lambda shape: integers(shape, 4, shape[1])]


def packed(bundle: Any, makers: list[Make]) -> dict[str, QuantizedWeight]:
    """Give a tiny bundle packed weights of these kinds in turn, int8 per row in the embedding; return them by name."""
    anatomy = bundle.anatomy
    weights = {name: makers[i % len(makers)](tuple(bundle.model.get_submodule(name).weight.shape))
               for i, name in enumerate(anatomy.linear_names())}  # fmt: skip
    weights[anatomy.embedding] = integers((anatomy.vocab, anatomy.width), 8, anatomy.width)
    apply_quantized_weights(bundle.model, weights, {anatomy.head: anatomy.embedding} if anatomy.tied else {})
    return weights


def stored_codes(weight: QuantizedWeight) -> bytes:
    """Return the bytes that the compiler is documented to keep: two's complement for symmetric integers."""
    tensors = weight.to_tensors()
    if isinstance(weight, PalettizedWeight):
        return tensors["indices"].numpy().tobytes()
    flipped = {4: 0x88, 8: 0x80}[weight.bits] if weight.symmetric else 0
    return (tensors["codes"].numpy() ^ np.uint8(flipped)).tobytes()


def parity(bundle: Any, folder: Path, limits: ParityLimits, steps: int = 12, *, as_saved: bool = False) -> Any:
    runner = CoreAIRunner(folder, as_saved=as_saved)
    return decode_parity(bundle, runner, parity_prompts(bundle, 2, 20), steps, limits, runner.executed_by)


Carried = tuple[Any, dict[str, QuantizedWeight], Path, CoreAIInfo]


@pytest.fixture(scope="module")
def dynamic(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """A tied Qwen3 with every packed form, in the layout for CPU and GPU: (bundle, weights, folder, info)."""
    bundle = tiny_bundle("qwen3", storage_dtype=torch.float16)
    weights, folder = packed(bundle, EVERY_FORM), tmp_path_factory.mktemp("dynamic")
    return bundle, weights, folder, export_coreai(bundle, folder, DYNAMIC)


@pytest.fixture(scope="module")
def static(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """A tied Llama with the Neural Engine's packed forms and scaled positions, in its layout."""
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    bundle = tiny_bundle("llama", storage_dtype=torch.float16, rope_scaling=scaling)
    weights, folder = packed(bundle, ENGINE_FORMS), tmp_path_factory.mktemp("static")
    return bundle, weights, folder, export_coreai(bundle, folder, STATIC)


def test_a_packed_model_decodes_like_the_measured_one(dynamic: Carried) -> None:
    bundle, _, folder, _ = dynamic
    found = parity(bundle, folder, FLOAT32)
    assert found.passed, found
    assert found.executed_by == "Core AI runtime (coreai-core on the CPU), float32; no Neural Engine or GPU was used"


def test_the_static_layout_decodes_like_the_measured_one(static: Carried) -> None:
    bundle, _, folder, _ = static
    found = parity(bundle, folder, FLOAT16)
    assert found.passed, found
    assert "its float16 computed as float32" in found.executed_by


def test_the_static_layout_runs_in_float16_too(static: Carried) -> None:
    bundle, _, folder, _ = static
    found = parity(bundle, folder, AS_SAVED, as_saved=True)
    assert found.passed, found
    assert "CPU), float16" in found.executed_by


@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_codes_are_stored_packed_unchanged_and_once(layout: str, request: pytest.FixtureRequest) -> None:
    """One copy serves both functions, and a tied head."""
    _, weights, folder, _ = request.getfixturevalue(layout)
    program = (folder / ASSET / PROGRAM).read_bytes()
    assert {name: program.count(stored_codes(weight)) for name, weight in weights.items()} == dict.fromkeys(weights, 1)


def test_what_is_checked_is_what_lies_on_disk(dynamic: Carried, tmp_path: Path) -> None:
    bundle, weights, folder, _ = dynamic
    shutil.copytree(folder / ASSET, tmp_path / ASSET)
    path = tmp_path / ASSET / PROGRAM
    codes = stored_codes(weights["model.layers.1.mlp.down_proj"])
    path.write_bytes(path.read_bytes().replace(codes, bytes(len(codes))))
    with pytest.raises(OutputError, match=r"main\.mlirb is not what main\.hash says"):
        CoreAIRunner(tmp_path)
    (tmp_path / ASSET / PROGRAM_HASH).write_bytes(hashlib.sha256(path.read_bytes()).digest())
    assert not parity(bundle, tmp_path, FLOAT32, 4).passed


def test_dynamic_takes_every_length(dynamic: Carried) -> None:
    _, _, folder, info = dynamic
    assert pieces_agree(CoreAIRunner(folder), info.context_length, 1e-4)


def test_static_cuts_every_length_into_its_own(static: Carried) -> None:
    """Padding of a last piece leaves no trace, and the end of the context is reached token by token."""
    _, _, folder, info = static
    runner = CoreAIRunner(folder)
    assert runner.prefill_tokens == 16
    assert pieces_agree(runner, info.context_length, 1e-4)


def pieces_agree(runner: CoreAIRunner, context: int, tolerance: float) -> bool:
    """Return whether a whole context at once, in pieces, and after a reset gives the same logits."""
    ids = torch.randint(0, 250, (1, context), generator=torch.Generator().manual_seed(3))
    whole = runner.step(ids)
    runner.reset()
    pieces = torch.cat([runner.step(part) for part in ids.split([1, 5, 1, 20, 1, context - 28], dim=1)])
    assert whole.shape == (context, 272)
    with pytest.raises(RecipeError, match=f"context of {context} tokens; {context + 1} were fed"):
        runner.step(ids[:, :1])
    return torch.allclose(whole, pieces, atol=tolerance)


def test_a_loop_that_runs_already_may_call(dynamic: Carried) -> None:
    import asyncio

    async def fed() -> torch.Tensor:
        return CoreAIRunner(dynamic[2]).step(torch.tensor([[1, 2, 3]]))

    assert asyncio.run(fed()).shape == (3, 272)


def test_metadata_says_what_it_is(dynamic: Carried) -> None:
    from coreai.authoring import AIModelAsset

    bundle, _, folder, info = dynamic
    asset = AIModelAsset.load(folder / ASSET)
    described = asset.metadata
    assert described.author == "dwindle"
    assert described.license
    assert "position_ids are 0 .. past + T - 1" in described.model_description
    own = described.creator_defined_metadata
    assert own["dwindle.context_length"] == "64"
    assert own["dwindle.source_sha256"] == bundle.content_sha256
    assert own["dwindle.minimum_os"] == info.minimum_os == MINIMUM_OS
    assert "palettized 4-bit group 16" in own["dwindle.quantization"]
    summary = asset.summary(include_statistics=True)
    assert sorted(summary.function_names) == ["decode", "prefill"]
    kinds = {kind.strip("()").split(", ")[0] for kind in map(str, summary.storage_types)}
    assert {"UInt2", "UInt4", "UInt6", "UInt8", "Int4", "Int8"} <= {str(kind).strip("('") for kind in kinds}
    assert info.bytes == sum(path.stat().st_size for path in (folder / ASSET).iterdir())
    assert info.counted_bytes == bundle.size().bytes


def test_a_second_export_is_the_same_folder_and_all_is_silent(
    static: Carried, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle, _, folder, _ = static
    export_coreai(bundle, tmp_path, STATIC)
    assert hash_folder(tmp_path) == hash_folder(folder)
    CoreAIRunner(tmp_path).step(torch.tensor([[1, 2, 3]]))
    assert hash_folder(tmp_path) == hash_folder(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("family", "options"), [("gemma3_text", DYNAMIC), ("gemma2", STATIC)])
def test_float_families_decode_like_torch(
    family: str, options: ExportOptions, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """Windows, soft caps, norms of queries and keys; floats are kept once for both functions and the tied head."""
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    decodes_like_torch(bundle, options, tmp_path)
    kept = torch.float32 if options.shapes == "dynamic" else torch.float16
    table = bundle.model.get_submodule(bundle.anatomy.embedding).weight.detach().to(kept).numpy().tobytes()
    assert (tmp_path / ASSET / PROGRAM).read_bytes().count(table) == 1


def decodes_like_torch(bundle: Any, options: ExportOptions, folder: Path) -> None:
    export_coreai(bundle, folder, options)
    found = parity(bundle, folder, FLOAT32 if options.shapes == "dynamic" else FLOAT16)
    assert found.passed, found


@pytest.mark.slow
@pytest.mark.parametrize("options", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3",
                                    "olmo2"])  # fmt: skip
def test_all_families_in_both_layouts(
    family: str, options: ExportOptions, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    decodes_like_torch(tiny_bundle(family, storage_dtype=torch.float16), options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
])  # fmt: skip
def test_scaled_rotary_embeddings(scaling: dict[str, Any], tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama", rope_scaling=scaling)
    export_coreai(bundle, tmp_path, DYNAMIC)
    assert parity(bundle, tmp_path, FLOAT32).passed


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ExportOptions(decode_steps=32), ExportOptions(decode_steps=32, shapes="static")], ids=["dynamic", "static"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["stories260K", "pycode-6m"])
def test_trained_models_decode_like_torch(name: str, options: ExportOptions, assets: Path, tmp_path: Path) -> None:
    from dwindle.bundle import ModelBundle

    bundle = ModelBundle.load(assets / "models" / name)
    options = options.resolved(bundle.anatomy)
    export_coreai(bundle, tmp_path, options)
    limits = FLOAT32 if options.shapes == "dynamic" else FLOAT16
    found = decode_parity(
        bundle, CoreAIRunner(tmp_path), parity_prompts(bundle, 2, options.parity_lengths()[0]), 32, limits
    )
    assert found.passed, found


@pytest.mark.slow
@pytest.mark.parametrize(("options", "make", "ratio"), [
    (DYNAMIC, lambda shape: integers(shape, 4, 32), 1.16),
    (STATIC, lambda shape: palettes(shape, 4, 16), 1.04),
], ids=["int4 in blocks", "palettes"])  # fmt: skip
def test_an_asset_weighs_little_more_than_its_codes(
    options: ExportOptions, make: Make, ratio: float, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """float32 scales cost the dynamic layout 16 bits a block; the two programs weigh about 65 kB a pair of layers."""
    bundle = tiny_bundle("llama", storage_dtype=torch.float16, hidden_size=512, intermediate_size=2048)
    weights = packed(bundle, [make])
    info = export_coreai(bundle, tmp_path, options)
    codes = sum(weight.stored_bits for weight in weights.values()) // 8
    assert codes < info.bytes < ratio * codes


def test_what_the_converter_gives_up_on_is_named(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama", num_hidden_layers=1)
    packed(bundle, ENGINE_FORMS)

    def lowered(values: Any, node: Any, location: Any) -> Any:
        if "down_proj" in node.args[0]:
            raise ValueError("no such form")
        return coreai_weights.weight_lowering(bundle.model)(values, node, location)

    monkeypatch.setattr(coreai_asset, "weight_lowering", lambda _model: lowered)
    named = r"on dwindle\.coreai_weight\.default in decoder\.model\.layers\.0\.mlp\.down_proj: no such form"
    with pytest.raises(ExportFailed, match=named):
        export_coreai(bundle, tmp_path, STATIC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("broken", "named"), [
    (lambda x: x.float_power(2.0).cumprod(-1).float(), r"on aten\.cumprod\.default in decoder\.model\.layers\.0\.mlp"),
    (lambda x: x[int(x.sum())], r"in decoder\.model\.layers\.0\.mlp: "),
], ids=["an operator it does not know", "values that decide"])  # fmt: skip
def test_what_a_module_does_wrong_is_named(
    broken: Callable[[torch.Tensor], torch.Tensor], named: str, tiny_bundle: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dwindle.export import decoder

    monkeypatch.setitem(decoder._ACTIVATIONS, "silu", broken)
    with pytest.raises(ExportFailed, match=named):
        export_coreai(tiny_bundle("llama", num_hidden_layers=1), tmp_path, STATIC)


def test_forms_that_core_ai_does_not_store_are_refused_all_at_once(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama")
    parts = bundle.anatomy.parts(0)
    weights = {parts["q"]: palettes((32, 32), 3, 16), parts["o"]: palettes((32, 32), 1, 16),
               parts["up"]: integers((64, 32), 2, 32), parts["gate"]: integers((64, 32), 8, 32, balanced=True)}  # fmt: skip
    apply_quantized_weights(bundle.model, weights, {})
    with pytest.raises(RecipeError) as refusal:
        export_coreai(bundle, tmp_path, DYNAMIC)
    message = str(refusal.value)
    assert "2 palettized weights" in message
    assert "model.layers.0.self_attn.q_proj (3 bits), model.layers.0.self_attn.o_proj (1 bits)" in message
    assert "1 affine weights" in message
    assert "model.layers.0.mlp.up_proj (2 bits)" in message
    assert "1 weights are balanced integers" in message
    assert not list(tmp_path.iterdir())


def test_what_the_neural_engine_has_no_form_for_is_refused(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    packed(bundle, EVERY_FORM)
    assert coreai_problems(bundle, DYNAMIC) == []
    problems = " ".join(coreai_problems(bundle, STATIC))
    assert "weights have palettes with row scales: model.layers.0.self_attn.k_proj" in problems
    assert "weights have zero points" in problems
    assert "(blocks of 16)" in problems
    assert "prefill_tokens=64 does not fit into a context of 64" in " ".join(
        coreai_problems(tiny_bundle("llama"), ExportOptions(shapes="static", decode_steps=12))
    )


def test_a_context_too_short_to_trace_is_refused(tiny_bundle: Callable[..., Any]) -> None:
    problems = coreai_problems(tiny_bundle("llama"), ExportOptions(context_length=6, decode_steps=1))
    assert len(problems) == 1
    assert "context_length=6 is shorter than the 7 tokens" in problems[0]


def test_an_asset_over_its_limit_is_refused(
    tiny_bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, static: Carried
) -> None:
    bundle, _, _, info = static
    estimated = coreai_weights.asset_bytes(bundle, STATIC)
    assert estimated < info.bytes < estimated + 80_000
    monkeypatch.setattr(coreai_weights, "LARGEST_ASSET_BYTES", 10_000)
    assert "the layout for iOS allows" in " ".join(coreai_problems(bundle, STATIC))
    assert coreai_problems(bundle, DYNAMIC) == []


def test_what_devices_may_dislike_is_noted(tiny_bundle: Callable[..., Any], static: Carried) -> None:
    assert "head_dim=8" in static[3].notes[0]
    wide = tiny_bundle("qwen3", head_dim=32).anatomy
    assert coreai_notes(wide, 64, STATIC) == ()
    assert "context of 1,000,000 tokens takes 512 MB" in coreai_notes(wide, 1_000_000, STATIC)[0]
    assert "takes 1,024 MB" in coreai_notes(wide, 1_000_000, DYNAMIC)[0]
    assert "bfloat16" in coreai_notes(tiny_bundle("gemma3_text", head_dim=32).anatomy, 64, STATIC)[0]


def test_the_table_of_formats_is_what_is_written_here() -> None:
    from dwindle.quantize import RUNTIMES

    for runtime in ("coreai", "coreai-engine"):
        formats = RUNTIMES[runtime]
        assert formats.palette_bits == formats.embedding_palette_bits == coreai_weights.PALETTE_BITS
        assert formats.integer_bits == formats.embedding_bits == coreai_weights.AFFINE_BITS
        assert formats.balanced_bits == ()


def test_missing_packages_are_told_before_any_work(
    tiny_bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[coreai\]"):
        coreai_problems(bundle, DYNAMIC)


def test_a_foreign_asset_is_no_artifact(static: Carried, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is no Core AI asset written by dwindle"):
        CoreAIRunner(tmp_path)
    shutil.copytree(static[2] / ASSET, tmp_path / ASSET)
    path = tmp_path / ASSET / "metadata.json"
    described = json.loads(path.read_text())
    del described["creatorDefinedMetadata"]
    path.write_text(json.dumps(described))
    with pytest.raises(OutputError, match="is no Core AI asset written by dwindle"):
        CoreAIRunner(tmp_path)


def test_what_the_runtime_gives_up_on_is_told(dynamic: Carried) -> None:
    runner = CoreAIRunner(dynamic[2])
    runner._functions["prefill"] = runner._functions["decode"]
    with pytest.raises(ExportFailed, match="Core AI's runtime failed"):
        runner.step(torch.tensor([[1, 2, 3]]))
