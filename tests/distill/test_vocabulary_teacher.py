"""A student with a pruned vocabulary learns from the full teacher through the map: the losses are those by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.distill import DistillOptions, run
from dwindle.errors import RecipeError
from dwindle.measure import Meter
from dwindle.prune import VocabularyOptions, cut_vocabulary, plan_vocabulary
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode_plain, encoding_sha256

TEXT = "the cat sat on the mat and the dog ran to the town then the cat and the dog sat on a mat in town " * 12
OTHER = "his long way was in the house of the tree and the bird is to sing a song then her cat sat on the way " * 2


@pytest.fixture(scope="module")
def teacher(worded: Any) -> Any:
    return worded(seed=1)


@pytest.fixture(scope="module")
def student(worded: Any) -> Any:
    """Another model of which the vocabulary was cut to what TEXT uses."""
    full = worded(seed=2, intermediate_size=32)
    return cut_vocabulary(full, plan_vocabulary(full, TEXT, VocabularyOptions(multiple=1)))


def windows(bundle: Any, text: str = TEXT + OTHER, tokens: int = 17, role: Any = "train") -> TokenSet:
    ids = torch.tensor(encode_plain(bundle.tokenizer, [text])[0])
    cut = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    return TokenSet(cut, role, "text", str(len(ids)), len(text), encoding_sha256(bundle.tokenizer))


def by_hand(teacher: Any, student: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (p, q) [N, V'] in float64: the full teacher over the kept tokens, and the student."""
    kept = torch.tensor(student.vocabulary_map.kept)
    with torch.no_grad():
        p = teacher.model(kept[ids]).logits.double()[..., kept].softmax(-1)
        q = student.model(ids).logits.double().softmax(-1)
    return p.flatten(0, 1), q.flatten(0, 1)


@pytest.mark.parametrize("loss", ["forward_kl", "top1_blend=1.0"])
def test_the_loss_is_the_naive_one(teacher: Any, student: Any, loss: str) -> None:
    """One step over all windows: its loss is the mean over all predictions."""
    data = windows(student)
    options = DistillOptions(losses=(loss,), steps=1, batch_size=len(data.ids))
    _, record = run(student, options, teacher=teacher, train=data)
    p, q = by_hand(teacher, student, data.ids[:, :-1])
    naive = (
        (p * (p.log() - q.log())).sum(-1) if loss == "forward_kl" else -q.log().gather(1, p.argmax(-1, keepdim=True))
    )
    assert record.details["first_loss"] == pytest.approx(float(naive.mean()), rel=1e-5)


def test_the_student_comes_closer_and_keeps_its_map(teacher: Any, student: Any, tmp_path: Path) -> None:
    data = windows(student)
    text = replace(data, ids=data.ids[:4].reshape(1, -1), role="evaluation")
    options = DistillOptions(losses=("forward_kl",), steps=30, batch_size=4, learning_rate=5e-3)
    distilled, record = run(student, options, teacher=teacher, train=data)
    assert record.details["last_loss"] < record.details["first_loss"]
    before, after = (Meter(text, teacher).measure(bundle) for bundle in (student, distilled))
    assert after.kl_nats_per_token < before.kl_nats_per_token
    distilled.save(tmp_path / "model")
    loaded = ModelBundle.load(tmp_path / "model")
    assert loaded.vocabulary_map == student.vocabulary_map
    assert Meter(text, teacher).measure(loaded) == after


def test_a_teacher_or_data_that_the_map_does_not_lead_to(teacher: Any, student: Any, worded: Any) -> None:
    options, stranger = DistillOptions(steps=1), worded(seed=3)
    stranger.tokenizer.add_tokens(["<new>"])
    with pytest.raises(RecipeError) as caught:
        run(student, options, teacher=stranger, train=windows(student))
    for bundle in (stranger, teacher):  # found and needed are both named
        assert encoding_sha256(bundle.tokenizer)[:12] in str(caught.value)
    assert "the teacher's vocabulary has 352 entries, the student's 288" in str(caught.value)
    with pytest.raises(RecipeError, match=r"tokenizers differ: student .*, data "):
        run(student, options, teacher=teacher, train=windows(teacher))
    with pytest.raises(RecipeError, match="nothing says which token"):
        run(replace(student, vocabulary_map=None), options, teacher=teacher, train=windows(student))
