r"""A decoder whose FFN units or KV groups are weighed by Soft-Top-K masks, around a stock model that stays as it is.

    masks[l] = soft_top_k(normalised(scores[l]), k(step), t(step))      normalised: (s - mean) / sqrt(var + 0.01)

The normalisation is a layer norm without weights: a temperature then means the same in every layer and at every step,
whatever size the scores have grown to.

Only while the masked model is being called does a hook multiply the input of the linear that reads the units (down for
FFN units, o for KV groups). So nothing is copied, and the unmasked teacher is the same module. In training mode the
masks are soft; in evaluation mode they are the ones and zeros that the scores stand for, and the logits are those of
the model with the other units cut out.

Which step's masks those are is told by the objective (`masks.UnmaskedTeacher`), to which the training loop says it: a
batch that is cut into more pieces because memory ran out, or a resumed run, has the masks of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dwindle.anatomy import Anatomy, Part, module
from dwindle.prune.mask_options import MaskSchedule
from dwindle.prune.soft_top_k import soft_top_k

__all__ = ["AxisMasks", "MaskAxis", "MaskedModel", "axis_units"]

MaskAxis = Literal["ffn", "kv_groups"]

_NORM_EPS = 0.01
"""Added to the variance of a layer's scores: scores that are all equal, or only two, can still move apart."""
_READER: dict[MaskAxis, Part] = {"ffn": "down", "kv_groups": "o"}
"""The linear whose input is masked."""


def axis_units(anatomy: Anatomy, axis: MaskAxis) -> int:
    """Return how many units a layer has along an axis."""
    return anatomy.ffn_width[0] if axis == "ffn" else anatomy.kv_heads


class AxisMasks(nn.Module):
    """The scores of one axis, and the masks [L, n] they make.

    `start` [L, n] are the first scores. `unit` is the size of a parameter's step in scores, so that scores and weights
    can learn at different rates under one optimizer.
    """

    def __init__(self, start: Tensor, schedule: MaskSchedule, unit: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.unit = schedule, unit
        self.scores = nn.Parameter(start.detach().to(torch.float32) / unit)

    def soft(self, step: int) -> Tensor:
        """Return the masks of `step`, differentiable in the scores."""
        scores = nn.functional.layer_norm(self.scores * self.unit, (self.schedule.units,), eps=_NORM_EPS)
        return soft_top_k(scores, self.schedule.kept_at(step), self.schedule.temperature_at(step))

    def hard(self) -> Tensor:
        """Return ones for the units that the scores keep, and zeros."""
        kept = self.kept().to(self.scores.device)
        return torch.zeros_like(self.scores, requires_grad=False).scatter_(1, kept, 1.0)

    def kept(self) -> Tensor:
        """Return the kept units [L, k] on the CPU, ascending; ties go to the lower index."""
        order = self.scores.detach().cpu().argsort(dim=1, descending=True, stable=True)
        return order[:, : self.schedule.kept].sort(dim=1).values


class MaskedModel(nn.Module):
    """A model with masks along some axes: soft in training mode, hard in evaluation mode.

    The model is neither copied nor changed and gets no gradients, unless it is `trained`: then it is a part of this
    module.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        axes: Mapping[MaskAxis, AxisMasks],
        *,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self._frozen: tuple[nn.Module, ...] = () if trained else (model,)
        self._anatomy = anatomy
        self.trained = model if trained else None
        self.axes = nn.ModuleDict({str(axis): masks for axis, masks in axes.items()})
        self.step = 0
        """Optimizer step whose soft masks a call uses."""

    def forward(self, **inputs: Any) -> Any:
        """Return what the model returns with masked units."""
        masks = self.masks()
        model = self._frozen[0] if self.trained is None else self.trained
        with _masked_inputs(model, self._by_reader(masks)):
            if self.trained is not None:
                return model(**inputs)
            frozen = {name: p.detach() for name, p in model.named_parameters()}
            return torch.func.functional_call(model, frozen, kwargs=inputs)

    def masks(self) -> dict[MaskAxis, Tensor]:
        """Return the masks [L, n] that a call would use now, by axis."""
        return {axis: masks.soft(self.step) if self.training else masks.hard() for axis, masks in self._axes().items()}

    def _axes(self) -> dict[MaskAxis, AxisMasks]:
        return cast("dict[MaskAxis, AxisMasks]", dict(self.axes.items()))

    def _by_reader(self, masks: Mapping[MaskAxis, Tensor]) -> dict[str, Tensor]:
        """Return one number per channel of every masked linear's input."""
        found = {}
        for axis, rows in masks.items():
            part = _READER[axis]
            repeat = self._anatomy.linear_shape(0, part)[1] // rows.shape[1]
            for layer, row in enumerate(rows.repeat_interleave(repeat, dim=1).unbind()):
                found[self._anatomy.parts(layer)[part]] = row
        return found


@contextmanager
def _masked_inputs(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While it is open, the input of each named linear is multiplied by its mask."""

    def multiplier(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (inputs[0] * mask.to(inputs[0].dtype), *inputs[1:])

    hooks = [module(model, name).register_forward_pre_hook(multiplier(mask)) for name, mask in masks.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
