"""Matching hidden states: the student's layers learn to give what the teacher's give.

    mse     mean over positions and width of (P s - t)^2
    cosine  mean over positions of 1 - cos(P s, t)

s is a student layer's output, t the matched teacher layer's, P a learned linear map where the widths differ, else the
identity (FitNets, arXiv 1412.6550). Minitron (arXiv 2407.14679) finds it of use when many layers were cut, and
logits alone better otherwise.

Student layer i of S is matched with teacher layer round(i L / S) of L, so that the last meets the last, unless the
recipe says otherwise. Layers are counted from 1; the output of a layer is what it passes on, before any final norm.

Projections live in the student under the name `layer_projections` while it trains, so that the loop's optimizer,
sharding and checkpoints hold them like any weight, and are taken away afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dwindle.sharding import repeated_layers

__all__ = [
    "PROJECTIONS",
    "LayerMeasure",
    "LayerOutputs",
    "attach_projections",
    "hidden_cosine",
    "hidden_mse",
    "layer_pairs",
    "match_layers",
]  # fmt: skip

LayerMeasure = Literal["mse", "cosine"]
PROJECTIONS = "layer_projections"
"""Where the student holds its projections while it trains."""
_PROJECTION_SEED = 0


def _row_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    kept = (mask.flatten() != 0).to(values.dtype)
    return (values * kept).sum() / kept.sum().clamp_min(1)


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of hidden states [N, D].

    >>> hidden_mse(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).item()
    12.5
    """
    return _row_mean((_wide(student) - _wide(teacher)).square().mean(-1), mask)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of 1 - cosine of hidden states [N, D].

    >>> hidden_cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
    1.0
    """
    return _row_mean(1 - nn.functional.cosine_similarity(_wide(student), _wide(teacher), dim=-1), mask)


_MEASURES = {"mse": hidden_mse, "cosine": hidden_cosine}


def layer_pairs(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """Return for each student layer the teacher's at the same share of the depth, counted from 1.

    >>> layer_pairs(3, 6)
    ((1, 2), (2, 4), (3, 6))
    """
    return tuple((i, max(1, round(i * teacher_layers / student_layers))) for i in range(1, student_layers + 1))


class LayerOutputs:
    """Collects what decoder layers pass on while it is entered."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self._model, self._layers = model, sorted(set(layers))
        self._outputs: dict[int, Tensor] = {}

    def __enter__(self) -> LayerOutputs:
        """Listen to the layers."""
        modules = repeated_layers(self._model) if self._layers else []
        self._handles = [modules[i - 1].register_forward_hook(self._listen(i)) for i in self._layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()

    def _listen(self, layer: int) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def flat(self) -> dict[int, Tensor]:
        """Return each layer's output [B * T, D]."""
        return {layer: output.flatten(0, 1) for layer, output in self._outputs.items()}


def attach_projections(model: nn.Module, pairs: Sequence[tuple[int, int]], width: int, teacher_width: int) -> None:
    """Give the student a learned map [teacher width, width] for each pair, if the widths differ; `del` it afterwards.

    The start is orthogonal and the same in every run, and leaves torch's random state alone.
    """
    if width == teacher_width:
        return
    reference = next(model.parameters())
    projections = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_PROJECTION_SEED)
        for student_layer, _ in pairs:
            linear = nn.Linear(width, teacher_width, bias=False)
            nn.init.orthogonal_(linear.weight)
            projections[str(student_layer)] = linear.to(reference.device, reference.dtype)
    setattr(model, PROJECTIONS, projections)


def match_layers(
    model: nn.Module, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], pairs: Sequence[tuple[int, int]],
    measure: LayerMeasure, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean over the pairs of one measure between projected student and teacher states."""
    projections = getattr(model, PROJECTIONS, None)
    losses = []
    for own, other in pairs:
        states = student[own] if projections is None else projections[str(own)](student[own])
        losses.append(_MEASURES[measure](states, teacher[other].to(states.device), mask))
    return torch.stack(losses).mean()
