"""How the next token is chosen from a model's logits.

    temperature 0    the most likely token
    else             p = softmax(logits / temperature), of which the `top_k` most likely tokens are kept, of these the
                     fewest whose probabilities sum to `top_p` (nucleus sampling, Holtzman 2019, arXiv 1904.09751), and
                     one is drawn

The log probability that is told of a token is the model's own, at temperature 1 and over the whole vocabulary, however
it was chosen: answers sampled with different settings compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.errors import RecipeError

__all__ = ["SamplingOptions", "drawn"]


@dataclass(frozen=True)
class SamplingOptions:
    """How a text goes on, and when it ends."""

    temperature: float | None = None
    """0 takes the most likely token; None: 0 for one answer, 0.8 where several are sampled."""
    top_k: int | None = None
    """Draw from so many most likely tokens; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this share."""
    max_tokens: int = 128
    """Longest answer."""
    seed: int = 0
    """Seed of the first answer; each further one has the next."""

    def __post_init__(self) -> None:
        wrong = []
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            wrong.append(f"temperature={self.temperature!r} (needed: a number from 0 on)")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            wrong.append(f"top_k={self.top_k!r} (needed: a whole number of at least 1)")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p={self.top_p!r} (needed: above 0, at most 1)")
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            wrong.append(f"max_tokens={self.max_tokens!r} (needed: a whole number of at least 1)")
        if wrong:
            raise RecipeError(f"sampling: {'; '.join(wrong)}.")


def drawn(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> tuple[int, float]:
    """Return (token, log probability) for logits [V].

    >>> drawn(torch.tensor([0.0, 1.0, 0.0]), SamplingOptions(temperature=0), torch.Generator())[0]
    1
    """
    log_p = logits.double().log_softmax(-1)
    if not options.temperature:
        token = int(log_p.argmax())
        return token, float(log_p[token])
    kept, tokens = (log_p / options.temperature).sort(descending=True, stable=True)
    shares = kept.softmax(-1)
    count = len(shares) if options.top_k is None else min(options.top_k, len(shares))
    shares = shares[:count]
    before = shares.cumsum(0) - shares
    shares = shares * (before < options.top_p * shares.sum())
    token = int(tokens[int(torch.multinomial(shares, 1, generator=generator))])
    return token, float(log_p[token])
