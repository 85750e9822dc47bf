"""Teacher correction: lower loss on the text, exact resume, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.distill import CorrectTeacherOptions, correct_teacher
from dwindle.errors import RecipeError
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

OPTIONS = CorrectTeacherOptions(steps=8, batch_size=4, learning_rate=1e-3, log_every=1, checkpoint_every=3)


def tokens(bundle: Any, length: int = 17) -> TokenSet:
    ids = torch.randint(3, 30, (16, length), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "train", "random", "0" * 64, 1, encoding_sha256(bundle.tokenizer))


def test_the_teacher_learns_the_text_and_the_old_one_stays(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(line: Any) -> None:
        if line.step == 5:
            raise Cut

    teacher = tiny_bundle("llama")
    before = teacher.content_sha256
    whole, record = correct_teacher(teacher, OPTIONS, train_tokens=tokens(teacher))
    assert record.details["last_loss"] < record.details["first_loss"]
    assert record.name == whole.lineage.steps[-1] == "correct_teacher"
    assert teacher.content_sha256 == before != whole.content_sha256
    with pytest.raises(Cut):
        correct_teacher(teacher, OPTIONS, train_tokens=tokens(teacher), folder=tmp_path, on_step=cut)
    resumed, _ = correct_teacher(teacher, OPTIONS, train_tokens=tokens(teacher), folder=tmp_path)
    assert resumed.content_sha256 == whole.content_sha256


def test_what_does_not_go_together_is_named(tiny_bundle: Callable[..., Any]) -> None:
    from dwindle.quantize import QuantizeOptions
    from dwindle.quantize import run as quantized

    teacher = tiny_bundle("llama")
    packed = quantized(teacher, QuantizeOptions(scheme="integer", bits=4))[0]
    foreign = replace(tokens(teacher, length=teacher.anatomy.context + 2), tokenizer_sha256="f" * 64)
    with pytest.raises(RecipeError, match=r"quantized.*another tokenizer.*the context is"):
        correct_teacher(packed, OPTIONS, train_tokens=foreign)
