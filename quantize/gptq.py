"""GPTQ: integers that disturb a layer's outputs least, with their scales chosen for the same end.

With H = mean x x^T over calibration tokens, rounding a row w to v costs the layer's outputs (v - w) H (v - w)^T.
GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one input after another and lets the inputs that are still free
make good the errors already made. In terms of the factor H = U D U^T, U upper triangular with ones on its diagonal,

    error = sum_k D_k (v_k - t_k)^2        t_k = w_k - sum_{j < k} (v_j - w_j) U_jk

so t_k is what input k is rounded to (Chee et al., "QuIP", 2023, theorem 6: the same codes as Frantar's, without
inverting H). Inputs with strong activations go first (act-order): groups by their mean H_kk, inputs within a group by
theirs, so groups stay the runs of neighbouring inputs that runtimes store.

Frantar's scales are the min-max of the float weights. Here they are part of the search, which is worth as much as
the compensation:

1. *First pass*, group after group. Clippings of the range of the group's *compensated* targets t (and neighbouring
   zero points) are ranked by their rounded error weighted with D; the best few are each played through, codes and
   all, and the one with the smallest error stays (`group_search`).
2. *Refit.* For fixed codes, v is linear in the scales s of a row's groups: they solve A s = b with
   A_gh = u_g^T H_gh u_h, b_g = u_g^T H w, u = codes - zero. Rounded to fp16; a row keeps its old scales if that is
   better.
3. *Polish.* Given all other groups, a group's best values are v_g -> w_g - H_gg^-1 H_g,rest (v - w)_rest under H_gg:
   scales near the present one, zero points beside it, and codes are searched again as in 1. Then coordinate descent
   over all codes: the integer nearest to the minimum given all others.

2 and 3 are repeated while they gain. Nothing is taken that does not lower the error as stored, so the objective falls
monotonically; a row that plain rounding serves better keeps that. Rows do not interact, so all are worked on at once;
a guided Hessian ([G, I, I], see `layer_statistics`) serves its run of rows. Groups longer than a block (per channel)
rank their scales and play only the best one through.

On stories260K (group 32, asymmetric, 128 windows) the first pass alone gives KL 0.307 at 3 bits, refit and polish
0.263, coremltools' GPTQ 0.417; at 4 bits 0.054, 0.047 and 0.064.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwindle.quantize.group_search import BLOCK, GroupSearch, factor, quadratic
from dwindle.quantize.integers import IntegerGrid, round_to_nearest, storable
from dwindle.weights import AffineWeight

__all__ = ["gptq"]

DAMPING = 0.01
"""Times the mean of H's diagonal, added to it: calibration text never saw every direction."""
ROUNDS = 4
"""Times that scales are refitted and codes polished, at most."""
SMALLEST_GAIN = 5e-3
"""Relative gain of a round under which there is no next."""
_SCRATCH = 1 << 25
"""Floats in the largest temporary of a refit."""


def gptq(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    hessian: Tensor,
    *,
    balanced: bool = False,
    rounds: int = ROUNDS,
    damping: float = DAMPING,
) -> AffineWeight:
    """Return the integer form of a float weight [O, I]; `group_size` inputs share a scale and divide I.

    `hessian` [G, I, I]: one for each of G equal groups of consecutive rows. The work is done on the weight's device.
    """
    grid = IntegerGrid(bits, symmetric, balanced)
    plain = round_to_nearest(weight, bits, group_size, symmetric, balanced=balanced)
    rows_each, together = len(weight) // len(hessian), max(1, (1 << 24) // hessian[0].numel())
    parts = []
    for first in range(0, len(hessian), together):
        rows = slice(first * rows_each, (first + together) * rows_each)
        problem = _Problem.of(weight[rows], hessian[first : first + together], group_size, grid, damping)
        codes = problem.sequential()
        before = problem.errors(codes).sum()
        for _ in range(rounds):
            codes = problem.polished(problem.refitted(codes))
            after = problem.errors(codes).sum()
            if after > (1 - SMALLEST_GAIN) * before:
                break
            before = after
        parts.append(problem.unsorted(problem.better(problem.refitted(codes), problem.sorted(plain, rows))))
    return grid.weight(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Codes:
    """A candidate: codes [G, R, I], scales and zero points [G, R, C] of C groups; all float32, exact as stored."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def integers(self) -> Tensor:
        """Return codes less zero points [G, R, I]."""
        grouped = self.codes.view(*self.zeros.shape, -1)
        return (grouped - self.zeros[..., None]).view(self.codes.shape)

    def values(self) -> Tensor:
        """Return the dequantized weights [G, R, I]."""
        grouped = self.integers().view(*self.zeros.shape, -1)
        return (grouped * self.scales[..., None]).view(self.codes.shape)


@dataclass(frozen=True)
class _Problem:
    """Weights [G, R, I] (R rows of each Hessian group) and damped Hessians [G, I, I], inputs in order of compensation.

    `order` [G, I] says which input stands where; a group of inputs stays together and `groups` [G, C] says where.
    """

    weight: Tensor
    hessian: Tensor
    ridge: Tensor
    """[G]: what damping added to the diagonal."""
    grid: IntegerGrid
    group_size: int
    order: Tensor
    groups: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, group_size: int, grid: IntegerGrid, damping: float) -> _Problem:
        count, inputs = len(hessian), weight.shape[1]
        hessian = hessian.to(weight.device, torch.float32)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1)
        ridge = torch.where(mean > 0, damping * mean, 1.0)
        grouped = diagonal.view(count, -1, group_size)
        within = grouped.argsort(dim=2, descending=True, stable=True)
        groups = grouped.mean(2).argsort(dim=1, descending=True, stable=True)
        starts = torch.arange(0, inputs, group_size, device=weight.device)[:, None]
        order = (within + starts).gather(1, groups[..., None].expand_as(within)).view(count, inputs)
        damped = torch.stack([h[o][:, o] for h, o in zip(hessian, order, strict=True)])
        damped.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        rows = weight.detach().to(torch.float32).view(count, -1, inputs)
        rows = rows.gather(2, order[:, None].expand_as(rows))
        return cls(rows, damped, ridge, grid, group_size, order, groups)

    def sorted(self, packed: AffineWeight, rows: slice) -> _Codes:
        """Return some rows of a packed weight as a candidate."""
        count, each, _ = self.weight.shape
        device = self.weight.device
        codes, scales = packed.codes[rows].to(device).view(count, each, -1), packed.scales[rows].to(device)
        scales = scales.view(count, each, -1)
        zeros = torch.full_like(scales, packed.centre) if packed.zero_points is None else packed.zero_points[rows]
        zeros = zeros.to(device).view(scales.shape)
        groups = self.groups[:, None].expand_as(scales)
        return _Codes(
            codes.gather(2, self.order[:, None].expand_as(codes)).to(torch.float32),
            scales.gather(2, groups).to(torch.float32),
            zeros.gather(2, groups).to(torch.float32),
        )

    def unsorted(self, codes: _Codes) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [O, I], scales and zero points [O, C], inputs in their own order."""
        inputs = self.order.argsort(dim=1)[:, None].expand_as(codes.codes)
        groups = self.groups.argsort(dim=1)[:, None].expand_as(codes.scales)
        return (
            codes.codes.gather(2, inputs).flatten(0, 1),
            codes.scales.gather(2, groups).flatten(0, 1),
            codes.zeros.gather(2, groups).flatten(0, 1),
        )

    def errors(self, codes: _Codes, damped: bool = True) -> Tensor:
        """Return float64 [G, R]: the objective, by row."""
        errors = codes.values() - self.weight
        found = (torch.bmm(errors, self.hessian) * errors).sum(2, dtype=torch.float64)
        return found if damped else found - self.ridge[:, None] * errors.square().sum(2, dtype=torch.float64)

    def better(self, new: _Codes, old: _Codes) -> _Codes:
        """Return, row by row, the candidate that disturbs the outputs less, without damping."""
        wins = (self.errors(new, damped=False) <= self.errors(old, damped=False))[..., None]
        return _Codes(
            torch.where(wins, new.codes, old.codes),
            torch.where(wins, new.scales, old.scales),
            torch.where(wins, new.zeros, old.zeros),
        )

    def sequential(self) -> _Codes:
        """Return the first pass: group after group, each against the errors already made."""
        unit, power = factor(self.hessian)
        targets, search = self.weight.clone(), GroupSearch(self.grid)
        found = []
        for block in self._blocks():
            codes = _Codes(*search.from_ranges(targets[..., block], unit[:, block, block], power[:, block]))
            errors = codes.values() - self.weight[..., block]
            targets[..., block.stop :] -= torch.bmm(errors, unit[:, block, block.stop :])
            found.append(codes)
        columns = zip(*((part.codes, part.scales, part.zeros) for part in found), strict=True)
        return _Codes(*(torch.cat(column, dim=2) for column in columns))

    def refitted(self, codes: _Codes) -> _Codes:
        """Return the same codes with the scales that are best for them, in rows where fp16 leaves them better."""
        integers = codes.integers()
        count, outputs, groups = codes.scales.shape
        blocks = self.hessian.view(count, groups, self.group_size, -1)
        step = max(1, _SCRATCH // (count * groups * integers.shape[2]))
        fitted = []
        for first in range(0, outputs, step):
            part, weight = integers[:, first : first + step], self.weight[:, first : first + step]
            pulls = torch.einsum("nrcg,ncgi->nrci", part.view(count, -1, groups, self.group_size), blocks)
            wanted = (pulls * weight[:, :, None]).sum(3, dtype=torch.float64)
            matrix = (pulls * part[:, :, None]).view(count, -1, groups, groups, self.group_size)
            system = matrix.sum(4, dtype=torch.float64)
            diagonal = system.diagonal(dim1=2, dim2=3)
            diagonal += torch.where(diagonal > 0, 1e-6 * diagonal, 1.0)
            fitted.append(torch.linalg.solve(system, wanted).to(torch.float32))
        scales = torch.cat(fitted, dim=1)
        new = replace(codes, scales=torch.where(scales > 0, storable(scales), codes.scales))
        wins = (self.errors(new) < self.errors(codes))[..., None]
        return replace(codes, scales=torch.where(wins, new.scales, codes.scales))

    def polished(self, codes: _Codes) -> _Codes:
        """Return better codes: every group searched again given all others, then every code given all others."""
        errors = codes.values() - self.weight
        pull = torch.bmm(errors, self.hessian)
        if self.group_size <= BLOCK:
            codes = self._searched_again(codes, errors, pull)
        return self._descended(codes, errors, pull)

    def _blocks(self) -> list[slice]:
        return [slice(i, i + self.group_size) for i in range(0, self.weight.shape[2], self.group_size)]

    def _searched_again(self, codes: _Codes, errors: Tensor, pull: Tensor) -> _Codes:
        """Return codes whose groups were searched again in turn; `errors` and `pull` = errors H follow in place."""
        found = _Codes(codes.codes.clone(), codes.scales.clone(), codes.zeros.clone())
        search = GroupSearch(self.grid)
        for group, block in enumerate(self._blocks()):
            own, column = self.hessian[:, block, block], slice(group, group + 1)
            unit, power = factor(own)
            old = errors[..., block].clone()
            outside = (pull[..., block] - torch.bmm(old, own)).mT.double()
            shift = torch.linalg.solve(own.double(), outside).mT.to(torch.float32)
            targets = self.weight[..., block] - shift
            new = _Codes(*search.near(targets, unit, power, found.scales[..., column], found.zeros[..., column]))
            change = new.values() - self.weight[..., block]
            gains = (quadratic(change + shift, unit, power) < quadratic(old + shift, unit, power))[..., None]
            found.codes[..., block] = torch.where(gains, new.codes, found.codes[..., block])
            found.scales[..., column] = torch.where(gains, new.scales, found.scales[..., column])
            found.zeros[..., column] = torch.where(gains, new.zeros, found.zeros[..., column])
            errors[..., block] = torch.where(gains, change, old)
            pull += torch.bmm(errors[..., block] - old, self.hessian[:, block])
        return found

    def _descended(self, codes: _Codes, errors: Tensor, pull: Tensor) -> _Codes:
        """Return codes after one sweep of coordinate descent; `errors` and `pull` = errors H follow in place."""
        found = codes.codes.clone()
        for first in range(0, found.shape[2], BLOCK):
            block = slice(first, min(first + BLOCK, found.shape[2]))
            own, inside = self.hessian[:, block, block], pull[..., block].clone()
            change = torch.zeros_like(inside)
            for k in range(block.stop - first):
                place, group = first + k, (first + k) // self.group_size
                scale, zero = codes.scales[..., group], codes.zeros[..., group]
                value = errors[..., place] + self.weight[..., place]
                code = self.grid.codes(value - inside[..., k] / own[:, None, k, k], scale, zero)
                change[..., k] = (code - zero) * scale - value
                found[..., place] = code
                inside += change[..., k, None] * own[:, None, k]
            errors[..., block] += change
            pull += torch.bmm(change, self.hessian[:, block])
        return replace(codes, codes=found)
