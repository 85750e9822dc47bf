"""A second model's opinion on what was written: how likely it finds it, or whether it says yes to it.

    log_probability    1/n * sum of log q(answer token | question, answer so far)          of the whole text without one
    yes_no             q(yes) / (q(yes) + q(no)) behind the question whether the answer is right

Rows are read together, padded behind. Memory: `core.measure`'s slices of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dwindle.data.synthesis.kinds import Written
from dwindle.data.synthesis.options import VerifierOptions
from dwindle.evaluation_mode import evaluating
from dwindle.measure import logit_slices
from dwindle.tokenization import adds_bos, encode_plain

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Verifier"]

_SLICE_BYTES = 64 << 20
_ROWS = 16
_QUESTION = "{asked}\n\nIs the last answer right? Say yes or no."
_PLAIN_QUESTION = "{asked}\n\nIs the answer right (yes or no)? Answer:"


class Verifier:
    """Scores pieces with one model."""

    def __init__(self, bundle: ModelBundle, options: VerifierOptions) -> None:
        self.bundle, self.options = bundle, options
        self._slice = max(1, _SLICE_BYTES // (4 * bundle.anatomy.vocab))
        self._bos = [int(bundle.tokenizer.bos_token_id)] if adds_bos(bundle.tokenizer) else []

    def scores(self, pieces: Sequence[Written]) -> list[float]:
        """Return the score of each piece: a mean log-probability, or a probability of yes."""
        if self.options.asks == "log_probability":
            rows = [self._pair(f"{p.prompt}\n\n", p.answer) if p.prompt else self._pair("", p.text) for p in pieces]
            return [total / max(1, count) for total, count in self._log_probabilities(rows)]
        asked = [f"Question: {p.prompt}\nAnswer: {p.answer}" if p.prompt else p.text for p in pieces]
        rows = [self._asked(text, word) for text in asked for word in ("yes", "no")]
        totals = torch.tensor([total for total, _ in self._log_probabilities(rows)], dtype=torch.float64).view(-1, 2)
        return [float(p) for p in totals.softmax(-1)[:, 0]]

    def _pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        before, behind = encode_plain(self.bundle.tokenizer, [context, answer])
        room = self.bundle.anatomy.context
        behind = behind[: room - 1]
        kept = room - len(behind) - len(self._bos)
        return self._bos + before[len(before) - min(len(before), max(0, kept)) :], behind

    def _asked(self, text: str, word: str) -> tuple[list[int], list[int]]:
        tokenizer = self.bundle.tokenizer
        if tokenizer.chat_template is None:
            return self._pair(_PLAIN_QUESTION.format(asked=text), f" {word}")
        message = [{"role": "user", "content": _QUESTION.format(asked=text)}]
        ids = [int(i) for i in tokenizer.apply_chat_template(message, add_generation_prompt=True)]
        behind = encode_plain(tokenizer, [word])[0]
        return ids[-(self.bundle.anatomy.context - len(behind)) :], behind

    @torch.inference_mode()
    def _log_probabilities(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """Return for each (context, answer) the summed log-probability of the answer's tokens and their number."""
        found: list[tuple[float, int]] = []
        slices = logit_slices(self.bundle)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            longest = max(2, *(len(before) + len(behind) for before, behind in part))
            ids = torch.zeros(len(part), longest, dtype=torch.long)
            counts = torch.zeros(len(part), longest - 1, dtype=torch.float64)
            for index, (before, behind) in enumerate(part):
                end = len(before) + len(behind)
                ids[index, :end] = torch.tensor(before + behind)
                counts[index, max(0, len(before) - 1) : end - 1] = 1
            wanted = torch.split(ids[:, 1:].flatten(), self._slice)
            with evaluating(self.bundle.model):
                logs = [
                    torch.log_softmax(logits, -1).gather(1, right.to(logits.device)[:, None])[:, 0].double().cpu()
                    for logits, right in zip(slices(ids[:, :-1], self._slice), wanted, strict=True)
                ]
            sums = (torch.cat(logs).view(len(part), -1) * counts).sum(1)
            found += [(float(total), int(count)) for total, count in zip(sums, counts.sum(1), strict=True)]
        return found
