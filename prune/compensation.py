r"""What is left takes over the work of what is cut: the reading linear is refitted by least squares, in closed form.

W [O, I] reads activations x of which the kept entries x_k stay and the cut ones x_c go. The best linear stand-in,

    W' = argmin  E |W x - W' x_k|^2 + d |W' - W_k|^2
       = W_k + W_c M_ck (M_kk + d I)^-1

needs nothing but M = E x x^T (`moments`), and is W M_{:,k} M_kk^-1 for d = 0. d is a share (`damping`) of the mean of
M_kk's diagonal and pulls towards the plain cut W_k, so a direction that the calibration text never shows stays as it
was. It is done for down (FFN units, those of each expert on the tokens that pass it: `mixture_moments`) and o (KV
groups); the result has the shapes of a plain cut. Reconstructing the
output of the reading layer by least squares is He et al. 2017's (arXiv 1707.06168, section 3.1) for channels of
convolutions. x is taken from the full model with the dropped layers stepped over.

Memory: one pass's moments (`moments`), and I^2 float64 for the solution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.prune.calibration_pass import check_calibration
from dwindle.prune.head_rows import head_rows
from dwindle.prune.keep_plan import KeepPlan
from dwindle.prune.mixture_moments import expert_moments
from dwindle.prune.moments import input_moments
from dwindle.prune.parameters import read_parameter
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["refit", "refits", "refitted_readers"]


def refitted_readers(bundle: ModelBundle, plan: KeepPlan, calibration: TokenSet, damping: float) -> dict[str, Tensor]:
    """Return by full name (experts: that in files) the new weights [O, kept] of every down and o that loses inputs.

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    return dict(refits(bundle, plan, calibration, damping))


def refits(bundle: ModelBundle, plan: KeepPlan, calibration: TokenSet, damping: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and weights of `refitted_readers` one at a time, those of one layer after the other."""
    check_calibration(bundle, calibration)
    kept: dict[str, Tensor] = {}
    for keep in plan.layers:
        parts = bundle.anatomy.parts(keep.layer)
        if keep.ffn_units is not None:
            kept[parts["down"]] = torch.tensor(keep.ffn_units)
        if keep.kv_groups is not None:
            kept[parts["o"]] = head_rows(plan.shape, keep.kv_groups)
    stay = {keep.layer for keep in plan.layers}
    dropped = [layer for layer in range(plan.shape.layers) if layer not in stay]
    for name, moment in input_moments(bundle, calibration, list(kept), dropped):
        weight = read_parameter(bundle, f"{name}.weight")
        yield name, refit(weight.cpu().double(), moment, kept[name], damping).to(weight)
    narrowed = {
        keep.layer: dict(zip(keep.kept_experts(plan.shape.experts), keep.expert_units, strict=True))
        for keep in plan.layers
        if keep.expert_units is not None
    }
    if narrowed:
        experts = {layer: list(units) for layer, units in narrowed.items()}
        for (layer, expert), moment in expert_moments(bundle, calibration, experts, dropped):
            name = bundle.anatomy.expert_parts(layer, expert)["down"]
            weight = read_parameter(bundle, f"{name}.weight")
            units = torch.tensor(narrowed[layer][expert])
            yield name, refit(weight.cpu().double(), moment, units, damping).to(weight)


def refit(weight: Tensor, moment: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return W' [O, kept] for W [O, I], M [I, I] and the kept indices, all float64.

    >>> moment = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()  # the second input always equals the first
    >>> refit(torch.tensor([[2.0, 3.0]]).double(), moment, torch.tensor([0]), 1e-9).round().tolist()
    [[5.0]]
    """
    left = torch.ones(weight.shape[1], dtype=torch.bool)
    left[kept] = False
    cut = left.nonzero().flatten()
    among = moment[kept][:, kept]
    damp = damping * among.diagonal().mean()
    if damp <= 0:  # the kept inputs are always zero: they can stand in for nothing
        return weight[:, kept].clone()
    among.diagonal().add_(damp)
    share: Tensor = torch.linalg.solve(among, moment[kept][:, cut])
    return weight[:, kept] + weight[:, cut] @ share.T
