r"""A few tokens that stand for a whole distribution without bias: threshold sampling of a teacher's predictions.

For one position with probabilities p and N = `draws`, a token v other than the most probable one is

    kept for certain, with the weight p[v]            if p[v] >= 1/N
    kept with the probability N * p[v], weight 1/N    otherwise

and the most probable token always has the weight that is missing to 1. Every weight then has the expectation p[v], so
the gradient of a loss that is linear in p (forward KL: q - p) has the exact gradient as its expectation. Keeping the
top k and renormalising has not: it is over-confident, whatever k (Anshumann et al. 2025, arXiv 2503.16870). Their cure
counts N draws from p with replacement. Sampling by a threshold (Duffield, Lund and Thorup 2007, arXiv cs/0509026) is
its importance sampling of least variance for the tokens it stores: what is probable carries no noise, and no token is
stored twice. N is the same at each position, which spends tokens where the teacher is unsure.

Which of the improbable tokens are kept is decided by one uniform number u per position: those whose stretch of their
cumulative sum holds a point (u + j) / N. That costs one pass over the vocabulary: sums of blocks first, then the few
blocks that hold a point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.errors import DataError

__all__ = ["SampledTokens", "sample_tokens"]

_BLOCK = 128
"""Tokens per partial sum."""


@dataclass(frozen=True)
class SampledTokens:
    """What is kept of n positions; rows ascend."""

    top1: Tensor
    """[n] most probable token."""
    entropy: Tensor
    """[n] in nats."""
    always: Tensor
    """[n, M] probability of the tokens asked for by name; 0 where such a token is the most probable one."""
    certain_rows: Tensor
    """[C] position of each token kept for certain."""
    certain_ids: Tensor
    certain_probabilities: Tensor
    drawn_rows: Tensor
    """[D] position of each token that was drawn; its weight is 1 / draws."""
    drawn_ids: Tensor


@torch.no_grad()
def sample_tokens(
    logits: Tensor, uniform: Tensor, *, draws: int, temperature: float = 1.0, always: tuple[int, ...] = ()
) -> SampledTokens:
    """Return the tokens that stand for softmax(logits / temperature); logits [n, V], `uniform` [n] in [0, 1).

    Raises DataError if a logit is no number.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    p, missing = torch.softmax(scaled, -1), -logits.shape[1] % _BLOCK
    if missing:
        p = torch.nn.functional.pad(p, (0, missing))
    blocks = p.view(len(p), -1, _BLOCK)
    largest = blocks.amax(-1)
    best = largest.argmax(-1, keepdim=True)
    top1 = best[:, 0] * _BLOCK + blocks.take_along_dim(best[..., None], 1)[:, 0].argmax(-1)
    entropy = _entropy(p[:, : logits.shape[1]], scaled, top1)
    p.scatter_(1, top1[:, None], 0.0)
    named = p[:, list(always)]
    p[:, list(always)] = 0.0
    rows, block = (largest >= 1 / draws).nonzero(as_tuple=True)
    hit, place = (blocks[rows, block] >= 1 / draws).nonzero(as_tuple=True)
    rows, ids = rows[hit], block[hit] * _BLOCK + place
    probabilities = p[rows, ids]
    p[rows, ids] = 0.0
    return SampledTokens(top1, entropy, named, rows, ids, probabilities, *_drawn(blocks, uniform, draws))


def _entropy(p: Tensor, scaled: Tensor, top1: Tensor) -> Tensor:
    """Return log sum exp(z) - sum p z, and - sum p log p where a logit is minus infinity (0 times it is no number)."""
    logarithm = scaled.gather(1, top1[:, None]) - p.gather(1, top1[:, None]).log()
    entropy: Tensor = logarithm[:, 0] - torch.linalg.vecdot(p, scaled)
    if not torch.isfinite(entropy).all():
        entropy = torch.special.entr(p).sum(-1)
        if not torch.isfinite(entropy).all():
            raise DataError("the teacher's logits are no finite numbers. Check its weights, or run it in float32.")
    return entropy.clamp_(min=0.0)


def _drawn(blocks: Tensor, uniform: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Return rows and ids of the tokens whose stretch of the cumulative sum of [n, blocks, 128] holds a point."""
    ends = blocks.sum(-1).double().cumsum(-1)
    points = (uniform.to(blocks.device, torch.float64)[:, None] + torch.arange(draws, device=blocks.device)) / draws
    rows, which = (points < ends[:, -1:]).nonzero(as_tuple=True)
    block = torch.searchsorted(ends, points, right=True)[rows, which]
    inside = blocks[rows, block].double()
    left = points[rows, which] - torch.nn.functional.pad(ends, (1, 0))[rows, block]
    reached = (inside.cumsum(-1) - inside <= left[:, None]) & (inside > 0)
    places = torch.arange(_BLOCK, device=blocks.device)
    return rows, block * _BLOCK + torch.where(reached, places, 0).amax(-1)
