"""Answers sampled from anything that is executed token by token: a torch model or an exported artifact.

A prompt is computed once, however many answers are sampled from it: the cache is wound back to the prompt's end before
each, and only the answer's own tokens are computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwindle.errors import DataError, RecipeError
from dwindle.export.backends import ExecutedRunner
from dwindle.sampling import SamplingOptions, drawn

__all__ = ["Answer", "log_probability", "sampled_answers"]

_SEVERAL = 0.8
"""Temperature of several answers, where none is given."""


@dataclass(frozen=True)
class Answer:
    """One answer in ids, without the one that ended it."""

    ids: tuple[int, ...]
    log_probability: float
    """Sum over the tokens that were chosen, the end included, in nats."""
    tokens: int
    """Tokens that were computed for it, the end included."""
    end: int | None
    """The token it ended with; None where it was cut at the longest length or the context's end."""

    @property
    def mean_log_probability(self) -> float:
        """Return nats per chosen token.

        >>> Answer((5, 6), -1.5, 3, end=2).mean_log_probability
        -0.5
        """
        return self.log_probability / max(1, self.tokens)


def sampled_answers(
    runner: ExecutedRunner, prompt: Tensor, options: SamplingOptions, ends: Collection[int], count: int = 1
) -> Iterator[Answer]:
    """Yield `count` answers to the prompt ids [1, T].

    Raises RecipeError for fewer than one answer, or several of temperature 0; DataError for a prompt that is empty or
    leaves no room in the context.
    """
    if count < 1:
        raise RecipeError(f"best_of={count} (needed: at least 1).")
    if options.temperature is None:
        options = replace(options, temperature=0.0 if count == 1 else _SEVERAL)
    if count > 1 and not options.temperature:
        raise RecipeError(f"best_of={count} with temperature=0: all answers would be equal. Set a temperature above 0.")
    length = prompt.shape[1]
    if not 0 < length < runner.context:
        raise DataError(f"the prompt has {length:,} tokens; 1 to {runner.context - 1:,} fit into the context of "
                        f"{runner.context:,} with an answer behind them.")  # fmt: skip
    runner.reset()
    first = runner.step(prompt)[-1]
    for index in range(count):
        runner.rewind(length)
        yield _answer(runner, first, length, replace(options, seed=options.seed + index), frozenset(ends))


def _answer(
    runner: ExecutedRunner, logits: Tensor, length: int, options: SamplingOptions, ends: frozenset[int]
) -> Answer:
    generator = torch.Generator().manual_seed(options.seed)
    longest = min(options.max_tokens, runner.context - length)
    ids: list[int] = []
    total = 0.0
    while True:
        token, log_p = drawn(logits, options, generator)
        total += log_p
        if token in ends:
            return Answer(tuple(ids), total, len(ids) + 1, token)
        ids.append(token)
        if len(ids) == longest:
            return Answer(tuple(ids), total, len(ids), None)
        logits = runner.step(torch.tensor([[token]]))[-1]


def log_probability(runner: ExecutedRunner, prompt: Tensor, answer: Answer) -> float:
    """Return the nats per token that the runner's model gives an answer to a prompt, its end included, in one pass."""
    ids = [*answer.ids, *([] if answer.end is None else [answer.end])]
    text = torch.cat([prompt, torch.tensor([ids])], dim=1)
    runner.reset()
    log_p = runner.step(text[:, :-1])[prompt.shape[1] - 1 :].double().log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(ids)[:, None]).mean())
