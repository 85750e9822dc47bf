"""What is refused and what is noted before a conversion, and how a converter's failure is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.errors import ExportFailed, MissingExtra, RecipeError
from dwindle.export import coreml_convert, coreml_decoder, coreml_engine, coreml_weights
from dwindle.export.coreml_engine import engine_notes
from dwindle.export.coreml_package import export_coreml
from dwindle.export.coreml_weights import coreml_problems
from dwindle.export.options import ExportOptions
from dwindle.quantized_model import apply_quantized_weights
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

OPTIONS = ExportOptions(decode_steps=8)
STATIC = ExportOptions(decode_steps=8, shapes="static", prefill_tokens=5)


def test_a_program_fit_for_the_engine_has_no_notes(tiny_bundle: Callable[..., Any]) -> None:
    fit = tiny_bundle("qwen3", head_dim=32, vocab_size=288)
    assert engine_notes(fit, STATIC) == ()
    (note,) = engine_notes(fit, OPTIONS)
    assert "keeps it off the Neural Engine" in note


def test_shapes_that_leave_the_engine_are_noted(
    tiny_bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = engine_notes(tiny_bundle("gemma3_text"), STATIC)
    assert "head_dim=16, no multiple of 32" in notes[0]
    assert "vocabulary 272: no multiple of 32" in notes[1]
    assert "bfloat16" in notes[2]
    long = tiny_bundle("qwen3", head_dim=32, max_position_embeddings=1_000_000, vocab_size=20_000)
    notes = engine_notes(long, ExportOptions(shapes="static", context_length=1_000_000))
    assert "context of 1,000,000 tokens takes 512 MB" in notes[0]
    assert "vocabulary 20,000, context 1,000,000 is more than the 16,384" in notes[1]
    monkeypatch.setattr(coreml_engine, "LARGE_FILE_BYTES", 1000)
    assert "fail above 1 GB a file. Set largest_file_bytes to 1000." in engine_notes(long, STATIC)[0]


def _weights(kind: str) -> QuantizedWeight:
    codes = torch.zeros((32, 32), dtype=torch.uint8)
    if kind == "scaled":
        return PalettizedWeight(codes, torch.ones(2, 16).half(), 4, 16, torch.ones(32).half())
    bits = 2 if kind == "chained" else 4
    return AffineWeight(codes, torch.ones(32, 2).half(), None, bits, 16)


@pytest.mark.parametrize(
    ("kind", "told"),
    [("scaled", "1 weights have palettes with row scales"), ("chained", "1 weights are integers of 2 or 3 bits"),
     ("blocks", "1 weights are integers in blocks within a row")],
)  # fmt: skip
def test_weights_that_leave_the_engine_are_noted(kind: str, told: str, tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama", head_dim=32, num_attention_heads=1, num_key_value_heads=1, vocab_size=288)
    apply_quantized_weights(bundle.model, {bundle.anatomy.parts(0)["q"]: _weights(kind)}, {})
    (note,) = engine_notes(bundle, STATIC)
    assert told in note


def test_a_missing_or_unfit_library_is_told_before_any_work(
    tiny_bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama")
    monkeypatch.setattr(coreml_weights, "NUMPY_TOO_NEW", (2, 0))
    with pytest.raises(RecipeError, match=r"numpy .* pip install 'numpy<2.4'"):
        export_coreml(bundle, tmp_path, OPTIONS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[coreml\]"):
        coreml_problems(bundle)


def test_an_operator_that_does_not_convert_is_named_with_its_module(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coreml_decoder.MirroredNorm, "forward", lambda _, x: torch.special.i0(x))
    with pytest.raises(ExportFailed) as failure:
        export_coreml(tiny_bundle("llama", num_hidden_layers=1), tmp_path, OPTIONS)
    message = str(failure.value)
    assert "coremltools failed on the operator 'special_i0' of" in message
    assert "input_layernorm" in message
    assert "not implemented" in message
    assert not list(tmp_path.iterdir())


def test_a_pass_that_fails_is_told_with_its_operation(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(block: Any, op: Any, weight: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(coreml_weights, "_replace", broken)
    with pytest.raises(ExportFailed, match=r"on the operation 'const' named 'decoder.model.* \(ValueError: no room\)"):
        export_coreml(tiny_bundle("llama", num_hidden_layers=1), tmp_path, OPTIONS)
    story = coreml_convert._story(RuntimeError("late"), [])
    assert story == "coremltools failed (RuntimeError: late)"
