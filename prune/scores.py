r"""How much each FFN unit, KV group and channel of the hidden width matters, from forward passes alone.

A unit is one row of gate and up and one column of down. A KV group is a KV head with the query heads that share it:
its rows of q, k and v and its columns of o. A channel is one coordinate of the residual stream.

- `activation` (Muralidharan et al. 2024, Minitron, arXiv 2407.14679, section 2.2): forward passes over a small
  calibration set, mean over the sequence and L2 over the batch, the pair the paper found best:

      score_j = sqrt( sum over windows b of ( mean over tokens t of |a[b, t, j]| )^2 )

  with a the input of down (units), the norm of a group's share of the input of o (groups), or what q, gate and the
  head read (channels; summed over all places where the width is read). It costs as much as measuring the model.
- `magnitude`: the L2 norm of all weights of the unit, group or channel. It needs no data.
- `taylor` and `fisher`: see `gradient_scores`. Layers as a whole: see `depth_scores`.

Memory of `activation`: the activations of one batch and one float64 vector per place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.anatomy import Part, module
from dwindle.prune.calibration_pass import batches, check_calibration, decode, reading_names, watching
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["AxisScores", "activation_axis_scores", "activation_scores", "magnitude_axis_scores", "magnitude_scores"]


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


def activation_scores(bundle: ModelBundle, calibration: TokenSet) -> list[Tensor]:
    """Return per layer the activation scores [F] of the FFN units; windows of `calibration` are the batch."""
    return activation_axis_scores(bundle, calibration).ffn


@torch.inference_mode()
def activation_axis_scores(bundle: ModelBundle, calibration: TokenSet) -> AxisScores:
    """Return the activation scores of units, groups and channels, all from one pass.

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    anatomy = bundle.anatomy
    squares: dict[str, Tensor] = {}

    def adder(name: str, groups: int | None = None) -> Callable[[Tensor], None]:
        def add(given: Tensor) -> None:
            sizes = given.abs() if groups is None else given.reshape(*given.shape[:-1], groups, -1).norm(dim=-1)
            squares[name] = squares.get(name, torch.zeros(1)) + sizes.mean(1).double().square().sum(0).cpu()

        return add

    watchers: dict[str, Callable[[Tensor], None]] = {}
    reads = [name for layer in range(anatomy.layers) for name in reading_names(bundle, layer)]
    for layer in range(anatomy.layers):
        parts = anatomy.parts(layer)
        watchers[parts["down"]] = adder(parts["down"])
        watchers[parts["o"]] = adder(parts["o"], anatomy.kv_heads)
    watchers.update({name: adder(name) for name in reads})
    last = adder(anatomy.head)
    with watching(bundle, watchers):
        for ids in batches(bundle, calibration):
            last(decode(bundle, ids))
    found = {name: total.sqrt() for name, total in squares.items()}
    return AxisScores(
        ffn=[found[anatomy.parts(layer)["down"]] for layer in range(anatomy.layers)],
        groups=[found[anatomy.parts(layer)["o"]] for layer in range(anatomy.layers)],
        channels=torch.stack([found[name] for name in [*reads, anatomy.head]]).sum(0),
    )


def magnitude_scores(bundle: ModelBundle) -> list[Tensor]:
    """Return per layer the L2 norm [F], in float64, of the gate, up and down weights of each unit."""
    return magnitude_axis_scores(bundle).ffn


@torch.no_grad()
def magnitude_axis_scores(bundle: ModelBundle) -> AxisScores:
    """Return the L2 norms of all weights of each unit, group and channel."""
    anatomy = bundle.anatomy
    names = [anatomy.embedding] if anatomy.tied else [anatomy.embedding, anatomy.head]
    channels = torch.stack([_squares(bundle, name).sum(0) for name in names]).sum(0)
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
    return AxisScores(ffn, groups, channels.sqrt())


def _squares(bundle: ModelBundle, name: str) -> Tensor:
    return module(bundle.model, name).get_parameter("weight").detach().double().square().cpu()


def _group_sums(bundle: ModelBundle, part: Part, values: Tensor) -> Tensor:
    """Return the sums [K] per KV group of values per row of q, k, v or qkv, or per column of o."""
    anatomy = bundle.anatomy
    if part != "qkv":
        return values.view(anatomy.kv_heads, -1).sum(1)
    keys = anatomy.kv_heads * anatomy.head_dim
    pieces = torch.split(values, [anatomy.heads * anatomy.head_dim, keys, keys])
    return torch.stack([piece.view(anatomy.kv_heads, -1).sum(1) for piece in pieces]).sum(0)
