"""The wired start: an untrained teacher copies; without the wiring it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dwindle.starter.train_teacher import TeacherOptions, build_model
from dwindle.starter.wired_start import wire_copying


class _Tokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return 512


def copied(wired: bool) -> float:
    """The share of tokens of a random sequence's second half that the model predicts from the first half."""
    options = TeacherOptions(vocabulary=512, layers=2, wired=wired)
    tokenizer = _Tokenizer(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = build_model(options, tokenizer).eval()  # type: ignore[arg-type]
    half = torch.randint(3, 512, (4, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=torch.cat([half, half], 1)).logits[:, 60:-1]
    return float((logits.argmax(-1) == half[:, 1:]).float().mean())


def test_an_untrained_teacher_copies_and_a_random_one_does_not() -> None:
    assert copied(wired=True) > 0.7
    assert copied(wired=False) < 0.1


def test_a_shape_it_cannot_wire_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=32, tie_word_embeddings=True)
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs head_dim 32"):
        wire_copying(model)
