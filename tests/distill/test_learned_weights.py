"""Distillation whose data follow the excess loss, and go on bit for bit after a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle import distill
from dwindle.data import DataOptions, training_set
from dwindle.data.document import Document
from dwindle.data.packing import pack_evaluation
from dwindle.distill import CacheOptions, DistillOptions
from dwindle.distill.learned_weights import learned_order
from dwindle.distill.teacher_model import Teacher
from dwindle.errors import RecipeError
from dwindle.measure import Meter

OPTIONS = DistillOptions(steps=9, batch_size=4, learning_rate=1e-2, checkpoint_every=4, log_every=3)


@pytest.fixture
def tokens(tmp_path: Path, tiny_tokenizer: Any) -> Any:
    for name, word in (("a", "cat sat "), ("b", "0123456 ")):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{word}{i} " * 6 for i in range(40)))
    places = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    return training_set(
        DataOptions(places, weights=(1, 1), learn_weights_every=3, held_out_windows=2, context=16), tiny_tokenizer, 64
    )


def test_weights_follow_the_losses_of_student_and_teacher(tiny_bundle: Callable[..., Any], tokens: Any) -> None:
    teacher, student = tiny_bundle("llama"), tiny_bundle("llama", seed=1)
    order = learned_order(tokens, 0, Teacher.of(teacher), None)
    assert order is not None
    for bundle, found in ((teacher, order.reference), (student, order._losses(student.model))):
        for held, loss in zip(tokens.mixture.held_out, found, strict=True):
            rows = [
                replace(pack_evaluation("ab", [Document("ab", "s")], bundle.tokenizer), ids=row[None].long())
                for row in held
            ]
            assert loss == pytest.approx(
                sum(Meter(row, context=16).measure(bundle).nats_per_token for row in rows) / 2, abs=1e-4
            )


def test_a_run_tells_its_weights_and_resumes_exactly(
    tiny_bundle: Callable[..., Any], tokens: Any, tmp_path: Path
) -> None:
    teacher, student = tiny_bundle("llama"), tiny_bundle("llama", seed=1)
    whole, record = distill.run(student, OPTIONS, teacher=teacher, train=tokens, folder=tmp_path / "whole")
    told = record.details["mixture"]
    assert [entry["step"] for entry in told["history"]] == [3, 6]
    assert all(sum(entry["weights"]) == pytest.approx(1) for entry in told["history"])
    assert sum(p * n for p, n in zip(told["passes"], tokens.mixture.windows, strict=True)) == pytest.approx(36)

    def killed(line: Any) -> None:
        if line.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill.run(student, OPTIONS, teacher=teacher, train=tokens, folder=tmp_path / "killed", on_step=killed)
    again, resumed = distill.run(student, OPTIONS, teacher=teacher, train=tokens, folder=tmp_path / "killed")
    assert resumed.details["mixture"] == told
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_cache_cannot_follow_and_is_not_begun(tiny_bundle: Any, tokens: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, cache=CacheOptions(str(tmp_path / "cache")))
    with pytest.raises(RecipeError, match="learn_weights_every with a logit cache"):
        distill.run(tiny_bundle("llama", seed=3), options, teacher=tiny_bundle("llama"), train=tokens)
    assert not (tmp_path / "cache").exists()
    assert learned_order(replace(tokens, mixture=None), 0, None, None) is None
