from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.errors import DataError
from dwindle.quantize.own_text import PROMPT_TOKENS, own_text


def windows(length: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (6, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_model_finds_its_own_text_likely(tiny_bundle: Callable[..., Any], family: str) -> None:
    bundle = tiny_bundle(family)
    text = own_text(bundle, windows(), 64)
    assert text.shape == (64, 48)
    with torch.no_grad():
        chances = bundle.model(text).logits[:, 11:-1].log_softmax(-1)
        own = chances.gather(2, text[:, 12:, None]).mean()
        others = chances.gather(2, torch.randint(0, 256, (64, 36, 1))).mean()
        entropy = -(chances.exp() * chances).sum(-1).mean()
    assert own > others
    assert float(own) == pytest.approx(-float(entropy), abs=0.15)


def test_every_window_begins_with_a_piece_of_the_text(tiny_bundle: Callable[..., Any]) -> None:
    ids = windows(12)
    pieces = {tuple(piece.tolist()) for piece in ids.reshape(-1, 3)}
    text = own_text(tiny_bundle("llama"), ids, 30)
    begun = [tuple(row[:3].tolist()) for row in text]
    assert set(begun) <= pieces
    assert len(set(begun[: len(pieces)])) == len(pieces)
    assert PROMPT_TOKENS > 3


def test_the_same_seed_writes_the_same_text(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    first, again, other = (own_text(bundle, windows(16), 8, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_of_one_token_are_refused(tiny_bundle: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="windows of 1 token; needed 2 or more"):
        own_text(tiny_bundle("llama"), windows(1), 4)
