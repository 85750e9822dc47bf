"""Static shapes: two functions of one package, fed in pieces, against torch; and what cannot be fed or merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.errors import RecipeError
from dwindle.export import coreml_package
from dwindle.export.coreml_files import PACKAGE, WEIGHTS_FILE, quiet_coremltools
from dwindle.export.coreml_merge import merge_functions
from dwindle.export.coreml_package import export_coreml
from dwindle.export.coreml_runner import CoreMLEvaluatorRunner
from dwindle.export.mil_evaluator import MilProgram
from dwindle.export.mil_reader import read_functions
from dwindle.export.options import ExportOptions
from dwindle.export.parity import ParityLimits, decode_parity, parity_prompts

STATIC = ExportOptions(decode_steps=8, shapes="static", prefill_tokens=5)
LIMITS = ParityLimits(logit_error_share=5e-3, kl_nats_per_token=1e-5, top1_agreement=0.97)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3", "smollm3", "phi3"])
def test_families_decode_like_torch(family: str, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.float16)
    export_coreml(bundle, tmp_path, STATIC)
    runner = CoreMLEvaluatorRunner(tmp_path)
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 2, 12), 8, LIMITS)
    assert parity.passed, parity


@pytest.fixture(scope="module")
def windowed(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A Gemma 3 (sliding windows, norms around each half, norms of heads): (bundle, its folder, coremltools' merge)."""
    bundle, folder = tiny_bundle("gemma3_text", storage_dtype=torch.float16), tmp_path_factory.mktemp("windowed")
    theirs = tmp_path_factory.mktemp("theirs") / PACKAGE

    def merged_twice(packages: dict[str, Path], merged: Path, default: str) -> None:
        with quiet_coremltools():
            from coremltools.models.utils import MultiFunctionDescriptor, save_multifunction

            descriptor = MultiFunctionDescriptor()
            for name, package in packages.items():
                descriptor.add_function(str(package), "main", name)
            descriptor.default_function_name = default
            save_multifunction(descriptor, str(theirs))
        merge_functions(packages, merged, default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreml_package, "merge_functions", merged_twice)
        export_coreml(bundle, folder, STATIC)
    return bundle, folder, theirs


def test_windows_and_norms_of_heads_decode_like_torch(windowed: tuple[Any, Path, Path]) -> None:
    bundle, folder, _ = windowed
    runner = CoreMLEvaluatorRunner(folder)
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 2, 12), 8, LIMITS)
    assert parity.passed, parity
    assert (runner.context, runner.vocabulary) == (64, 272)


def test_any_number_of_tokens_is_cut_into_prefills_and_single_tokens(windowed: tuple[Any, Path, Path]) -> None:
    runner = CoreMLEvaluatorRunner(windowed[1])
    assert runner.interface.pieces(12) == [("prefill", 5), ("prefill", 5), ("decode", 1), ("decode", 1)]
    ids = torch.randint(0, 250, (1, 64), generator=torch.Generator().manual_seed(3))
    whole = runner.step(ids)
    runner.reset()
    pieces = torch.cat([runner.step(part) for part in ids.split([1, 7, 3, 5, 48], dim=1)])
    assert torch.allclose(whole, pieces, atol=1e-4)
    with pytest.raises(RecipeError, match="context of 64 tokens; 65 were fed"):
        runner.step(ids[:, :1])


def test_the_merge_is_that_of_coremltools(windowed: tuple[Any, Path, Path]) -> None:
    _, folder, theirs = windowed
    ours, reference = read_functions(folder / PACKAGE), read_functions(theirs)
    assert sorted(ours) == ["decode", "prefill"]
    for name, function in ours.items():
        other = reference[name]
        assert (function.inputs, function.outputs, function.states) == (other.inputs, other.outputs, other.states)
        assert [op.kind for op in function.operations] == [op.kind for op in other.operations]
    size, their_size = ((package / WEIGHTS_FILE).stat().st_size for package in (folder / PACKAGE, theirs))
    assert size <= 1.05 * their_size
    runner, other_runner = CoreMLEvaluatorRunner(folder), CoreMLEvaluatorRunner(theirs)
    ids = torch.arange(10, 22)[None]
    assert torch.equal(runner.step(ids), other_runner.step(ids))


def test_coremltools_opens_the_merge(windowed: tuple[Any, Path, Path]) -> None:
    with quiet_coremltools():
        import coremltools.converters.mil.frontend.milproto.load as milproto

        from dwindle.export.coreml_files import read_specification

        package = windowed[1] / PACKAGE
        spec = read_specification(package)
        program = milproto.load(spec, spec.specificationVersion, str((package / WEIGHTS_FILE).parent))
    assert set(program.functions) == {"prefill", "decode"}
    mine = MilProgram.load(package, "decode")
    assert len(program.functions["decode"].operations) > len(mine.steps)


def test_a_prefill_longer_than_the_context_is_refused(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    options = ExportOptions(decode_steps=8, shapes="static", prefill_tokens=65)
    with pytest.raises(RecipeError, match="prefill_tokens=65 is more than the context of 64 tokens"):
        export_coreml(tiny_bundle(), tmp_path, options)
    assert not list(tmp_path.iterdir())
