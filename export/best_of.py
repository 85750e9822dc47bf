"""The best of several answers, and what sampling more of them buys.

    checker            the answers that pass, of these the most likely; where none passes, the most likely of all
    log-probability    the answer with the highest mean log probability of its tokens
    reward             the answer that an adapter favours most over its base, per token:

        r(x, y) = 1 / |y| (log p_adapter(y | x) - log p_base(y | x))

The last is the implicit reward of DPO (Rafailov 2023, arXiv 2305.18290, equation 5, with beta = 1 and divided by the
length), so any adapter trained on preferences is a reward model; it costs two more passes over each answer.

Accuracy against N counts a prompt as solved at N if the answer picked from its first N is right, judged by the checker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dwindle.checkers import Verdict
from dwindle.export.backends import ExecutedRunner
from dwindle.export.generation import Answer, log_probability

__all__ = ["Candidate", "Curve", "best", "budgets", "curve", "reward_scores"]


@dataclass(frozen=True)
class Candidate:
    """An answer with its text and what is known of it."""

    answer: Answer
    text: str
    verdict: Verdict | None = None
    """What the checker says."""
    reward: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Return what the best has most of, by the verifier that judged it."""
        if self.reward is not None:
            return self.reward, 0.0
        return float(self.verdict.passed) if self.verdict is not None else 0.0, self.answer.mean_log_probability


@dataclass(frozen=True)
class Curve:
    """Accuracy and cost at one N."""

    n: int
    accuracy: float | None
    """Share of prompts whose picked answer is right; None without a checker."""
    solved: float | None
    """Share of prompts with a right answer among their N: what a perfect verifier would reach."""
    tokens: float
    """Sampled for a prompt, on average."""
    verifier_tokens: float
    """Computed by the verifier for a prompt, on average."""


def best(candidates: Sequence[Candidate], by_checker: bool) -> int:
    """Return the place of the best candidate; the first of equals."""

    def rank(place: int) -> tuple[float, float]:
        one = candidates[place]
        return one.rank if by_checker or one.reward is not None else (0.0, one.answer.mean_log_probability)

    return max(range(len(candidates)), key=rank)


def reward_scores(runner: ExecutedRunner, prompt: Tensor, answers: Sequence[Answer], adapter: str) -> list[float]:
    """Return the rewards of answers by an adapter that the runner has loaded; the base is active afterwards."""

    def scored(name: str | None) -> list[float]:
        runner.activate(name)
        return [log_probability(runner, prompt, answer) for answer in answers]

    favoured = scored(adapter)
    return [a - b for a, b in zip(favoured, scored(None), strict=True)]


def budgets(largest: int) -> list[int]:
    """Return 1, 2, 4 ... up to and including `largest`.

    >>> budgets(6), budgets(1)
    ([1, 2, 4, 6], [1])
    """
    powers = [1]
    while 2 * powers[-1] < largest:
        powers.append(2 * powers[-1])
    return powers if powers[-1] == largest else [*powers, largest]


def curve(prompts: Sequence[Sequence[Candidate]], pick: Callable[[Sequence[Candidate]], int],
          verifier_passes: int = 0) -> list[Curve]:  # fmt: skip
    """Return a row for each budget over the candidates of every prompt, in the order they were sampled.

    `verifier_passes` is how often the verifier computes each answer.
    """
    rows = []
    for n in budgets(len(prompts[0])):
        right = solved = tokens = 0
        judged = all(one.verdict is not None for found in prompts for one in found)
        for found in prompts:
            tokens += sum(one.answer.tokens for one in found[:n])
            verdicts = [one.verdict.passed for one in found[:n] if one.verdict is not None]
            right += judged and verdicts[pick(found[:n])]
            solved += any(verdicts)
        count = len(prompts)
        rows.append(Curve(n, right / count if judged else None, solved / count if judged else None, tokens / count,
                          verifier_passes * tokens / count))  # fmt: skip
    return rows
