"""Several teachers in a recipe: the mean of their probabilities, by their shares; who does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.distill import DistillOptions, TeacherSpec, run
from dwindle.errors import RecipeError
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

Factory = Callable[..., Any]


def tokens(bundle: Any) -> TokenSet:
    ids = torch.randint(3, bundle.anatomy.vocab, (8, 13), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "train", "random", "0" * 64, 1, encoding_sha256(bundle.tokenizer))


def test_the_student_follows_the_mean_of_their_probabilities(tiny_bundle: Factory, tmp_path: Path) -> None:
    first, second, student = (tiny_bundle(seed=seed, initializer_range=0.3) for seed in (1, 2, 3))
    second.save(tmp_path / "second")
    options = DistillOptions(steps=1, batch_size=8, other_teachers=(TeacherSpec(str(tmp_path / "second"), 0.3),))
    done, record = run(student, options, teacher=first, train=tokens(student))
    ids = tokens(student).ids[:, :-1]
    with torch.no_grad():
        p, other, q = (b.model(input_ids=ids).logits.flatten(0, 1).softmax(-1) for b in (first, second, student))
    mean = 0.7 * p + 0.3 * other
    assert record.details["first_loss"] == pytest.approx((mean * (mean / q).log()).sum(-1).mean().item(), rel=1e-4)
    told = json.dumps(done.lineage.to_json())
    assert second.content_sha256 in told
    assert str(tmp_path) not in told


def test_teachers_that_do_not_fit_are_named(tiny_bundle: Factory, tmp_path: Path) -> None:
    first, student = tiny_bundle(seed=1), tiny_bundle(seed=3)
    tiny_bundle(seed=2, vocab_size=student.anatomy.vocab - 8).save(tmp_path / "narrow")
    narrow = DistillOptions(steps=1, batch_size=8, other_teachers=(TeacherSpec(str(tmp_path / "narrow"), 0.3),))
    with pytest.raises(RecipeError, match=r"teacher .*narrow: the teacher's vocabulary has"):
        run(student, narrow, teacher=first, train=tokens(student))
    tiny_bundle(seed=2, max_position_embeddings=8).save(tmp_path / "short")
    short = DistillOptions(steps=1, batch_size=8, other_teachers=(TeacherSpec(str(tmp_path / "short"), 0.3),))
    with pytest.raises(RecipeError, match=r"teacher .*short: windows predict 12 tokens, its context is 8"):
        run(student, short, teacher=first, train=tokens(student))
    tiny_bundle(seed=2).save(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    rules = json.loads(file.read_text(encoding="utf-8"))
    vocab = rules["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(rules), encoding="utf-8")
    other = DistillOptions(steps=1, batch_size=8, other_teachers=(TeacherSpec(str(tmp_path / "other"), 0.3),))
    with pytest.raises(RecipeError, match=r"teacher .*other: .*tokenizer"):
        run(student, other, teacher=first, train=tokens(student))
    with pytest.raises(RecipeError, match=r"share=1\.5 of teacher a"):
        TeacherSpec("a", 1.5)
    pair = (TeacherSpec("a", 0.6), TeacherSpec("b", 0.5))
    with pytest.raises(RecipeError, match=r"shares of 1\.1 in all"):
        DistillOptions(other_teachers=pair)
    with pytest.raises(RecipeError, match="and a cache"):
        replace(DistillOptions(cache="c"), other_teachers=pair[:1])  # type: ignore[arg-type]
