"""The best grid for one group of inputs: scale, zero point and codes together, under the group's own Hessian.

With H = U D U^T (U upper triangular, ones on its diagonal) the error of values v against targets t is

    (v - t) H (v - t)^T = sum_k D_k (v_k - m_k)^2        m_k = t_k - sum_{j < k} (v_j - t_j) U_jk

so for a given grid each v_k is chosen, in order, as the value nearest to m_k: the errors already made are made good
in the inputs still free (Babai's nearest plane; GPTQ's codes). Playing a grid through like this costs a product per
input, judging it by plain rounding, sum_k D_k (round(t_k) - t_k)^2, almost nothing. So all candidate grids are ranked
by the cheap figure, and only the best few are played.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.quantize.integers import IntegerGrid, storable

__all__ = ["BLOCK", "GroupSearch", "factor", "quadratic"]

BLOCK = 128
"""Inputs that one product serves, and the longest group of which several grids are played."""
CLIPPING_RATIOS = 16
NEARBY = tuple(0.76 + 0.06 * step for step in range(9))
"""Multiples of a present scale that are tried."""
_PLAYED = 6
_SCRATCH = 1 << 23
"""Floats in the largest temporary."""

Found = tuple[Tensor, Tensor, Tensor]
"""Codes [G, R, g], scales [G, R, 1] and zero points [G, R, 1]; float32, exact as stored."""


@dataclass(frozen=True)
class GroupSearch:
    """Searches for targets [G, R, g] under Hessians given as `factor` gives them: unit [G, g, g], power [G, g]."""

    grid: IntegerGrid

    def from_ranges(self, targets: Tensor, unit: Tensor, power: Tensor) -> Found:
        """Return the best grid among clippings of the targets' own range."""
        base, zero = self.grid.ranges(targets)
        ratios = torch.tensor(self.grid.clipping_ratios(CLIPPING_RATIOS), device=targets.device)
        return self._best(targets, unit, power, storable(base * ratios), zero)

    def near(self, targets: Tensor, unit: Tensor, power: Tensor, scale: Tensor, zero: Tensor) -> Found:
        """Return the best grid beside that of scale and zero [G, R, 1]."""
        nearby = torch.tensor(NEARBY, device=targets.device)
        return self._best(targets, unit, power, storable(scale * nearby), zero)

    def _best(self, targets: Tensor, unit: Tensor, power: Tensor, scales: Tensor, zero: Tensor) -> Found:
        """Return the best of scales [G, R, K], each with the zero point [G, R, 1] and, if stored, those beside it."""
        shifts = (0,) if self.grid.symmetric else (0, -1, 1)
        zeros = torch.cat([(zero + s).clamp(0, self.grid.top) if s else zero for s in shifts], dim=2)
        zeros = zeros.repeat_interleave(scales.shape[2], dim=2)
        scales = scales.repeat(1, 1, len(shifts))
        step = max(1, _SCRATCH // (len(targets) * scales.shape[2] * targets.shape[2]))
        parts = [
            self._best_of_rows(targets[:, rows], scales[:, rows], zeros[:, rows], unit, power)
            for rows in (slice(first, first + step) for first in range(0, targets.shape[1], step))
        ]
        codes, found_scales, found_zeros = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        return codes, found_scales, found_zeros

    def _best_of_rows(self, targets: Tensor, scales: Tensor, zeros: Tensor, unit: Tensor, power: Tensor) -> Found:
        wide = targets[:, :, None]
        rounded = (self.grid.codes(wide, scales[..., None], zeros[..., None]) - zeros[..., None]) * scales[..., None]
        rank = (rounded.sub_(wide).square_() * power[:, None, None]).sum(3)
        count = min(_PLAYED if targets.shape[2] <= BLOCK else 1, rank.shape[2])
        played = rank.topk(count, dim=2, largest=False).indices
        scales, zeros = scales.gather(2, played), zeros.gather(2, played)
        codes, error = self._played(targets, unit, power, scales, zeros)
        best = error.argmin(2, keepdim=True)
        chosen = codes.gather(2, best[..., None].expand(-1, -1, -1, codes.shape[3]))[:, :, 0]
        return chosen, scales.gather(2, best), zeros.gather(2, best)

    def _played(
        self, targets: Tensor, unit: Tensor, power: Tensor, scales: Tensor, zeros: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the codes [G, R, K, g] of every grid [G, R, K] and their errors [G, R, K]."""
        moved = targets[:, :, None].repeat(1, 1, scales.shape[2], 1)
        made, codes, error = moved.clone(), torch.empty_like(moved), torch.zeros_like(scales)
        for first in range(0, moved.shape[3], BLOCK):
            stop = min(first + BLOCK, moved.shape[3])
            for k in range(first, stop):
                code = self.grid.codes(moved[..., k], scales, zeros)
                value = (code - zeros) * scales
                codes[..., k] = code
                error += power[:, None, None, k] * (value - moved[..., k]).square_()
                made[..., k] = value - made[..., k]
                moved[..., k + 1 : stop] -= made[..., k, None] * unit[:, None, None, k, k + 1 : stop]
            if stop < moved.shape[3]:
                pushed = torch.bmm(made[..., first:stop].flatten(1, 2), unit[:, first:stop, stop:])
                moved[..., stop:] -= pushed.view(*scales.shape, -1)
        return codes, error


def factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit upper triangular U [G, I, I] and D [G, I] with H = U D U^T.

    >>> unit, power = factor(torch.tensor([[[5.0, 2.0], [2.0, 1.0]]]))
    >>> unit.tolist(), power.tolist()
    ([[[1.0, 2.0], [0.0, 1.0]]], [[1.0, 1.0]])
    """
    upper = torch.linalg.cholesky(hessian.double().flip(1, 2)).flip(1, 2)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    return (upper / diagonal[:, None]).to(torch.float32), diagonal.square().to(torch.float32)


def quadratic(errors: Tensor, unit: Tensor, power: Tensor) -> Tensor:
    """Return [G, R]: e U D U^T e^T of errors [G, R, g]."""
    return (torch.bmm(errors, unit).square_() * power[:, None]).sum(2)
