"""The stage that keeps what is worth a student's tokens: documents within a range of the teacher's loss, or of the KL
that is left between teacher and student (`model_scores`), or both.

Scores are written to a spool as they come and ranges of quantiles are found when all are known: memory is 16 bytes per
document. A document too short for a prediction is dropped.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dwindle.data.curation.keep_range import KeepRange, quantile
from dwindle.data.curation.kept import kept_in_order
from dwindle.data.curation.spool import Spool
from dwindle.data.curation.stage import StageRun
from dwindle.data.document import Document
from dwindle.errors import RecipeError

if TYPE_CHECKING:
    from dwindle.data.curation.model_scores import ModelScores

__all__ = ["TeacherScore"]


@dataclass(frozen=True)
class TeacherScore:
    """Keeps documents by how a teacher, and a student, predict them."""

    teacher: str
    """Folder or Hugging Face id of the teacher."""
    loss: KeepRange | None = None
    """Range of the teacher's nats/token that is kept, as in 1.5..4 or 5%..95%."""
    kl: KeepRange | None = None
    """Range of KL(teacher ‖ student) in nats/token that is kept; needs a student."""
    student: str | None = None
    """Folder or Hugging Face id of the student."""
    most_tokens: int = 512
    """A document is scored by its first so many tokens."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    torch_device: str = "cpu"
    """Where the models run."""

    def __post_init__(self) -> None:
        for name in ("loss", "kl"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, KeepRange.of(given))
        wrong = []
        if self.loss is None and self.kl is None:
            wrong.append("neither loss nor kl has a range (needed: one, as in loss=5%..95%)")
        if (self.kl is None) != (self.student is None):
            wrong.append("kl and student go together (needed: both or none)")
        if not self.most_tokens >= 2 or not self.batch_tokens >= 2:
            wrong.append(f"most_tokens={self.most_tokens}, batch_tokens={self.batch_tokens} (needed: at least 2)")
        if wrong:
            raise RecipeError(f"teacher_score: {'; '.join(wrong)}.")

    @property
    def name(self) -> str:
        """Return what the card calls the stage."""
        return "teacher_score"

    def scorer(self) -> ModelScores:
        """Return the loaded models."""
        from dwindle.bundle import ModelBundle
        from dwindle.data.curation.model_scores import ModelScores

        teacher, student = (
            None if place is None else ModelBundle.load(place, torch_device=self.torch_device)
            for place in (self.teacher, self.student)
        )
        assert teacher is not None
        return ModelScores(teacher, student, most_tokens=self.most_tokens, batch_tokens=self.batch_tokens)

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield the documents within the ranges, their scores in `how`."""
        yield from self.filtered(documents, run, self.scorer())

    def filtered(self, documents: Iterator[Document], run: StageRun, scorer: ModelScores) -> Iterator[Document]:
        """Yield what `run` does, by models that are loaded already."""
        spool = Spool(run.folder / "documents.jsonl")
        try:
            losses, divergences = array("d"), array("d")

            def texts() -> Iterator[str]:
                for document in documents:
                    spool.add(document)
                    yield document.text

            for score in scorer.of(texts()):
                losses.append(score.loss)
                divergences.append(math.nan if score.kl is None else score.kl)
            yield from kept_in_order(self._decided(spool, run, losses, divergences))
        finally:
            spool.close()

    def _decided(self, spool: Spool, run: StageRun, losses: array[float],
                 divergences: array[float]) -> Iterator[tuple[Document, bool]]:  # fmt: skip
        judged = []
        for name, wanted, scores in (("loss", self.loss, losses), ("kl", self.kl, divergences)):
            known = sorted(score for score in scores if not math.isnan(score))
            if known and (wanted is not None or name == "loss"):
                shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
                run.count.details[f"{name}_quantiles"] = {f"{100 * s:g}%": round(quantile(known, s), 4) for s in shares}
            if wanted is not None:
                low, high = wanted.scores(known)
                run.count.details[f"{name}_kept"] = [_end(low), _end(high)]
                judged.append((name, low, high, scores))
        for index, document in enumerate(spool):
            why = next((reason for one in judged if (reason := _reason(one[3][index], *one[:3]))), None)
            if why is not None:
                run.count.drop(document, why, f"{losses[index]:.3f} nats/token, KL {divergences[index]:.3f}")
            told = {name: round(scores[index], 3) for name, _, _, scores in judged}
            yield replace(document, how={**document.how, "teacher_score": told}), why is None


def _end(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _reason(score: float, name: str, low: float, high: float) -> str | None:
    if math.isnan(score):
        return "too short to score"
    return f"{name} below the range" if score < low else f"{name} above the range" if score > high else None
