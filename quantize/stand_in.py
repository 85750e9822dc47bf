"""A model called with other weights in the place of its own.

Training quantized weights needs the unquantized model as the teacher, and the same model with fake-quantized weights
as the student. Both are one module here: the student is a call of the teacher in which `torch.func.functional_call`
puts other tensors in the place of its weights. Nothing is copied but what is trained; the trained tensors are the only
parameters that the training loop, its checkpoints and its shards see; every family works, tied heads and scaled
embeddings included, because the model's own code runs. `torch.nn.utils.parametrize` would change the model's classes
in place, and needs a copy of the model beside the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dwindle.quantize.fake_quantize import FakeInteger, FakePalette, power_of_two_unit
from dwindle.weights import QuantizedWeight

__all__ = ["StandIn"]


class StandIn(nn.Module):
    """A model with trained weights in the place of its own, which it neither copies nor changes.

    `weights` by module name, `floats` (norms, biases) by parameter name. A tensor that two modules share (embedding
    and head) is replaced in both. The model stays in the mode it is in, so nothing is dropped out.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, FakeInteger | FakePalette], floats: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self._model = (model,)
        self.names = tuple(weights)
        self.weights = nn.ModuleList(weights.values())
        self.float_names = tuple(floats)
        self.float_units = tuple(power_of_two_unit(value) for value in floats.values())
        self.floats = nn.ParameterList(
            nn.Parameter(value.detach() / unit) for value, unit in zip(floats.values(), self.float_units, strict=True)
        )

    def forward(self, **inputs: Any) -> Any:
        """Return what the model returns."""
        dense = {f"{name}.weight": weight() for name, weight in zip(self.names, self.weights, strict=True)}
        changed = dense | self.float_weights()
        frozen = {name: p.detach() for name, p in self._model[0].named_parameters() if name not in changed}
        return torch.func.functional_call(self._model[0], frozen | changed, kwargs=inputs)

    def float_weights(self) -> dict[str, Tensor]:
        """Return the trained float tensors by parameter name."""
        named = zip(self.float_names, self.floats, self.float_units, strict=True)
        return {name: value * unit for name, value, unit in named}

    def finish(self) -> dict[str, QuantizedWeight]:
        """Return the stored form of every trained weight by module name."""
        named = zip(self.names, self.weights, strict=True)
        return {name: cast("FakeInteger | FakePalette", weight).finish() for name, weight in named}
