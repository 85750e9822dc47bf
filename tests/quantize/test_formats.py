from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.quantize import RUNTIMES, QuantizeOptions, check
from dwindle.quantize.formats import carried_bits, runtime_notes


@pytest.mark.parametrize(
    ("runtime", "options"),
    [
        ("coreml", {}),
        ("coreml", {"bits": 3, "group_size": "tensor", "row_scales": True}),
        ("coreml", {"scheme": "integer", "group_size": "channel", "bits": 8}),
        ("coreml", {"scheme": "integer", "group_size": 12, "bits": 3, "symmetric": False}),
        ("coreml", {"embedding_scheme": "palettize", "embedding_bits": 6}),
        ("coreai", {"bits": 6, "row_scales": True}),
        ("coreai", {"scheme": "integer", "bits": 4, "group_size": 32}),
        ("coreai-engine", {"group_size": 32}),
        ("coreai-engine", {"scheme": "integer", "bits": 8, "group_size": "channel"}),
        ("onnx", {"scheme": "integer"}),
        ("onnx", {"scheme": "integer", "group_size": 48}),
        ("onnx", {"scheme": "integer", "group_size": "channel"}),
        ("onnx", {"scheme": "integer", "bits": 2, "group_size": 16, "symmetric": False, "embedding_bits": 2}),
        ("onnx", {"scheme": "integer", "target_bits_per_weight": 3.5, "runtimes": "onnx"}),
        ("onnx", {"scheme": "integer", "target_bytes": 10, "allowed_bits": (4, 8)}),
    ],
)
def test_what_runtimes_carry(runtime: str, options: dict[str, Any]) -> None:
    check(QuantizeOptions(**options), runtime)


@pytest.mark.parametrize(
    ("runtime", "options", "words"),
    [
        ("onnx", {}, ["scheme=palettize (it takes integers only)", "Set scheme=integer"]),
        ("onnx", {"scheme": "integer", "bits": 3}, ["integers of 3 bits (it takes 2, 4, 8)"]),
        ("onnx", {"scheme": "integer", "group_size": 24}, ["group_size=24", "multiple of 16"]),
        ("onnx", {"scheme": "integer", "group_size": 8}, ["group_size=8"]),
        ("onnx", {"scheme": "integer", "bits": 3, "group_size": 20, "embedding_bits": 3},
         ["integers of 3 bits", "group_size=20", "embedding_bits=3 (it takes 2, 4, 8)"]),
        ("onnx", {"scheme": "integer", "embedding_scheme": "palettize"}, ["embedding_scheme=palettize"]),
        ("onnx", {"scheme": "integer", "target_bits_per_weight": 3.5},
         ["integers of 3 bits, which a mixed plan may choose"]),
        ("onnx", {"scheme": "integer", "target_bytes": 9, "allowed_bits": (3, 4), "runtimes": "onnx"},
         ["integers of 3 bits"]),
        ("coreai", {"bits": 3}, ["palettes of 3 bits (it takes 2, 4, 6, 8)"]),
        ("coreai", {"scheme": "integer", "bits": 2, "embedding_bits": 2}, ["integers of 2 bits", "embedding_bits=2"]),
        ("coreai-engine", {"row_scales": True, "embedding_scheme": "palettize", "embedding_bits": 1},
         ["row_scales", "embedding_bits=1 (it takes 2, 4, 6, 8)"]),
        ("coreai-engine", {"scheme": "integer", "symmetric": False}, ["symmetric=False", "group_size=None chooses"]),
        ("coreai-engine", {"scheme": "integer", "group_size": 32}, ["group_size=32 (it takes channel only)"]),
        ("tflite", {}, ["tflite", "coreml"]),
        ("onyx", {}, ["did you mean 'onnx'"]),
    ],
)  # fmt: skip
def test_what_they_refuse_is_said_at_once(runtime: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check(QuantizeOptions(**options), runtime)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, (1, 2, 3, 4, 6, 8)),
        ({"runtimes": ("coreml", "coreai")}, (2, 4, 6, 8)),
        ({"runtimes": "coreml", "allowed_bits": (4, 2)}, (2, 4)),
        ({"scheme": "integer"}, (2, 3, 4, 8)),
        ({"scheme": "integer", "runtimes": ("coreml", "onnx")}, (2, 4, 8)),
        ({"scheme": "integer", "runtimes": ("coreai", "onnx"), "allowed_bits": (2, 3, 4)}, (4,)),
    ],
)
def test_bits_that_all_runtimes_carry(options: dict[str, Any], bits: tuple[int, ...]) -> None:
    assert carried_bits(QuantizeOptions(target_bits_per_weight=4, **options)) == bits


def test_bits_that_no_runtime_carries_name_what_each_takes() -> None:
    options = QuantizeOptions(
        scheme="integer", allowed_bits=(3,), runtimes=("onnx", "coreai"), target_bits_per_weight=3
    )
    with pytest.raises(RecipeError, match=r"no bits of 3 .*MatMulNBits\) takes 2, 4, 8; Core AI .* takes 4, 8"):
        carried_bits(options)
    with pytest.raises(RecipeError, match="'tflite' is not known"):
        carried_bits(QuantizeOptions(runtimes=("tflite",)))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"runtimes": "coreml"}, []),
        ({"row_scales": True, "runtimes": ("coreml", "coreai")}, ["Core ML (iOS 18): palettes with row scales"]),
        ({"scheme": "integer", "bits": 2, "runtimes": ("coreml", "onnx")}, ["Core ML (iOS 18): integers of 2 bits"]),
        ({"scheme": "integer", "target_bytes": 9, "runtimes": "coreml"}, ["Core ML (iOS 18): integers of 2, 3 bits"]),
    ],
)
def test_what_may_disappoint_is_noted(options: dict[str, Any], found: list[str]) -> None:
    notes = runtime_notes(QuantizeOptions(**options))
    assert [note.split(" are reported")[0] for note in notes] == found


def test_the_table_is_consistent() -> None:
    assert set(RUNTIMES) == {"coreml", "coreai", "coreai-engine", "onnx"}
    for formats in RUNTIMES.values():
        assert set(formats.balanced_bits) <= set(formats.integer_bits)
        assert all(getattr(formats, f.name) is not None for f in fields(formats))


def test_palettes_outside_a_table_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(RUNTIMES, "coreml", replace(RUNTIMES["coreml"], palette_bits=(2, 4)))
    with pytest.raises(RecipeError, match=r"palettes of 3 bits \(it takes 2, 4\)"):
        check(QuantizeOptions(bits=3), "coreml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "nf4"}, ["scheme='nf4'", "palettize or integer"]),
        ({"bits": 5, "embedding_bits": 16}, ["bits=5", "embedding_bits=16", "keep_float"]),
        ({"scheme": "integer", "bits": 1}, ["bits=1"]),
        ({"group_size": 0}, ["group_size=0"]),
        ({"group_size": "channel"}, ["group_size='channel'", "'tensor'"]),
        ({"scheme": "integer", "group_size": "tensor"}, ["'channel'"]),
        ({"group_size": True}, ["group_size=True"]),
        ({"symmetric": False}, ["symmetric=False", "scheme=integer"]),
        ({"histogram_bins": 0}, ["histogram_bins=0"]),
        ({"histogram_bins": 10_000}, ["histogram_bins=10000"]),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        QuantizeOptions(**options)
    assert all(word in str(caught.value) for word in words)


def test_keep_float_takes_a_list_or_one_name() -> None:
    assert QuantizeOptions(keep_float=["a", "b"]).keep_float == ("a", "b")  # type: ignore[arg-type]
    assert QuantizeOptions(keep_float="lm_head").keep_float == ("lm_head",)  # type: ignore[arg-type]
