"""What a student in training is worth: nats/token, KL, agreement on held-out text, and a sample of what it writes.

The numbers are those of `dwindle.measure` on the first windows of the evaluation text, short enough to be taken often.
The student is called as in training, so that a sharded one is measured in all processes together. Samples are the most
probable continuations of the text's own beginnings, one JSON line each in samples.jsonl, beside run.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.continuation import continued
from dwindle.distill.head import HeadStates, head_of, inside
from dwindle.distill.teacher_signal import TeacherSignal
from dwindle.sharding import Processes
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Probe"]

TOKENS = 8192
"""Tokens of the evaluation text that are looked at, at most."""
ROWS = 512
"""Positions whose logits exist at a time."""
SAMPLES = 2
SAMPLE_PROMPT, SAMPLE_TOKENS = 16, 64


class Probe:
    """Measures a student on one text against one teacher; the `evaluate` of the training loop."""

    def __init__(
        self, evaluation: TokenSet, teacher: TeacherSignal | None, context: int,
        tokenizer: PreTrainedTokenizerBase, folder: Path | None = None,
    ) -> None:  # fmt: skip
        evaluation.require("evaluation")
        ids = evaluation.ids[0, : TOKENS + 1].long()
        self._windows = [ids[start : start + context + 1] for start in range(0, len(ids) - 1, context)]
        self._teacher, self._tokenizer, self._folder = teacher, tokenizer, folder

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return nats per token, and with a teacher the KL and the agreement, over all predictions."""
        device = next(model.parameters()).device
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for window in self._windows:
            batch = window[None].to(device)
            sums += self._window(model, batch[:, :-1], batch[0, 1:])
            count += batch.shape[1] - 1
        self._write_samples(model, step)
        names = ("nats_per_token", "kl_nats_per_token", "top1_agreement")[: 1 if self._teacher is None else 3]
        return {name: float(total) / count for name, total in zip(names, sums, strict=False)}

    def _window(self, model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the sums over one window: -log q(label), KL, agreements."""
        source = None if self._teacher is None else self._teacher.targets(ids).sources[0]

        def forward(read: Tensor) -> Tensor:
            student: Any = model
            found = student.get_decoder()(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False)
            hidden, head = found.last_hidden_state.flatten(0, 1), head_of(student)
            sums = torch.zeros(3, dtype=torch.float64)
            for start in range(0, len(hidden), ROWS):
                rows = slice(start, start + ROWS)
                log_q = HeadStates(hidden[rows], head).logits().float().log_softmax(-1)
                sums[0] -= log_q.gather(1, labels[rows, None]).double().sum().cpu()
                if source is None:
                    continue
                log_p = _logits(source, rows).to(log_q.device).float().log_softmax(-1)
                sums[1] += (log_p.exp() * (log_p - log_q)).double().sum().cpu()
                sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().cpu()
            return sums

        return inside(model, forward, ids)

    def _write_samples(self, model: nn.Module, step: int) -> None:
        prompts = [window[:SAMPLE_PROMPT] for window in self._windows[:SAMPLES] if len(window) > SAMPLE_PROMPT]
        if not prompts:
            return
        length = min(SAMPLE_PROMPT + SAMPLE_TOKENS, max(len(window) for window in self._windows))
        texts = continued(model, torch.stack(prompts), length, temperature=0)
        if self._folder is None or not Processes.current(texts.device).first:
            return
        with (self._folder / "samples.jsonl").open("a", encoding="utf-8") as log:
            for prompt, text in zip(prompts, texts, strict=True):
                told = {"step": step, "prompt": self._tokenizer.decode(prompt),
                        "text": self._tokenizer.decode(text[len(prompt) :])}  # fmt: skip
                log.write(json.dumps(told, ensure_ascii=False) + "\n")


def _logits(source: HeadStates | Tensor, rows: slice) -> Tensor:
    return source[rows] if isinstance(source, Tensor) else HeadStates(source.hidden[rows], source.head).logits()
