"""Adapters of a Core AI asset: function inputs that every call is handed, one asset for all of them.

Each linear of a layer takes two inputs more, with `dora` three (O x I the linear, r the rank):

    NAME.lora_a [r, I]   NAME.lora_b [O, r]    y = W x + b + B A x
    NAME.row_scale [O]                         y = g * (W x) + b + B A x        without DoRA all ones

In the dynamic layout r is any number from 2 on, the same for all inputs of a call: adapters of different ranks share
the asset, a smaller rank within an adapter is filled up with zeros, and the base is a call with zeros of rank 2. In the
static layout r is what the asset was exported for (`adapter_rank`).

An asset holds no second copy of anything, and an adapter is no part of it: its arrays lie in
`adapter_inputs.safetensors` of the adapter's folder, by input, in the type the asset computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import Anatomy
from dwindle.errors import RecipeError
from dwindle.low_rank import Factors

__all__ = ["INPUTS_FILE", "LEAST_RANK", "AdaptedLinear", "AdapterInputs", "base_arrays", "input_arrays", "take_inputs",
           "write_inputs"]  # fmt: skip

INPUTS_FILE = "adapter_inputs.safetensors"
"""Name of the arrays' file inside an adapter's folder."""
LEAST_RANK = 2
"""torch.export bakes in a size of 0 or 1."""
_EXAMPLE_RANK = 3
_LARGEST_RANK = 1024


class AdapterInputs:
    """Which inputs a decoder takes for adapters, and the values of the call that is being computed."""

    def __init__(self, kind: str, shapes: Mapping[str, tuple[int, int]], rank: int | None, dtype: torch.dtype) -> None:
        """`shapes` are (O, I) by linear; `rank` None is any."""
        self.kind, self.shapes, self.rank, self.dtype = kind, dict(shapes), rank, dtype
        self._leaves = ("lora_a", "lora_b", "row_scale") if kind == "dora" else ("lora_a", "lora_b")
        self._bound: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Return the names of the inputs, in their order."""
        return [f"{name}.{leaf}" for name in self.shapes for leaf in self._leaves]

    def examples(self) -> list[Tensor]:
        """Return inputs to trace with."""
        rank = self.rank or _EXAMPLE_RANK
        return [torch.zeros(_shape(leaf, shape, rank), dtype=self.dtype) for shape in self.shapes.values()
                for leaf in self._leaves]  # fmt: skip

    def dynamic_shapes(self) -> list[dict[int, Any]]:
        """Return which sizes of the inputs are free, as torch.export wants it told."""
        if self.rank is not None:
            return [{} for _ in self.names]
        rank = torch.export.Dim("rank", min=LEAST_RANK, max=_LARGEST_RANK)
        free = {"lora_a": {0: rank}, "lora_b": {1: rank}, "row_scale": {}}
        return [free[leaf] for _ in self.shapes for leaf in self._leaves]

    @contextmanager
    def bound(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the linears compute with these values while the context lasts."""
        self._bound = dict(zip(self.names, values, strict=True))
        try:
            yield
        finally:
            self._bound = {}

    def of(self, name: str, leaf: str) -> Tensor | None:
        """Return a bound value."""
        return self._bound.get(f"{name}.{leaf}")

    def of_base(self) -> list[tuple[str, list[int], int]]:
        """Return (name, shape, value that fills it) of the inputs with which the base is computed."""
        rank = self.rank or LEAST_RANK
        return [(f"{name}.{leaf}", list(_shape(leaf, shape, rank)), int(leaf == "row_scale"))
                for name, shape in self.shapes.items() for leaf in self._leaves]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of the inputs; `input_arrays` reads it."""
        return {"inputs": self.kind, "rank": self.rank, "compute": str(self.dtype).removeprefix("torch."),
                "shapes": {name: list(shape) for name, shape in self.shapes.items()}}  # fmt: skip


def _shape(leaf: str, shape: tuple[int, int], rank: int) -> tuple[int, ...]:
    outputs, inputs = shape
    return {"lora_a": (rank, inputs), "lora_b": (outputs, rank), "row_scale": (outputs,)}[leaf]


class AdaptedLinear(nn.Module):
    """A linear and what the bound inputs add to it."""

    def __init__(self, base: nn.Module, name: str, inputs: AdapterInputs) -> None:
        super().__init__()
        self.base, self.name, self.inputs = base, name, inputs

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the linear."""
        found: Tensor | None = getattr(self.base, "bias", None)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for x [..., I]."""
        y: Tensor = self.base(x)
        a, b = self.inputs.of(self.name, "lora_a"), self.inputs.of(self.name, "lora_b")
        if a is None or b is None:
            return y
        low = torch.matmul(torch.matmul(x, a.T), b.T)
        scale = self.inputs.of(self.name, "row_scale")
        if scale is None:
            return y + low
        return scale * y + low if self.bias is None else scale * (y - self.bias) + low + self.bias


def take_inputs(decoder: nn.Module, anatomy: Anatomy, kind: str, rank: int | None, dtype: torch.dtype) -> AdapterInputs:
    """Let the linears of all layers of a decoder compute with inputs, and return those; `kind` none: it has none."""
    shapes = {} if kind == "none" else {name: anatomy.linear_shape(layer, part) for layer in range(anatomy.layers)
                                        for part, name in anatomy.parts(layer).items()}  # fmt: skip
    inputs = AdapterInputs(kind, shapes, rank, dtype)
    for name in shapes:
        decoder.set_submodule(name, AdaptedLinear(decoder.get_submodule(name), name, inputs))
    return inputs


def input_arrays(facts: Mapping[str, Any], changes: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the inputs of an adapter by name: of one rank, zero where nothing changes.

    Raises RecipeError if its rank is larger than the asset's.
    """
    dtype = getattr(torch, facts["compute"])
    largest = max((len(change.a) for change in changes.values()), default=0)
    rank = facts["rank"] or max(largest, LEAST_RANK)
    if largest > rank:
        raise RecipeError(f"an adapter of rank {largest} does not fit into an asset of static shapes that was exported "
                          f"for rank {rank}. Export it again with --set adapter_rank={largest}.")  # fmt: skip
    arrays: dict[str, Tensor] = {}
    for name, (outputs, inputs) in facts["shapes"].items():
        a, b, scale = torch.zeros(rank, inputs), torch.zeros(outputs, rank), torch.ones(outputs)
        if name in changes:
            one = changes[name]
            a[: len(one.a)], b[:, : len(one.a)] = one.a, one.b
            scale = scale if one.row_scale is None else one.row_scale
        arrays |= {f"{name}.lora_a": a.to(dtype), f"{name}.lora_b": b.to(dtype)}
        if facts["inputs"] == "dora":
            arrays[f"{name}.row_scale"] = scale.to(dtype)
    return arrays


def base_arrays(facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs that change nothing."""
    return input_arrays(facts, {})


def write_inputs(path: Path, arrays: Mapping[str, Tensor], base_sha256: str) -> None:
    """Write the arrays of one adapter, with the hash of the base they belong to."""
    from safetensors.torch import save_file

    save_file({name: array.contiguous() for name, array in arrays.items()}, path,
              metadata={"format": "pt", "base_sha256": base_sha256})  # fmt: skip
    path.chmod(0o644)  # safetensors writes for the owner alone
