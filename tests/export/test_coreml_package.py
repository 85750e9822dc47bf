"""The saved package: our codes bit for bit, one tied weight, every length, metadata, and parity when executed.

Both forms: one function of flexible length, and two of static shapes over one set of weights.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwindle.errors import RecipeError
from dwindle.export import coreml_weights
from dwindle.export.coreml_decoder import MirroredNorm
from dwindle.export.coreml_files import PACKAGE, WEIGHTS_FILE, quiet_coremltools
from dwindle.export.coreml_package import MINIMUM_OS, CoreMLInfo, export_coreml
from dwindle.export.coreml_runner import CoreMLEvaluatorRunner, CoreMLNativeRunner
from dwindle.export.coreml_weights import carry_codes_pass
from dwindle.export.decoder import RMSNorm
from dwindle.export.mil_evaluator import MilProgram
from dwindle.export.options import ExportOptions
from dwindle.export.parity import ParityLimits, decode_parity, parity_prompts
from dwindle.quantized_model import apply_quantized_weights
from dwindle.storage import hash_folder
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

OPTIONS = ExportOptions(decode_steps=8)
STATIC = ExportOptions(decode_steps=8, shapes="static", prefill_tokens=5)
LIMITS = ParityLimits(logit_error_share=5e-3, kl_nats_per_token=1e-5, top1_agreement=0.97)


def palettes(shape: tuple[int, int], bits: int, rows: int, *, scaled: bool = False, seed: int = 0) -> PalettizedWeight:
    """Return random indices and sorted random palettes, one of whose values is the smallest fp16 number."""
    made = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=made)
    table = (torch.randn((shape[0] // rows, 2**bits), generator=made) * 0.15).half().sort(dim=1).values
    table[0, 0] = 2.0**-24
    scales = (torch.rand(shape[0], generator=made) + 0.5).half() if scaled else None
    return PalettizedWeight(indices, table, bits, rows, scales)


def integers(shape: tuple[int, int], bits: int, group: int, *, symmetric: bool = True, balanced: bool = False,
             seed: int = 0) -> AffineWeight:  # fmt: skip
    """Return random codes over their whole range, with random scales and, if asymmetric, zero points."""
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=made)
    scales = ((torch.rand((shape[0], shape[1] // group), generator=made) + 0.5) / 2**bits * 0.4).half()
    zeros = torch.randint(0, 2**bits, tuple(scales.shape), dtype=torch.uint8, generator=made)
    return AffineWeight(codes, scales, None if symmetric else zeros, bits, group, balanced)


Carried = tuple[Any, dict[str, QuantizedWeight], Path, CoreMLInfo]


def packed(bundle: Any) -> dict[str, QuantizedWeight]:
    """Give a tiny bundle packed weights of every kind, in place; return them by module name.

    Palettes of 4 bits everywhere but: 1 and 8 bits in the first o and gate, row scales in the first up, int4 blocks of
    32 in the first down, asymmetric int4 in the last down; int8 per row in the embedding.
    """
    anatomy, weights = bundle.anatomy, {}
    for seed, name in enumerate(anatomy.linear_names()):
        shape = tuple(bundle.model.get_submodule(name).weight.shape)
        weights[name] = palettes(shape, 4, 16, seed=seed)
    first, last = anatomy.parts(0), anatomy.parts(anatomy.layers - 1)
    special = {
        first["o"]: lambda shape: palettes(shape, 1, shape[0]),
        first.get("gate", first["o"]): lambda shape: palettes(shape, 8, 32),
        first.get("up", first["o"]): lambda shape: palettes(shape, 4, 16, scaled=True, seed=99),
        first["down"]: lambda shape: integers(shape, 4, 32),
        last["down"]: lambda shape: integers(shape, 4, 32, symmetric=False),
    }
    for name, make in special.items():
        weights[name] = make(weights[name].shape)
    weights[anatomy.embedding] = integers((anatomy.vocab, anatomy.width), 8, anatomy.width)
    apply_quantized_weights(bundle.model, weights, {anatomy.head: anatomy.embedding} if anatomy.tied else {})
    return weights


def packed_narrowly(bundle: Any) -> dict[str, QuantizedWeight]:
    """Give a tiny bundle what is looked up before it is scaled, and a palettized table; return it by module name."""
    anatomy = bundle.anatomy
    makers: list[Callable[[tuple[int, int]], QuantizedWeight]] = [
        lambda shape: integers(shape, 2, 16),
        lambda shape: integers(shape, 2, 16, balanced=True),
        lambda shape: integers(shape, 2, 16, symmetric=False),
        lambda shape: integers(shape, 3, 32),
        lambda shape: integers(shape, 3, 32, balanced=True),
        lambda shape: integers(shape, 3, shape[1], symmetric=False),
        lambda shape: integers(shape, 4, 16, balanced=True),
        lambda shape: integers(shape, 8, shape[1], balanced=True),
        lambda shape: integers(shape, 8, 16, symmetric=False),
        lambda shape: palettes(shape, 2, 8, scaled=True),
        lambda shape: palettes(shape, 3, shape[0], scaled=True),
        lambda shape: palettes(shape, 6, 32),
        lambda shape: palettes(shape, 2, 32),
        lambda shape: integers(shape, 4, 8),
    ]
    weights = {name: make(tuple(bundle.model.get_submodule(name).weight.shape))
               for name, make in zip(anatomy.linear_names(), makers, strict=True)}  # fmt: skip
    weights[anatomy.embedding] = palettes((anatomy.vocab, anatomy.width), 4, anatomy.vocab, seed=7)
    apply_quantized_weights(bundle.model, weights, {anatomy.head: anatomy.embedding})
    return weights


def _parity(bundle: Any, folder: Path, steps: int = 8) -> Any:
    runner = CoreMLEvaluatorRunner(folder)
    return decode_parity(bundle, runner, parity_prompts(bundle, 2, 12), steps, LIMITS, runner.executed_by)


@pytest.fixture(scope="module")
def carried(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """A tied Qwen3 with packed weights of every kind, and its package: (bundle, weights, folder, info)."""
    bundle = tiny_bundle("qwen3", storage_dtype=torch.float16)
    weights = packed(bundle)
    folder = tmp_path_factory.mktemp("carried")
    return bundle, weights, folder, export_coreml(bundle, folder, OPTIONS)


@pytest.fixture(scope="module")
def carried_narrowly(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """A tied Llama with `packed_narrowly`, and its package."""
    bundle = tiny_bundle("llama", storage_dtype=torch.float16)
    weights = packed_narrowly(bundle)
    folder = tmp_path_factory.mktemp("narrow")
    return bundle, weights, folder, export_coreml(bundle, folder, OPTIONS)


@pytest.fixture(scope="module")
def carried_static(carried: Carried, tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """The model of `carried` as a package of two functions."""
    bundle, weights, _, _ = carried
    folder = tmp_path_factory.mktemp("static")
    return bundle, weights, folder, export_coreml(bundle, folder, STATIC)


@pytest.mark.parametrize(
    ("form", "function"),
    [("carried", "main"), ("carried_narrowly", "main"), ("carried_static", "prefill"), ("carried_static", "decode")],
)
def test_codes_and_tables_are_ours_bit_for_bit(form: str, function: str, request: pytest.FixtureRequest) -> None:
    _, weights, folder, _ = request.getfixturevalue(form)
    stored = MilProgram.load(folder / PACKAGE, function).constants
    for name, weight in weights.items():
        ours = {key.split("weight_")[-1]: value for key, value in stored.items() if key.startswith(_spelled(name))}
        if isinstance(weight, PalettizedWeight):
            assert np.array_equal(ours["palettized"]["indices"], weight.indices.numpy())
            lut = ours["palettized"]["lut"][:, 0, :, 0]
            assert np.array_equal(lut, weight.palettes.float().numpy())
            if weight.row_scales is not None:
                assert np.array_equal(ours["scaled"]["scale"][:, 0], weight.row_scales.float().numpy())
            continue
        if "codes" in ours:
            assert np.array_equal(ours["codes"]["indices"], weight.codes.numpy())
            numbers = np.arange(2**weight.bits) - (weight.centre if weight.symmetric else 0)
            assert np.array_equal(ours["codes"]["lut"].reshape(-1), numbers)
        else:
            zero = 0 if weight.zero_points is not None else 2 ** (weight.bits - 1)
            assert np.array_equal(ours["integers"]["data"].astype(int) + zero, weight.codes.numpy())
        assert np.array_equal(ours["integers"]["scale"], weight.scales.float().numpy())
        if weight.zero_points is not None:
            assert np.array_equal(ours["integers"]["offset"], weight.zero_points.numpy())
    assert len(weights) == 15


def test_narrow_and_balanced_codes_decode_like_the_measured_model(carried_narrowly: Carried) -> None:
    bundle, weights, folder, info = carried_narrowly
    parity = _parity(bundle, folder)
    assert parity.passed, parity
    assert "8 weights are integers of 2 or 3 bits" in " ".join(info.notes)
    codes = sum(weight.stored_bits for weight in weights.values()) // 8
    zero_points_as_bytes = sum(w.scales.numel() for w in weights.values()
                               if isinstance(w, AffineWeight) and not w.symmetric)  # fmt: skip
    per_constant, tables = 128 * 100, 2 * 2 * 64 * 8
    assert codes < info.weight_bytes < codes + zero_points_as_bytes + per_constant + tables


def test_the_table_of_formats_is_what_is_written_here() -> None:
    from dwindle.quantize import RUNTIMES

    formats = RUNTIMES["coreml"]
    assert formats.palette_bits == formats.embedding_palette_bits == coreml_weights.PALETTE_BITS
    assert formats.integer_bits == formats.balanced_bits == formats.embedding_bits == coreml_weights.AFFINE_BITS


def _spelled(name: str) -> str:
    return f"decoder.{name}.weight".replace(".", "_") + "_"


def test_stored_types_are_as_narrow_as_the_codes(carried: Carried) -> None:
    import coremltools as ct

    _, _, folder, _ = carried
    with quiet_coremltools():
        spec = ct.utils.load_spec(str(folder / PACKAGE))
    function = spec.mlProgram.functions["main"]
    kinds = {}
    for op in function.block_specializations[function.opset].operations:
        if op.type.startswith("constexpr_"):
            given = op.inputs.get("indices") or op.inputs.get("data")
            binding = given.arguments[0]
            if binding.WhichOneof("binding") == "value":
                kinds[op.outputs[0].name] = binding.value.type.tensorType.dataType
    types = ct.proto.MIL_pb2.DataType
    named = {name.removeprefix("decoder_model_"): types.Name(kind) for name, kind in kinds.items()}
    assert named["layers_0_self_attn_q_proj_weight_palettized"] == "UINT4"
    assert named["layers_0_self_attn_o_proj_weight_palettized"] == "UINT1"
    assert named["layers_0_mlp_gate_proj_weight_palettized"] == "UINT8"
    assert named["layers_0_mlp_down_proj_weight_integers"] == "INT4"
    assert named["layers_1_mlp_down_proj_weight_integers"] == "UINT4"
    assert named["embed_tokens_weight_integers"] == "INT8"


def test_the_tied_weight_is_stored_once_and_the_size_is_that_of_the_codes(carried: Carried) -> None:
    bundle, weights, folder, info = carried
    codes = sum(w.stored_bits for w in weights.values()) // 8
    weight_bin = (folder / PACKAGE / WEIGHTS_FILE).stat().st_size
    assert info.weight_bytes == weight_bin
    assert info.counted_bytes == bundle.size().bytes
    embedding = weights[bundle.anatomy.embedding].stored_bits // 8
    tables = 2 * 2 * 64 * 8
    per_constant = 128 * 90
    assert codes < weight_bin < codes + tables + per_constant < codes + tables + per_constant + embedding + 1
    program = MilProgram.load(folder / PACKAGE)
    assert sum("embed_tokens" in name for name in program.constants) == 1
    assert program.operations["constexpr_lut_to_dense"] == 12
    assert program.operations["constexpr_blockwise_shift_scale"] == 4


@pytest.mark.parametrize("form", ["carried", "carried_static"])
def test_a_packed_model_decodes_like_the_measured_one(form: str, request: pytest.FixtureRequest) -> None:
    bundle, _, folder, _ = request.getfixturevalue(form)
    parity = _parity(bundle, folder)
    assert parity.passed, parity
    assert "Core ML itself was not executed" in parity.executed_by


def test_what_is_checked_is_what_lies_on_disk(carried: Carried, tmp_path: Path) -> None:
    bundle, weights, folder, _ = carried
    shutil.copytree(folder / PACKAGE, tmp_path / PACKAGE)
    path = tmp_path / PACKAGE / WEIGHTS_FILE
    stored = path.read_bytes()
    ours = weights["model.layers.1.mlp.gate_proj"].to_tensors()["indices"].numpy().tobytes()
    assert stored.count(ours) == 1
    path.write_bytes(stored.replace(ours, bytes(len(ours))))
    assert not _parity(bundle, tmp_path).passed


def test_two_functions_share_weights_and_states(carried: Carried, carried_static: Carried) -> None:
    _, _, folder, info = carried_static
    functions = MilProgram.load_all(folder / PACKAGE)
    assert set(functions) == {"prefill", "decode"} == set(info.functions)
    prefill, decode = functions["prefill"], functions["decode"]
    assert dict(prefill.state_shapes) == dict(decode.state_shapes) == dict.fromkeys(("key_cache", "value_cache"),
                                                                                    (2, 1, 2, 64, 16))  # fmt: skip
    assert dict(prefill.input_shapes) == {"input_ids": (1, 5), "causal_mask": (1, 1, 5, 64), "position": (1,)}
    assert dict(decode.input_shapes) == {"input_ids": (1, 1), "causal_mask": (1, 1, 1, 64), "position": (1,)}
    assert info.weight_bytes <= 1.01 * carried[3].weight_bytes
    dense = {key: value for step in prefill.steps for key, value in step.inputs.items() if key == "weight"}
    again = {key: value for step in decode.steps for key, value in step.inputs.items() if key == "weight"}
    assert all(value is again[key] for key, value in dense.items())
    assert len(dense) == 1


def test_one_program_takes_every_length(carried: Carried) -> None:
    _, _, folder, info = carried
    runner = CoreMLEvaluatorRunner(folder)
    ids = torch.randint(0, 250, (1, info.context_length), generator=torch.Generator().manual_seed(3))
    whole = runner.step(ids)
    runner.reset()
    pieces = torch.cat([runner.step(part) for part in ids.split([1, 5, 1, 1, 30, info.context_length - 38], dim=1)])
    assert whole.shape == (info.context_length, 272)
    assert torch.allclose(whole, pieces, atol=1e-4)
    assert 0 < runner.fp16_peak < 65504
    with pytest.raises(RecipeError, match="context of 64 tokens; 65 were fed"):
        runner.step(ids[:, :1])


def test_metadata_says_what_it_is(carried: Carried) -> None:
    import coremltools as ct

    bundle, _, folder, info = carried
    with quiet_coremltools():
        description = ct.utils.load_spec(str(folder / PACKAGE)).description
    metadata = description.metadata
    assert "past + T" in metadata.shortDescription
    assert description.input[1].shortDescription.startswith("Added to the attention scores")
    assert metadata.author == "dwindle"
    assert metadata.license
    assert metadata.versionString
    given = dict(metadata.userDefined)
    assert given["dwindle.context_length"] == "64"
    assert given["dwindle.source_sha256"] == bundle.content_sha256
    assert given["dwindle.minimum_os"] == info.minimum_os == MINIMUM_OS == "iOS 18 / macOS 15"
    assert "palettized 4-bit group 16" in given["dwindle.quantization"]
    assert [i.name for i in description.input] == ["input_ids", "causal_mask"]
    assert [s.name for s in description.state] == ["key_cache", "value_cache"]


def test_metadata_of_two_functions_says_how_to_feed_them(carried_static: Carried) -> None:
    import coremltools as ct

    _, _, folder, _ = carried_static
    with quiet_coremltools():
        description = ct.utils.load_spec(str(folder / PACKAGE)).description
    assert "prefill (5 tokens) and decode (1 token)" in description.metadata.shortDescription
    given = dict(description.metadata.userDefined)
    assert (given["dwindle.shapes"], given["dwindle.prefill_tokens"]) == ("static", "5")
    assert given["dwindle.part"] == "1 of 1"
    assert description.defaultFunctionName == "decode"
    for function in description.functions:
        assert [i.name for i in function.input] == ["input_ids", "causal_mask", "position"]
        assert all(feature.shortDescription for feature in (*function.input, *function.output))
        assert [s.name for s in function.state] == ["key_cache", "value_cache"]


def test_a_second_export_is_the_same_folder(carried: Carried, tmp_path: Path) -> None:
    import coremltools as ct

    bundle, _, folder, _ = carried
    export_coreml(bundle, tmp_path, OPTIONS)
    exported = hash_folder(tmp_path)
    assert exported == hash_folder(folder)
    CoreMLEvaluatorRunner(tmp_path)
    assert exported == hash_folder(tmp_path)
    with quiet_coremltools():
        ct.utils.load_spec(str(tmp_path / PACKAGE))
    assert exported == hash_folder(tmp_path)
    export_coreml(bundle, tmp_path, ExportOptions(context_length=40, decode_steps=8))
    assert CoreMLEvaluatorRunner(tmp_path).context == 40


def test_a_second_static_export_is_the_same_folder(carried_static: Carried, tmp_path: Path) -> None:
    bundle, _, folder, _ = carried_static
    export_coreml(bundle, tmp_path, STATIC)
    assert hash_folder(tmp_path) == hash_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == [PACKAGE]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_float_families_decode_like_torch(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    info = export_coreml(bundle, tmp_path, OPTIONS)
    assert _parity(bundle, tmp_path).passed
    overhead = 128 * 2 * bundle.anatomy.layers * 20 + 4 * 64 * 16 * 2
    assert info.weight_bytes < info.counted_bytes + overhead


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "smollm3", "olmo2"])
def test_the_other_families_decode_like_torch(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    export_coreml(bundle, tmp_path, OPTIONS)
    assert _parity(bundle, tmp_path).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "pycode-6m"])
def test_trained_models_decode_like_torch(name: str, assets: Path, tmp_path: Path) -> None:
    from dwindle.bundle import ModelBundle

    bundle = ModelBundle.load(assets / "models" / name)
    options = ExportOptions(decode_steps=32).resolved(bundle.anatomy)
    export_coreml(bundle, tmp_path, options)
    prompts = parity_prompts(bundle, 2, options.parity_lengths()[0])
    parity = decode_parity(bundle, CoreMLEvaluatorRunner(tmp_path), prompts, 32, LIMITS)
    assert parity.passed, parity


def test_widths_core_ml_does_not_store_are_refused_all_at_once(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    parts = bundle.anatomy.parts(0)
    weights = {parts["q"]: palettes((32, 32), 5, 16), parts["o"]: palettes((32, 32), 7, 16),
               parts["up"]: integers((64, 32), 6, 32)}  # fmt: skip
    apply_quantized_weights(bundle.model, weights, {})
    with pytest.raises(RecipeError) as refusal:
        export_coreml(bundle, tmp_path, OPTIONS)
    message = str(refusal.value)
    assert "2 palettized weights" in message
    assert "model.layers.0.self_attn.q_proj (5 bits), model.layers.0.self_attn.o_proj (7 bits)" in message
    assert "1, 2, 3, 4, 6, 8" in message
    assert "1 affine weights" in message
    assert "model.layers.0.mlp.up_proj (6 bits)" in message
    assert not list(tmp_path.iterdir())


def test_codes_that_do_not_meet_their_constant_stop_the_conversion() -> None:
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    with quiet_coremltools():
        import coremltools as ct

        @mb.program(input_specs=[mb.TensorSpec(shape=(1, 32))], opset_version=ct.target.iOS18)
        def program(x: Any) -> Any:
            return mb.linear(x=x, weight=np.ones((16, 32), np.float32), bias=np.zeros(16, np.float32), name="y")

        constant = next(op for op in program.functions["main"].operations if op.outputs[0].shape == (16, 32))
        carry = PASS_REGISTRY[carry_codes_pass()]
        carry.weights = {"elsewhere": integers((16, 32), 8, 32)}
        with pytest.raises(RuntimeError, match="dropped 1 weights: elsewhere"):
            carry.apply(program)
        carry.weights = {constant.name: integers((16, 64), 8, 32)}
        with pytest.raises(RuntimeError, match=r"\(16, 32\) in the program and \(16, 64\) in the checkpoint"):
            carry.apply(program)


def test_the_mirrored_norm_is_the_norm_and_does_not_overflow() -> None:
    norm = RMSNorm(24, 1e-6, 1.0)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, 24)
    assert torch.allclose(MirroredNorm(norm)(x), norm(x), atol=1e-6)
    large = torch.full((1, 24), 3e4, dtype=torch.float16)
    assert torch.isinf(large * large).all()
    assert torch.isfinite(MirroredNorm(norm).half()(large)).all()


def test_conversion_is_silent(
    tiny_bundle: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notices = logging.getLogger("coremltools")
    before = notices.level
    export_coreml(tiny_bundle("llama", num_hidden_layers=1), tmp_path, OPTIONS)
    assert capfd.readouterr() == ("", "")
    assert notices.level == before


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs Core ML")
@pytest.mark.parametrize("form", ["carried", "carried_static"])
def test_core_ml_runs_the_package(form: str, request: pytest.FixtureRequest) -> None:
    bundle, _, folder, _ = request.getfixturevalue(form)
    runner = CoreMLNativeRunner(folder)
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 1, 12), 8,
                           ParityLimits(0.05, 1e-3, 0.9), runner.executed_by)  # fmt: skip
    assert parity.passed, parity
