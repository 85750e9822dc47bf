from __future__ import annotations

from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.quantize import RUNTIMES, QuantizeOptions, check


@pytest.mark.parametrize(
    ("runtime", "options"),
    [
        ("coreml", {}),
        ("coreml", {"bits": 3, "group_size": "tensor"}),
        ("coreml", {"scheme": "integer", "group_size": "channel", "bits": 8}),
        ("coreml", {"scheme": "integer", "group_size": 12, "symmetric": False}),
        ("onnx", {"scheme": "integer"}),
        ("onnx", {"scheme": "integer", "group_size": 48}),
        ("onnx", {"scheme": "integer", "group_size": "channel"}),
        ("onnx", {"scheme": "integer", "bits": 2, "group_size": 16, "symmetric": False}),
    ],
)
def test_what_runtimes_carry(runtime: str, options: dict[str, Any]) -> None:
    check(QuantizeOptions(**options), runtime)


@pytest.mark.parametrize(
    ("runtime", "options", "words"),
    [
        ("onnx", {}, ["integers only", "scheme=integer"]),
        ("onnx", {"scheme": "integer", "bits": 3}, ["integers of 3 bits", "2, 4, 8"]),
        ("onnx", {"scheme": "integer", "group_size": 24}, ["group_size=24", "multiple of 16"]),
        ("onnx", {"scheme": "integer", "group_size": 8}, ["group_size=8"]),
        ("onnx", {"scheme": "integer", "bits": 5, "group_size": 20, "embedding_bits": 6},
         ["integers of 5 bits", "group_size=20", "embedding_bits=6"]),
        ("coreml", {"scheme": "integer", "bits": 2}, ["integers of 2 bits", "4, 8"]),
        ("coreml", {"embedding_bits": 7}, ["embedding_bits=7"]),
        ("tflite", {}, ["tflite", "coreml"]),
    ],
)  # fmt: skip
def test_what_they_refuse_is_said_at_once(runtime: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check(QuantizeOptions(**options), runtime)
    assert all(word in str(caught.value) for word in words)


def test_a_runtime_without_per_channel_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(RUNTIMES, "onnx", replace(RUNTIMES["onnx"], per_channel=False))
    with pytest.raises(RecipeError, match="group_size=channel"):
        check(QuantizeOptions(scheme="integer", group_size="channel"), "onnx")


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


def test_groups() -> None:
    assert QuantizeOptions(group_size="tensor").group_of(48, 8) == 48
    assert QuantizeOptions(scheme="integer").group_of(48, 64) == 32
    assert QuantizeOptions(group_size=8).group_of(48, 64) == 8
