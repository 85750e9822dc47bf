"""Which format every linear, the embedding and the head will get: decided, and refused, before any work is done.

A quantizer that meets a layer its groups do not divide has three ways out: to pad (the runtime pays), to leave the
layer float in silence (a "4-bit" model of half its promised quality of compression), or to say so. Here every such
layer is an offender in one error, unless `keep_float` names it; then it is a line in the report.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.errors import RecipeError, offenders
from dwindle.quantize.options import QuantizeOptions, Scheme
from dwindle.report import Skipped

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["LayerFormat", "LayerPlan", "plan_layers"]

_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class LayerFormat:
    """How one module is stored."""

    name: str
    scheme: Scheme
    bits: int
    group_size: int
    symmetric: bool = True


@dataclass(frozen=True)
class LayerPlan:
    """What `quantize.run` will do: formats in the model's order, the tied head, and what stays float."""

    layers: tuple[LayerFormat, ...]
    tied: dict[str, str]
    skipped: tuple[Skipped, ...]


def plan_layers(bundle: ModelBundle, options: QuantizeOptions) -> LayerPlan:
    """Return the plan, or raise RecipeError naming every layer that cannot have the format asked for."""
    if bundle.quantized:
        raise RecipeError(
            "quantize: the model is quantized already, and codes are rounded once. Start from the float checkpoint "
            "that it was made from."
        )
    anatomy = bundle.anatomy
    linears = anatomy.linear_names()
    ends = [anatomy.embedding] if anatomy.tied else [anatomy.embedding, anatomy.head]
    names = [*linears, anatomy.embedding, anatomy.head]
    _require_matches(options.keep_float, names)
    kept = {name: pattern for name in names for pattern in options.keep_float if fnmatchcase(name, pattern)}
    if anatomy.tied and (anatomy.embedding in kept or anatomy.head in kept):
        pattern = kept.get(anatomy.embedding) or kept[anatomy.head]
        kept |= {anatomy.embedding: pattern, anatomy.head: pattern}
    shapes = {name: _weight(bundle, name).shape for name in [*linears, *ends] if name not in kept}
    _require_divisible({name: shapes[name] for name in linears if name not in kept}, len(linears), options)
    _require_fp16({name: _weight(bundle, name) for name in shapes})
    layers = [
        LayerFormat(name, options.scheme, options.bits, options.group_of(*shapes[name]), options.symmetric)
        if name in linears
        else LayerFormat(name, "integer", options.embedding_bits, shapes[name][1])
        for name in shapes
    ]
    tied = {anatomy.head: anatomy.embedding} if anatomy.tied and anatomy.embedding not in kept else {}
    lines = tuple(
        Skipped(f"quantize {name}", f"kept in {_short(bundle.storage_dtype)}: keep_float lists {pattern}")
        for name, pattern in kept.items()
        if name in linears or name in ends
    )
    return LayerPlan(tuple(layers), tied, lines)


def _weight(bundle: ModelBundle, name: str) -> Tensor:
    weight = bundle.model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_matches(patterns: Iterable[str], names: list[str]) -> None:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        near = {pattern: difflib.get_close_matches(pattern, names, n=1, cutoff=0.5) for pattern in idle}
        listed = [f"{p!r} (near: {near[p][0]})" if near[p] else repr(p) for p in idle]
        raise RecipeError(
            f"quantize: keep_float names nothing in this model: {offenders(listed)}. Give full module names such as "
            f"{names[0]}, or patterns such as '*.mlp.*'."
        )


def _require_divisible(shapes: dict[str, torch.Size], count: int, options: QuantizeOptions) -> None:
    axis, what = (0, "a number of output rows") if options.scheme == "palettize" else (1, "an input width")
    bad = {name: shape[axis] for name, shape in shapes.items() if shape[axis] % options.group_of(*shape)}
    if not bad:
        return
    group = options.group_of(*next(iter(shapes.values())))
    fitting = math.gcd(group, *bad.values())
    raise RecipeError(
        f"quantize: {len(bad)} of {count} layers have {what} not divisible by group_size={group}: "
        f"{offenders(f'{name} ({extent:,})' for name, extent in bad.items())}. "
        f"Set group_size={fitting}, or list them under quantize.keep_float."
    )


def _require_fp16(weights: dict[str, Tensor]) -> None:
    bad = [
        f"{name} ({'not finite' if not math.isfinite(largest) else f'{largest:.3g}'})"
        for name, weight in weights.items()
        if not (largest := float(weight.detach().abs().max())) <= _LARGEST_FP16
    ]
    if bad:
        raise RecipeError(
            f"quantize: {len(bad)} of {len(weights)} layers hold weights that no fp16 palette or scale can express "
            f"(at most {_LARGEST_FP16:,.0f}): {offenders(bad)}. Mend the checkpoint, or list them under "
            "quantize.keep_float."
        )
