r"""How much each FFN unit, KV group and channel of the hidden width matters, from forward passes alone.

A unit is one row of gate and up and one column of down. A KV group is a KV head with the query heads that share it:
its rows of q, k and v and its columns of o. A channel is one coordinate of the residual stream.

- `activation` (Muralidharan et al. 2024, Minitron, arXiv 2407.14679, section 2.2): forward passes over a small
  calibration set, mean over the sequence and L2 over the batch, the pair the paper found best:

      score_j = sqrt( sum over windows b of ( mean over tokens t of |a[b, t, j]| )^2 )

  with a the input of down (units), the norm of a group's share of the input of o (groups), or what q, gate and the
  head read (channels; summed over all places where the width is read). It costs as much as measuring the model.
- `magnitude`: the L2 norm of all weights of the unit, group or channel. It needs no data.
- `taylor` and `fisher`: see `gradient_scores`. Layers as a whole: see `depth_scores`. Experts: see `mixture_scores`.

Memory of `activation`: the activations of one batch and one float64 vector per place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.anatomy import Part
from dwindle.prune.calibration_pass import check_calibration, reading_names
from dwindle.prune.mixture_scores import MixtureSums, mixture_magnitudes
from dwindle.prune.parameters import read_parameter, row_slices
from dwindle.prune.text_pass import run_pass
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["ActivationSums", "AxisScores", "activation_axis_scores", "activation_scores", "magnitude_axis_scores",
           "magnitude_scores"]  # fmt: skip


@dataclass(frozen=True)
class AxisScores:
    """float64 scores along every axis; an empty one was not asked for."""

    ffn: list[Tensor] = field(default_factory=list)
    """Per layer [F]."""
    groups: list[Tensor] = field(default_factory=list)
    """Per layer [K]."""
    channels: Tensor | None = None
    """[D]."""
    layers: Tensor | None = None
    """[layers]."""
    experts: list[Tensor] = field(default_factory=list)
    """Per layer [E]; those without experts have empty ones, here and in `expert_units` and `ffn`."""
    expert_units: list[Tensor] = field(default_factory=list)
    """Per layer [E, F]."""


def activation_scores(bundle: ModelBundle, calibration: TokenSet) -> list[Tensor]:
    """Return per layer the activation scores [F] of the FFN units; windows of `calibration` are the batch."""
    return activation_axis_scores(bundle, calibration).ffn


def activation_axis_scores(bundle: ModelBundle, calibration: TokenSet) -> AxisScores:
    """Return the activation scores of units, groups and channels, all from one pass.

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    sums = ActivationSums(bundle)
    run_pass(bundle, calibration, sums.inputs, last=sums.last, purpose="scoring")
    return sums.scores()


class ActivationSums:
    """Listens to a pass of the calibration text and gives the activation scores."""

    def __init__(self, bundle: ModelBundle) -> None:
        anatomy = self._anatomy = bundle.anatomy
        self._squares: dict[str, Tensor] = {}
        self._reads = [name for layer in range(anatomy.layers) for name in reading_names(bundle, layer)]
        self.inputs: dict[str, Callable[[Tensor], None]] = {}
        """By module: what to call with its input."""
        for layer in range(anatomy.layers):
            parts = anatomy.parts(layer)
            if "down" in parts:
                self.inputs[parts["down"]] = self._adder(parts["down"])
            self.inputs[parts["o"]] = self._adder(parts["o"], anatomy.kv_heads)
        self.inputs.update({name: self._adder(name) for name in self._reads})
        self._mixtures = MixtureSums(bundle)
        for name, routed in self._mixtures.inputs.items():
            self.inputs[name] = _both(self.inputs[name], routed)
        self.last = self._adder(anatomy.head)
        """What to call with the last hidden states."""

    def _adder(self, name: str, groups: int | None = None) -> Callable[[Tensor], None]:
        def add(given: Tensor) -> None:
            if given.dim() == 3:
                self._windows = len(given)
            given = given.reshape(self._windows, -1, given.shape[-1])  # a shared expert has all windows in one
            sizes = given.abs() if groups is None else given.reshape(*given.shape[:-1], groups, -1).norm(dim=-1)
            squares = sizes.mean(1).double().square().sum(0).cpu()
            self._squares[name] = self._squares.get(name, torch.zeros(1)) + squares

        return add

    def scores(self) -> AxisScores:
        """Return the scores of all that was heard."""
        found = {name: total.sqrt() for name, total in self._squares.items()}
        parts = [self._anatomy.parts(layer) for layer in range(self._anatomy.layers)]
        experts, expert_units = self._mixtures.scores()
        return AxisScores(
            ffn=[found[names["down"]] if "down" in names else torch.zeros(0).double() for names in parts],
            groups=[found[names["o"]] for names in parts],
            channels=torch.stack([found[name] for name in [*self._reads, self._anatomy.head]]).sum(0),
            experts=experts,
            expert_units=expert_units,
        )


def _both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def hear(given: Tensor) -> None:
        first(given)
        second(given)

    return hear


def magnitude_scores(bundle: ModelBundle) -> list[Tensor]:
    """Return per layer the L2 norm [F], in float64, of the gate, up and down weights of each unit."""
    return magnitude_axis_scores(bundle).ffn


@torch.no_grad()
def magnitude_axis_scores(bundle: ModelBundle) -> AxisScores:
    """Return the L2 norms of all weights of each unit, group and channel."""
    anatomy = bundle.anatomy
    names = [anatomy.embedding] if anatomy.tied else [anatomy.embedding, anatomy.head]
    channels = torch.stack([_table_squares(bundle, name) for name in names]).sum(0)
    ffn, groups = [], []
    for layer in range(anatomy.layers):
        units, heads = torch.zeros(anatomy.ffn_width[layer]).double(), torch.zeros(anatomy.kv_heads).double()
        for part, name in anatomy.parts(layer).items():
            squares = _squares(bundle, name)
            channels += squares.sum(1 if part in ("o", "down") else 0)
            if part in ("gate", "up", "gate_up", "down"):
                units += squares.sum(0 if part == "down" else 1).view(-1, len(units)).sum(0)
            else:
                heads += _group_sums(bundle, part, squares.sum(0 if part == "o" else 1))
        ffn.append(units.sqrt())
        groups.append(heads.sqrt())
    experts, expert_units, squares = mixture_magnitudes(bundle)
    return AxisScores(ffn, groups, (channels + squares).sqrt(), experts=experts, expert_units=expert_units)


def _squares(bundle: ModelBundle, name: str) -> Tensor:
    return read_parameter(bundle, f"{name}.weight").double().square().cpu()


def _table_squares(bundle: ModelBundle, name: str) -> Tensor:
    """Return the sums [D] of the squares of an embedding or head, some rows at a time."""
    weight, anatomy = f"{name}.weight", bundle.anatomy
    slices = row_slices((anatomy.vocab, anatomy.width))
    return torch.stack([read_parameter(bundle, weight, *rows).double().square().sum(0).cpu() for rows in slices]).sum(0)


def _group_sums(bundle: ModelBundle, part: Part, values: Tensor) -> Tensor:
    """Return the sums [K] per KV group of values per row of q, k, v or qkv, or per column of o."""
    anatomy = bundle.anatomy
    if part != "qkv":
        return values.view(anatomy.kv_heads, -1).sum(1)
    keys = anatomy.kv_heads * anatomy.head_dim
    pieces = torch.split(values, [anatomy.heads * anatomy.head_dim, keys, keys])
    return torch.stack([piece.view(anatomy.kv_heads, -1).sum(1) for piece in pieces]).sum(0)
