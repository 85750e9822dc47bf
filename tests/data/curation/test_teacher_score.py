"""Scores are the measures of `core.measure`, one text at a time; ranges cut at both ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.data.curation.keep_range import KeepRange
from dwindle.data.curation.model_scores import ModelScores
from dwindle.data.curation.stage import StageRun, run_chain
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.curation.teacher_score import TeacherScore
from dwindle.data.document import Document
from dwindle.data.packing import pack_evaluation
from dwindle.errors import RecipeError
from dwindle.measure import Meter

TEXTS = ["a cat sat on a mat", "", "dog", "the dog ran to the town and sang a long song", "x" * 200, "tree " * 9]


def test_a_score_is_what_the_meter_measures(tiny_bundle: Callable[..., Any]) -> None:
    teacher, student = tiny_bundle("llama"), tiny_bundle("llama", seed=1)
    found = list(ModelScores(teacher, student, batch_tokens=64).of(TEXTS))
    for text, score in zip(TEXTS, found, strict=True):
        if not text:
            assert math.isnan(score.loss)
            continue
        one = pack_evaluation(text, [Document(text, "t")], teacher.tokenizer, 64)
        of_teacher, of_student = Meter(one).measure(teacher), Meter(one, teacher).measure(student)
        assert score.loss == pytest.approx(of_teacher.nats_per_token, abs=1e-4)
        assert score.kl == pytest.approx(of_student.kl_nats_per_token, abs=1e-4)
        assert score.tokens == min(64, len(text) + 1)


def test_scores_leave_the_models_and_the_random_state_alone(tiny_bundle: Callable[..., Any]) -> None:
    teacher = tiny_bundle("llama")
    teacher.model.train()
    state = torch.get_rng_state()
    list(ModelScores(teacher).of(["some text"]))
    assert teacher.model.training
    assert torch.equal(state, torch.get_rng_state())


def test_other_tokens_cannot_be_compared(tiny_bundle: Callable[..., Any], worded: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="different tokenizers"):
        ModelScores(tiny_bundle("llama", vocab_size=352), worded())


def documents() -> list[Document]:
    return [Document(f"{i} {'word ' * (i % 7)}{'z' * (i % 5)}", "s", continues=i % 3 > 0, id=str(i)) for i in range(60)]


def test_documents_outside_the_range_are_dropped_with_the_reason(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    stage = TeacherScore("unused", loss="10%..80%", kl=KeepRange(0.0, None), student="unused")  # type: ignore[arg-type]
    run = StageRun(StageCount("teacher_score"), tmp_path)
    scorer = ModelScores(tiny_bundle("llama"), tiny_bundle("llama", seed=1))
    kept = list(stage.filtered(iter(documents()), run, scorer))
    scores = [score.loss for score in scorer.of(d.text for d in documents())]
    low, high = KeepRange.of("10%..80%").scores(scores)
    wanted = [d.id for d, score in zip(documents(), scores, strict=True) if low <= score <= high]
    assert [d.id for d in kept] == wanted
    assert run.count.reasons == {"loss below the range": 6, "loss above the range": 12}
    assert set(kept[0].how["teacher_score"]) == {"loss", "kl"}
    ids = [int(d.id) for d in kept]
    for before, document in zip([-2, *ids], kept, strict=False):
        assert document.continues == (int(document.id) % 3 > 0 and int(document.id) == before + 1)
    assert list(tmp_path.iterdir()) == []


def test_the_stage_loads_its_models(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    given = [*documents()[:20], Document("", "s", id="empty")]
    out, counts = run_chain(
        [TeacherScore(str(tmp_path / "teacher"), KeepRange(None, 100.0))], iter(given), folder=tmp_path
    )
    assert len(list(out)) == 20
    assert counts[0].reasons == {"too short to score": 1}
    assert counts[0].details["loss_kept"] == [None, 100.0]


@pytest.mark.parametrize(("options", "said"), [
    ({}, "neither loss nor kl"),
    ({"kl": KeepRange(0.0, 1.0)}, "kl and student go together"),
    ({"loss": KeepRange(0.0, 1.0), "student": "s"}, "kl and student go together"),
    ({"loss": KeepRange(0.0, 1.0), "most_tokens": 1}, "at least 2"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TeacherScore("t", **options)
