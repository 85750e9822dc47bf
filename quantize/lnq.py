"""Layer-wise non-uniform quantization: palettes and codes that disturb a layer's outputs least.

k-means minds the weights' own error. What the next layer sees is the error of the outputs, and with H = mean x x^T
over calibration tokens that of row o is

    (w_o - s_o c[z_o]) H (w_o - s_o c[z_o])^T                   c: palette of the row's group, z: codes, s: row scale

so an error in one weight can be made good in another whose input moves with its own. LNQ (Kim et al., "GuidedQuant",
2025, section 4) minimises the sum of this over the rows, here each times its weight r_o, by turns:

1. *Palette.* For fixed codes the error is a quadratic in c. With P_o the one-hot codes of row o (inputs x entries),

       A c = b        A = sum_o r_o s_o^2 P_o^T H P_o        b = sum_o r_o s_o P_o^T H w_o

   Forming A takes as many products as there are entries; conjugate gradients, preconditioned with the diagonal,
   take one product H x [errors of all rows] a step, solve all palettes at once and never raise the error. An entry
   that no code names has no equation and keeps its value. The palette is then rounded to fp16, as it is stored.
2. *Codes* by cyclic coordinate descent: with everything else fixed, the best value for (o, i) is the palette entry
   nearest to w + (sum_{j != i} e_oj H_ji) / H_ii, with e = w - s c[z]. Exact per coordinate, so never a loss, but
   it ends in a local optimum. So every round also descends from codes chosen afresh, and the better of the two stays
   (palette by palette). At 2 bits that takes another 6 % off the objective, at 4 bits 1 %.

Chosen afresh means GPTQ: with H = L L^T the error is |L^T e_o|^2, and choosing codes from the last input to the first,
each against the errors already made (sum_{j > i} L_ji e_j / L_ii in place of the sum above), is Babai's nearest plane
and GPTQ (Frantar et al. 2022) in one (Chen et al., "The Geometry of LLM Quantization", 2025). It is the same sweep
with L^T in the place of H, so one function does both, on `palettize`'s palettes first. Inputs ascend by H_ii.

*Row weights.* Rows that share a palette must not count alike: the loss minds some outputs ten times as much as others.
r_o is the row's diagonal Fisher information over what H says it should be, sum_i F_oi / sum_i H_ii, that is E[g_o^2]
of the end loss. The paper gives each row a palette of its own and needs no such weights; with 16 rows to a palette
they are worth more than all else here (KL of a 3-bit stories260K: 0.85 without, 0.63 with). Weighing every single
weight's curvature by its own Fisher information, D_o H D_o, brought nothing beyond the rows' sums.

With *guided* Hessians, mean over tokens of g(t)^2 x x^T with g the gradient of the end loss at the layer's outputs
averaged over a group of rows, the same objective is the model's loss to second order. `calibration` makes them. At 3
bits they take babyllama-105 from KL 0.080 to 0.074 (one group: 0.076); stories260K, whose errors there are too large
for a second order, goes from 0.63 to 0.69.

*Row scales* (`row_scales`) are the next best thing: stories260K at 3 bits falls from 0.63 to 0.35, babyllama-105 from
0.080 to 0.070, with one fp16 scale a row: 16 bits over its inputs. Palettes of more rows then cost nothing.

Sweeps run over all rows at once and over blocks of inputs: H [block, I] x errors [I, O] as one product, then the block
one input after another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dwindle.quantize.palettize import palettize
from dwindle.weights import PalettizedWeight

__all__ = ["lnq", "output_errors"]

DAMPING = 0.1
"""Times the mean of H's diagonal, added to it: calibration text never saw every direction, and layers before this one
move its inputs. Ten times GPTQ's usual 0.01: KL of stories260K at 2 bits 2.53 and not 2.69, at 3 bits 0.622 and not
0.636, at 4 bits 0.104 and not 0.106."""
ROUNDS = 6
"""Times that palettes and codes are fitted in turn, at most."""
SMALLEST_GAIN = 5e-3
"""Relative gain of a round under which there is no next."""
_SOLVER_STEPS = 3
"""Conjugate-gradient steps of a palette a round: from the round before, more are not felt (2 to 6 end alike)."""
_LEAST_ROW_WEIGHT = 1e-4
"""Times the mean row weight: a row whose gradient was never seen still counts."""
_BLOCK = 128
"""Inputs that one product serves."""
_COMPARED = 31
"""Thresholds that are compared one by one; more are searched."""


def lnq(
    weight: Tensor,
    bits: int,
    group_size: int,
    hessian: Tensor,
    *,
    importance: Tensor | None = None,
    row_scales: bool = False,
    rounds: int = ROUNDS,
    damping: float = DAMPING,
) -> PalettizedWeight:
    """Return the palettized form of a float weight [O, I]; `group_size` output rows share a palette and divide O.

    `hessian` [G, I, I]: one for each of G equal groups of consecutive rows. `importance` [O, I], the diagonal Fisher
    information, weighs the k-means that palettes start from, and its sums weigh the rows; None is H's diagonal. The
    work is done on the weight's device.
    """
    if importance is None:
        importance = hessian.diagonal(dim1=1, dim2=2).repeat_interleave(len(weight) // len(hessian), dim=0)
    problem = _Problem.of(weight, hessian, importance, group_size, damping)
    start = problem.codes(palettize(weight, bits, group_size, importance=importance, row_scales=row_scales))
    best, least = problem.best_of(start, problem.errors(start), problem.sequential(start))
    for _ in range(rounds):
        refitted = problem.refitted(best, row_scales)
        before, tries = float(least.sum()), (problem.swept(refitted), problem.swept(problem.sequential(refitted)))
        best, least = problem.best_of(best, least, *tries)
        if float(least.sum()) > (1 - SMALLEST_GAIN) * before:
            break
    return problem.packed(best, bits, row_scales)


def output_errors(weight: Tensor, quantized: PalettizedWeight, hessian: Tensor) -> Tensor:
    """Return float32 [O]: e H e^T of every row, with `hessian` [G, I, I] as in `lnq` (undamped)."""
    errors = weight.float() - quantized.dequantize().to(weight.device)
    grouped = errors.view(len(hessian), -1, weight.shape[1])
    return (torch.bmm(grouped, hessian) * grouped).sum(2).view(-1)


@dataclass(frozen=True)
class _Codes:
    """A candidate: uint8 indices [G, I, R], ascending palettes [P, K] and row scales [G, R], both fp16 in float32."""

    indices: Tensor
    palettes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class _Problem:
    """Weights [G, I, R] (R rows of each Hessian group), weights and palettes [G, R] of rows,
    damped Hessians [G, I, I] and their transposed Cholesky factors.

    Inputs are reordered within each Hessian group; `order` [G, I] says which input stands where.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    row_weight: Tensor
    palette_of: Tensor
    order: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, importance: Tensor, group_size: int, damping: float) -> _Problem:
        outputs, inputs = weight.shape
        groups = len(hessian)
        hessian = hessian.to(weight.device, torch.float32)
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        order = diagonal.argsort(dim=1, stable=True)
        mean = diagonal.mean(dim=1, keepdim=True)
        damped = torch.stack([h[o][:, o] for h, o in zip(hessian, order, strict=True)])
        damped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, damping * mean, 1.0))
        factor = torch.linalg.cholesky(damped.double()).float().mT.contiguous()
        rows = weight.detach().float().view(groups, outputs // groups, inputs)
        sorted_rows = rows.gather(2, order[:, None].expand_as(rows)).transpose(1, 2).contiguous()
        palette_of = torch.arange(outputs, device=weight.device).view(groups, -1) // group_size
        row_weight = importance.to(weight.device, torch.float32).expand(weight.shape).sum(1).view(groups, -1)
        row_weight = row_weight / (inputs * torch.where(mean > 0, mean, 1.0))
        least = _LEAST_ROW_WEIGHT * row_weight.mean()
        row_weight = row_weight.clamp_min(least) if least > 0 else torch.ones_like(row_weight)
        return cls(sorted_rows, damped, factor, row_weight, palette_of, order)

    def codes(self, packed: PalettizedWeight) -> _Codes:
        """Return the candidate that a packed weight is; palettes are put in ascending order."""
        groups, inputs, rows = self.weight.shape
        indices = packed.indices.to(self.weight.device).view(groups, rows, inputs)
        indices = indices.gather(2, self.order[:, None].expand_as(indices)).transpose(1, 2).contiguous()
        scales = torch.ones(groups, rows) if packed.row_scales is None else packed.row_scales.view(groups, rows)
        palettes, scales = (table.to(self.weight.device, torch.float32) for table in (packed.palettes, scales))
        return self._ascending(_Codes(indices, palettes, scales))

    def packed(self, codes: _Codes, bits: int, row_scales: bool) -> PalettizedWeight:
        """Return the candidate as a weight, inputs in their own order."""
        groups, inputs, rows = self.weight.shape
        back = self.order.argsort(dim=1)[:, None].expand(groups, rows, inputs)
        indices = codes.indices.transpose(1, 2).gather(2, back).reshape(groups * rows, inputs).contiguous()
        group_size = groups * rows // len(codes.palettes)
        scales = codes.scales.half().view(-1) if row_scales else None
        return PalettizedWeight(indices, codes.palettes.half(), bits, group_size, scales)

    def values(self, codes: _Codes) -> Tensor:
        """Return the dequantized weights [G, I, R]."""
        return self._spread(codes.palettes, codes) * codes.scales[:, None]

    def errors(self, codes: _Codes) -> Tensor:
        """Return float64 [P]: the objective, by palette."""
        errors = self.weight - self.values(codes)
        per_row = (torch.bmm(self.hessian, errors) * errors).sum(1, dtype=torch.float64)
        weighted = (per_row * self.row_weight).view(-1)
        return weighted.new_zeros(len(codes.palettes)).index_add_(0, self.palette_of.view(-1), weighted)

    def best_of(self, best: _Codes, least: Tensor, *candidates: _Codes) -> tuple[_Codes, Tensor]:
        """Return, palette by palette, the best of `best` with its errors `least` and the candidates, and its errors."""
        for codes in candidates:
            errors = self.errors(codes)
            wins = errors < least
            row_wins = wins[self.palette_of]
            least = torch.where(wins, errors, least)
            best = _Codes(
                torch.where(row_wins[:, None], codes.indices, best.indices),
                torch.where(wins[:, None], codes.palettes, best.palettes),
                torch.where(row_wins, codes.scales, best.scales),
            )
        return best, least

    def sequential(self, codes: _Codes) -> _Codes:
        """Return the candidate with its codes chosen one input after another, each against the errors already made."""
        return self._sweep(codes, self.factor, triangular=True)

    def swept(self, codes: _Codes) -> _Codes:
        """Return the candidate after one round of coordinate descent over its codes."""
        return self._sweep(codes, self.hessian, triangular=False)

    def refitted(self, codes: _Codes, row_scales: bool) -> _Codes:
        """Return the candidate with the best palettes (and row scales) for its codes, rounded to fp16."""
        if row_scales:
            codes = self._rescaled(codes)
        scales = codes.scales[:, None]
        counted = scales * self.row_weight[:, None]
        curvature = self._gathered(self.hessian.diagonal(dim1=1, dim2=2)[:, :, None] * scales * counted, codes)
        palettes = codes.palettes.double()
        residual = self._gathered(torch.bmm(self.hessian, self.weight - self.values(codes)) * counted, codes)
        direction = scaled = _quotient(residual, curvature)
        power = (residual * scaled).sum(1, keepdim=True)
        for _ in range(min(_SOLVER_STEPS, palettes.shape[1])):
            moved = self._spread(direction.float(), codes) * scales
            image = self._gathered(torch.bmm(self.hessian, moved) * counted, codes)
            step = _quotient(power, (direction * image).sum(1, keepdim=True))
            palettes = palettes + step * direction
            residual = residual - step * image
            scaled = _quotient(residual, curvature)
            power, before = (residual * scaled).sum(1, keepdim=True), power
            direction = scaled + _quotient(power, before) * direction
        return self._ascending(replace(codes, palettes=palettes.half().float()))

    def _rescaled(self, codes: _Codes) -> _Codes:
        """Return the candidate with the best scale of each row: s + c[z] H e / c[z] H c[z]."""
        unscaled = self._spread(codes.palettes, codes)
        image = torch.bmm(self.hessian, unscaled)
        above = (image * self.weight).sum(1, dtype=torch.float64)
        best = _quotient(above, (image * unscaled).sum(1, dtype=torch.float64))
        stored = best.half().float()
        return replace(codes, scales=torch.where(stored > 0, stored, codes.scales))

    def _sweep(self, codes: _Codes, matrix: Tensor, *, triangular: bool) -> _Codes:
        """Return the candidate with every code set to the entry nearest to w + sum_{j != i} matrix_ij e_j / matrix_ii,
        from the last input to the first; a triangular matrix [G, I, I] is zero left of its diagonal.
        """
        levels = (codes.palettes[self.palette_of] * codes.scales[..., None]).contiguous()
        thresholds = (levels[..., 1:] + levels[..., :-1]) / 2
        errors = self.weight - self.values(codes)
        indices = codes.indices.clone()
        for stop in range(self.weight.shape[1], 0, -_BLOCK):
            block = slice(max(0, stop - _BLOCK), stop)
            first = block.start if triangular else 0
            pull = torch.bmm(matrix[:, block, first:], errors[:, first:])
            self._sweep_block(matrix[:, block, block], pull, self.weight[:, block], errors[:, block],
                              indices[:, block], levels, thresholds)  # fmt: skip
        return replace(codes, indices=indices)

    @staticmethod
    def _sweep_block(
        matrix: Tensor, pull: Tensor, weight: Tensor, errors: Tensor, indices: Tensor, levels: Tensor,
        thresholds: Tensor,
    ) -> None:  # fmt: skip
        """Choose codes for a block of inputs [G, B, R]; errors and indices change in place."""
        compared = thresholds.movedim(2, 0).contiguous() if thresholds.shape[2] <= _COMPARED else None
        change = torch.zeros_like(pull)
        curvature = matrix.diagonal(dim1=1, dim2=2)
        for i in reversed(range(weight.shape[1])):
            pull_i = pull[:, i] + torch.bmm(matrix[:, i : i + 1, i + 1 :], change[:, i + 1 :])[:, 0]
            target = weight[:, i] - errors[:, i] + pull_i / curvature[:, i : i + 1]
            if compared is None:
                chosen = torch.searchsorted(thresholds, target[..., None])
            else:
                chosen = (target > compared).sum(0)[..., None]
            new = weight[:, i] - levels.gather(2, chosen)[..., 0]
            change[:, i] = new - errors[:, i]
            errors[:, i] = new
            indices[:, i] = chosen[..., 0]

    def _entries(self, codes: _Codes) -> Tensor:
        """Return int32 [G * I * R]: for each weight the place of its palette entry among all [P * K]."""
        start = (self.palette_of * codes.palettes.shape[1]).to(torch.int32)
        return (codes.indices.to(torch.int32) + start[:, None]).view(-1)

    def _spread(self, table: Tensor, codes: _Codes) -> Tensor:
        """Return [G, I, R]: for each weight the entry of a table [P, K] that its code names."""
        return table.reshape(-1).index_select(0, self._entries(codes)).view(self.weight.shape)

    def _gathered(self, per_weight: Tensor, codes: _Codes) -> Tensor:
        """Return float64 [P, K]: the sums of [G, I, R] over the weights that name an entry."""
        sums = torch.zeros(codes.palettes.numel(), dtype=torch.float64, device=per_weight.device)
        return sums.index_add_(0, self._entries(codes), per_weight.reshape(-1).double()).view(codes.palettes.shape)

    def _ascending(self, codes: _Codes) -> _Codes:
        """Return the same weights with every palette in ascending order."""
        palettes, order = codes.palettes.sort(dim=1, stable=True)
        place = order.argsort(dim=1).to(torch.uint8)
        return replace(codes, palettes=palettes, indices=self._spread(place, codes))


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where that is undefined."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
