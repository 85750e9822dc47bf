"""How well models predict each of many texts: nats/token, and KL from a teacher to its student.

    loss = 1/(n-1) * sum of -log p(x[i+1] | x up to i)          p the teacher's
    kl   = 1/(n-1) * sum over positions of sum over the vocabulary of p log(p/q)          q the student's

The loss says what a text is to somebody who has read much; the KL says what the student can still learn of it, in the
very quantity distillation lowers. A text is scored by its first `most_tokens` tokens. Texts of like length are read
together, padded behind, which causal attention does not see. Memory: `core.measure`'s slices of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.evaluation_mode import evaluating
from dwindle.measure import LogitSlices, logit_slices
from dwindle.tokenization import encode, encoding_sha256
from dwindle.vocabulary_map import map_between

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["ModelScores", "TextScore"]

_SLICE_BYTES = 64 << 20
_TOGETHER = 256
"""Texts that are sorted by length together."""


@dataclass(frozen=True)
class TextScore:
    """What was measured of one text; NaN for one with no prediction in it."""

    tokens: int
    """Tokens it was scored by."""
    loss: float
    """Nats/token of the teacher."""
    kl: float | None = None
    """KL(teacher ‖ student) in nats/token; None without a student."""


class ModelScores:
    """Scores texts under a teacher, and under a student if there is one."""

    def __init__(self, teacher: ModelBundle, student: ModelBundle | None = None, *, most_tokens: int = 512,
                 batch_tokens: int = 8192) -> None:  # fmt: skip
        models = [teacher] if student is None else [teacher, student]
        self._models = models
        self._tokenizer = models[-1].tokenizer
        self._most = min(most_tokens, *(m.anatomy.context for m in models))
        self._batch_tokens = batch_tokens
        try:
            mapped = None if student is None else map_between(teacher, student)
        except UnsupportedModel as error:
            raise RecipeError(f"scoring: {error}") from error
        if student is not None and mapped is None:
            ours, theirs = encoding_sha256(student.tokenizer), encoding_sha256(teacher.tokenizer)
            if ours != theirs:
                raise RecipeError("scoring: teacher and student have different tokenizers (a KL needs the same ones). "
                                  "Score by the teacher alone, or take a student made of it.")  # fmt: skip
        self._teacher = logit_slices(teacher, mapped)
        self._student = None if student is None else logit_slices(student)
        self._slice = max(1, _SLICE_BYTES // (4 * models[-1].anatomy.vocab))

    def of(self, texts: Iterable[str]) -> Iterator[TextScore]:
        """Yield the score of each text, in order."""
        waiting: list[str] = []
        for text in texts:
            waiting.append(text)
            if len(waiting) == _TOGETHER:
                yield from self._scored(waiting)
                waiting = []
        if waiting:
            yield from self._scored(waiting)

    @torch.inference_mode()
    def _scored(self, texts: Sequence[str]) -> list[TextScore]:
        rows = [encode(self._tokenizer, text[: 32 * self._most])[: self._most] for text in texts]
        found = [TextScore(len(row), float("nan"), None if self._student is None else float("nan")) for row in rows]
        order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: (len(rows[i]), i))
        while order:
            count = max(1, self._batch_tokens // len(rows[order[-1]]))
            batch, order = order[-count:], order[:-count]
            for index, score in zip(batch, self._batch([rows[i] for i in batch]), strict=True):
                found[index] = score
        return found

    def _batch(self, rows: list[list[int]]) -> list[TextScore]:
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, values in zip(ids, rows, strict=True):
            row[: len(values)] = torch.tensor(values)
        targets = ids[:, 1:].flatten()
        counted = torch.tensor([len(row) - 1 for row in rows])
        with _all_evaluating(self._models):
            losses, divergences = self._positions(ids[:, :-1], targets)
        inside = torch.arange(longest - 1)[None] < counted[:, None]
        loss = (losses.view(len(rows), -1) * inside).sum(1) / counted
        kl = None if divergences is None else (divergences.view(len(rows), -1) * inside).sum(1) / counted
        return [TextScore(len(row), float(loss[i]), None if kl is None else float(kl[i])) for i, row in enumerate(rows)]

    def _positions(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return float64 [B * T] losses and divergences of every position, padded ones too."""
        parts, divergences = [], []
        wanted = torch.split(targets, self._slice)
        student = None if self._student is None else _slices(self._student, ids, self._slice)
        for logits, right in zip(_slices(self._teacher, ids, self._slice), wanted, strict=True):
            log_p = torch.log_softmax(logits, -1)
            parts.append(-log_p.gather(1, right.to(log_p.device)[:, None])[:, 0].double().cpu())
            if student is not None:
                log_q = torch.log_softmax(next(student).to(log_p.device), -1)
                divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
        return torch.cat(parts), torch.cat(divergences) if divergences else None


def _slices(model: LogitSlices, ids: Tensor, count: int) -> Iterator[Tensor]:
    return iter(model(ids, count))


def _all_evaluating(models: Sequence[ModelBundle]) -> ExitStack:
    stack = ExitStack()
    for bundle in models:
        stack.enter_context(evaluating(bundle.model))
    return stack
