r"""What calibration learns about one linear y = W x, W [O, I], and the sums it is learnt from.

Rounding W to W + D changes the output of row o for a token by d_o . x, and the loss, to second order, by half the
squared change weighed by the curvature at that output. Three approximations are in use, coarse to fine:

    second moment   m_i     = mean_t x_i^2                          error_o = sum_i m_i d_oi^2
    Hessian         H       = mean_t x x^T                          error_o = d_o^T H d_o          (GPTQ, LNQ)
    guided Hessian  H_g     = mean_t w_g(t) x x^T                   error_o = d_o^T H_g(o) d_o     (GuidedQuant)
    Fisher          F_oi    = mean_t (dL/dz_o)^2 x_i^2              error_o = sum_i F_oi d_oi^2    (SqueezeLLM)

with L the sum of all tokens' losses and z the linear's output. w_g(t) is the mean of (dL/dz_o)^2 over the g-th of G
equal runs of output rows, divided by its mean over tokens and groups (`curvature`), so that a damping means the same
with and without guidance. A full Hessian per row would be O x I x I; four groups keep most of what it knows
(GuidedQuant, Kim et al. 2025, arXiv:2505.07004, section 3; SqueezeLLM, arXiv:2306.07629; GPTQ, arXiv:2210.17323).

If L is the cross-entropy against labels drawn from the model itself, (dL/dz)^2 has the curvature of the KL divergence
to the unquantized model as its mean, and in nats per token

    KL  ~  1/2 sum F D^2  ~  1/2 curvature sum_o d_o^T H_g(o) d_o.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.errors import DataError, offenders

__all__ = ["GuidedSums", "InputSums", "LayerStatistics", "require_finite"]


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Means over the calibration tokens, for one linear [O, I]; float32."""

    tokens: int
    second_moment: Tensor
    """[I]: mean of x^2."""
    hessian: Tensor | None = None
    """[G, I, I]; G = 1 if plain. Linears with one input share the tensor: do not change it in place."""
    fisher: Tensor | None = None
    """[O, I], in nats^2 per token."""
    curvature: float = 1.0
    """Mean of (dL/dz)^2 over tokens and outputs, the divisor of the guided weights; 1 for a plain Hessian."""
    row_curvature: Tensor | None = None
    """[O]: mean of (dL/dz_o)^2 over tokens, how much an output row matters; None without gradients."""

    def hessian_of_rows(self, rows: slice, outputs: int) -> Tensor:
        """Return the Hessian [I, I] of these of the linear's `outputs` rows: that of the group the first one is in."""
        assert self.hessian is not None
        group = (rows.start or 0) * len(self.hessian) // outputs
        return self.hessian[group]


class InputSums:
    """Second moment and plain Hessian of one input, shared by all linears that read it."""

    def __init__(self, width: int, hessian: bool, device: torch.device) -> None:
        self._tokens = 0
        self._squares = torch.zeros(width, device=device)
        self._hessian = torch.zeros(width, width, device=device) if hessian else None

    def add(self, inputs: Tensor) -> None:
        """Count in inputs [n, I]."""
        self._tokens += len(inputs)
        self._squares += inputs.square().sum(0)
        if self._hessian is not None:
            self._hessian.addmm_(inputs.T, inputs)

    def statistics(self) -> LayerStatistics:
        """Return the means and give up the sums."""
        hessian, self._hessian = self._hessian, None
        return LayerStatistics(
            self._tokens, self._squares / self._tokens, None if hessian is None else hessian.div_(self._tokens)[None]
        )


class GuidedSums:
    """Guided Hessians and Fisher information of one linear."""

    def __init__(self, shape: tuple[int, int], row_groups: int, hessian: bool, fisher: bool,
                 device: torch.device) -> None:  # fmt: skip
        outputs, inputs = shape
        self._groups = math.gcd(outputs, row_groups)
        self._tokens, self._weight = 0, torch.zeros((), dtype=torch.float64, device=device)
        self._squares, self._rows = torch.zeros(inputs, device=device), torch.zeros(outputs, device=device)
        self._hessian = torch.zeros(self._groups, inputs, inputs, device=device) if hessian else None
        self._fisher = torch.zeros(outputs, inputs, device=device) if fisher else None

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Count in inputs [n, I] and the gradients [n, O] of the loss at the linear's output."""
        self._tokens += len(inputs)
        squared = inputs.square()
        self._squares += squared.sum(0)
        powers = gradients.square()
        self._rows += powers.sum(0)
        weights = powers.view(len(inputs), self._groups, -1).mean(2)
        self._weight += weights.mean(1).sum(dtype=torch.float64)
        if self._hessian is not None:
            for group, hessian in enumerate(self._hessian):
                hessian.addmm_((inputs * weights[:, group, None]).T, inputs)
        if self._fisher is not None:
            self._fisher.addmm_(powers.T, squared)

    def statistics(self) -> LayerStatistics:
        """Return the means and give up the sums.

        A linear that the loss does not depend on (dead, or behind a head of zeros) gets its second moment as Hessian.
        """
        hessian, self._hessian = self._hessian, None
        fisher, self._fisher = self._fisher, None
        moment, total = self._squares / self._tokens, float(self._weight)
        if hessian is not None:
            hessian = hessian.div_(total) if total > 0 else torch.diag(moment).expand(self._groups, -1, -1)
        return LayerStatistics(self._tokens, moment, hessian, None if fisher is None else fisher.div_(self._tokens),
                               total / self._tokens, self._rows / self._tokens)  # fmt: skip


def require_finite(statistics: Mapping[str, LayerStatistics]) -> None:
    """Raise DataError, naming the linears, if an activation or gradient is NaN or overflows."""
    broken = [
        name
        for name, found in statistics.items()
        if not (math.isfinite(found.curvature) and bool(torch.isfinite(found.second_moment).all()))
    ]
    if broken:
        raise DataError(
            f"calibration: the activations or gradients of {len(broken)} linears are NaN or infinite on this text: "
            f"{offenders(broken)}. Measure the unquantized model first; if its loss is finite, calibrate on other text."
        )
