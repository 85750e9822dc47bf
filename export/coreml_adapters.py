"""Adapters in a Core ML package: functions beside the base's, over weights that are stored once.

Core ML takes no weights as inputs, so an adapter is a function of the package, or where shapes are static two:

    main                      and for each adapter   NAME
    prefill, decode           and for each adapter   NAME_prefill, NAME_decode

Each is converted by itself, with its A and B as float16 constants, and merged by `coreml_merge.py`, which keeps equal
constants once: an adapter adds its own A and B and its program, the palettes and codes of the base stay one copy. An
app picks a function by name; the states have the same form in all of them.

A package is compiled as a whole, so an adapter that is trained later needs another export.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.export.decoder import Decoder
from dwindle.low_rank import Factors
from dwindle.weights import QuantizedWeight

__all__ = ["ADAPTERS_KEY", "LowRankLinear", "adapt", "function_name"]

ADAPTERS_KEY = "dwindle.adapters"
"""Metadata of a package: {adapter: {function of the base: function of the adapter}} as JSON."""
_MAIN = "main"


def function_name(adapter: str, function: str) -> str:
    """Return the name of an adapter's function beside one of the base.

    >>> function_name("bank-77", "main"), function_name("poems", "decode")
    ('bank_77', 'poems_decode')
    """
    name = re.sub(r"\W", "_", adapter)
    return name if function == _MAIN else f"{name}_{function}"


class LowRankLinear(nn.Module):
    """y = row_scale * (W x) + b + B A x, with W under the name that it has without an adapter."""

    def __init__(self, base: nn.Linear, change: Factors) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = _hollow(change.a), _hollow(change.b)
        self.row_scale = None if change.row_scale is None else nn.Buffer(change.row_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for x [..., I]."""
        low: Tensor = self.lora_b(self.lora_a(x))
        if self.row_scale is None:
            return functional.linear(x, self.weight, self.bias) + low
        scaled = functional.linear(x, self.weight) * self.row_scale + low
        return scaled if self.bias is None else scaled + self.bias


def adapt(
    decoder: Decoder, matrices: Mapping[str, QuantizedWeight | Tensor], changes: Mapping[str, Factors]
) -> dict[str, QuantizedWeight | Tensor]:
    """Put the changes on a hollow decoder's linears; return its matrices by module name, A and B with them."""
    carried = dict(matrices)
    for name, change in changes.items():
        base: Any = decoder.get_submodule(name)
        decoder.set_submodule(name, LowRankLinear(base, change))
        carried |= {f"{name}.lora_a": change.a, f"{name}.lora_b": change.b}
    decoder.eval().requires_grad_(False)
    return carried


def _hollow(matrix: Tensor) -> nn.Linear:
    """Return a linear of that shape whose weight takes no memory; the converter puts the numbers in its place."""
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(torch.zeros(()).expand(tuple(matrix.shape)), requires_grad=False)
    return made
