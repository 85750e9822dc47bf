"""The KL that many quantized linears cause together: measured on windows held apart, and predicted from their sum.

Costs of single linears do not simply add. To second order they would but for their cross terms; beyond it a disturbed
block makes the next one's error weigh more. On babyllama-105 (palettes by LNQ) the joint KL is 1.02, 1.09, 1.13 and
1.42 times the sum at 6, 4, 3 and 2 bits: a smooth curve in the sum. So a few *anchors*, plans with the same bits
everywhere that are measured jointly (one run of the model each), give the curve, and a plan between them is predicted
by interpolation in both logarithms: joint = a sum^b between two anchors, b = 1 below the smallest.

`JointKL` also measures the costs *around* a plan: one linear at a time takes another choice while all others stay as
planned. Blocks in front of it need not be run again, so a choice costs the blocks from its own to the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.quantize.layer_plan import LayerFormat
from dwindle.time_left import TimeLeft
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["JointCurve", "JointKL"]

_log = logging.getLogger("dwindle")

_BATCH_TOKENS = 2048
"""Tokens that go through the blocks at once, in whole windows, at least one."""
_SLICE_BYTES = 64 << 20
_FIRST_SHARE = 4
"""One window in so many is measured for every choice; the rest only where it can matter."""
_SMALL = 0.1
"""A choice that costs less than this share of the mean linear's at the same bits is not measured further."""


@dataclass(frozen=True)
class JointCurve:
    """The joint KL as a function of the summed costs, through measured anchors (sum, joint KL), ascending.

    >>> curve = JointCurve.through([(0.01, 0.011), (0.1, 0.15)])
    >>> [round(curve.joint(total), 4) for total in (0.001, 0.01, 0.1)]
    [0.0011, 0.011, 0.15]
    """

    anchors: tuple[tuple[float, float], ...] = ()

    @classmethod
    def through(cls, anchors: Sequence[tuple[float, float]]) -> JointCurve:
        """Return the curve; anchors that are not positive tell nothing and are left out."""
        return cls(tuple(sorted((total, joint) for total, joint in anchors if total > 0 and joint > 0)))

    def joint(self, total: float) -> float:
        """Return the predicted joint KL of a plan whose costs sum to `total`."""
        if not self.anchors or total <= 0:
            return total
        if total <= self.anchors[0][0] or len(self.anchors) == 1:
            return total * self.anchors[0][1] / self.anchors[0][0]
        above = next((i for i, (anchor, _) in enumerate(self.anchors) if anchor >= total), len(self.anchors) - 1)
        (x0, y0), (x1, y1) = self.anchors[above - 1], self.anchors[above]
        if x0 == x1:
            return y1
        return float(y0 * (total / x0) ** (math.log(y1 / y0) / math.log(x1 / x0)))


class JointKL:
    """KL(unquantized || quantized) in nats/token over windows ids [N, T] that nothing else was fitted on."""

    def __init__(self, blocks: DecoderBlocks, ids: Tensor) -> None:
        self._blocks, self._ids = blocks, ids
        anatomy = blocks.anatomy
        self._layers = anatomy.layers
        self._names = [list(anatomy.parts(layer).values()) for layer in range(anatomy.layers)]
        self._batches = list(torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1])))
        self._rows = max(1, _SLICE_BYTES // (4 * anatomy.vocab))
        with torch.no_grad():
            self._teacher = [state.flatten(0, 1) for state in self._behind(0, self._embedded(self._batches), {})]

    @property
    def tokens(self) -> int:
        """Return N * T."""
        return self._ids.numel()

    @torch.no_grad()
    def of(self, weights: Mapping[str, QuantizedWeight]) -> float:
        """Return the KL with all these linears replaced at once."""
        behind = self._behind(0, self._embedded(self._batches), self._dense(weights))
        return max(0.0, sum(self._sums(behind, range(len(behind)))) / self.tokens)  # rounding may fall below 0

    @torch.no_grad()
    def around(
        self,
        candidates: Mapping[str, Mapping[LayerFormat, QuantizedWeight]],
        base: Mapping[str, QuantizedWeight] | None = None,
    ) -> dict[str, dict[LayerFormat, float]]:
        """Return the KL of `base` with one linear replaced, for every candidate.

        Without a base all other linears are float, and a choice whose cost is small on the first quarter of the
        windows is left at that.
        """
        few = list(range(0, len(self._batches), _FIRST_SHARE))
        rest = [batch for batch in range(len(self._batches)) if batch not in few]
        fixed = self._dense(base or {})
        first = self._walk(candidates, fixed, few)
        matters = candidates if base else _that_matter(candidates, first)
        more = self._walk(matters, fixed, rest) if rest else {}
        tokens = [sum(self._batches[batch].numel() for batch in chosen) for chosen in (few, few + rest)]
        return {
            name: {
                form: max(0.0, (kl + more[name][form]) / tokens[1] if form in more.get(name, {}) else kl / tokens[0])
                for form, kl in costs.items()
            }
            for name, costs in first.items()
        }

    def _walk(
        self,
        candidates: Mapping[str, Mapping[LayerFormat, QuantizedWeight]],
        fixed: Mapping[str, Tensor],
        batches: list[int],
    ) -> dict[str, dict[LayerFormat, float]]:
        """Return the summed KL over some batches for every candidate."""
        found: dict[str, dict[LayerFormat, float]] = {}
        states = self._embedded([self._batches[batch] for batch in batches])
        done, left = 0, TimeLeft(sum(self._work(layer, candidates) for layer in range(self._layers)))
        for layer in range(self._layers):
            for name in [name for name in self._names[layer] if name in candidates]:
                found[name] = {
                    form: sum(
                        self._sums(self._behind(layer, states, {**fixed, **self._dense({name: weight})}), batches)
                    )
                    for form, weight in candidates[name].items()
                }
            states = self._behind(layer, states, fixed, layer + 1)
            done += self._work(layer, candidates)
            _log.info("KL of single linears: block %d of %d, %s", layer + 1, self._layers, left.after(done))
        return found

    def _work(self, layer: int, candidates: Mapping[str, Mapping[LayerFormat, QuantizedWeight]]) -> int:
        """Return how many blocks are run for a block's candidates, and one to go on."""
        runs = sum(len(candidates[name]) for name in self._names[layer] if name in candidates)
        return runs * (self._layers - layer) + 1

    def _dense(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        return {name: weight.dequantize().to(self._blocks.device) for name, weight in weights.items()}

    def _embedded(self, batches: Sequence[Tensor]) -> list[Tensor]:
        return [self._blocks.embed(batch) for batch in batches]

    def _behind(
        self, first: int, states: list[Tensor], weights: Mapping[str, Tensor], stop: int | None = None
    ) -> list[Tensor]:
        """Return the states behind blocks `first` to `stop` (the last), each batch after the other."""
        for layer in range(first, self._layers if stop is None else stop):
            own = {name: weights[name] for name in self._names[layer] if name in weights}
            with self._blocks.block(layer):
                states = [self._blocks.forward(layer, state, own) for state in states]
        return states

    def _sums(self, behind: list[Tensor], batches: Sequence[int]) -> list[float]:
        """Return the KL of every batch, summed over its tokens in float64."""
        with self._blocks.head():
            return [
                sum(
                    self._slice_kl(reference, disturbed)
                    for reference, disturbed in zip(
                        torch.split(self._teacher[batch], self._rows),
                        torch.split(state.flatten(0, 1), self._rows),
                        strict=True,
                    )
                )
                for batch, state in zip(batches, behind, strict=True)
            ]

    def _slice_kl(self, reference: Tensor, disturbed: Tensor) -> float:
        log_p, log_q = (torch.log_softmax(self._blocks.logits(h[None])[0], -1) for h in (reference, disturbed))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64))


def _that_matter(
    candidates: Mapping[str, Mapping[LayerFormat, QuantizedWeight]], costs: Mapping[str, Mapping[LayerFormat, float]]
) -> dict[str, dict[LayerFormat, QuantizedWeight]]:
    """Return the candidates that cost no less than a tenth of the mean linear's at the same bits."""
    at_bits: dict[int, list[float]] = {}
    for found in costs.values():
        for form, cost in found.items():
            at_bits.setdefault(form.bits, []).append(cost)
    least = {bits: _SMALL * sum(found) / len(found) for bits, found in at_bits.items()}
    kept = {
        name: {form: weight for form, weight in forms.items() if costs[name][form] >= least[form.bits]}
        for name, forms in candidates.items()
    }
    return {name: forms for name, forms in kept.items() if forms}
