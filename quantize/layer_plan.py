"""Which format every linear, the embedding and the head will get: decided, and refused, before any work is done.

A quantizer that meets a layer its groups do not divide has four ways out: to pad (the runtime pays), to leave the
layer float in silence (a "4-bit" model of half its promised compression), to refuse, or to take another size and say
so. A `group_size` that was asked for is refused, with every offender and the sizes that would do. Where none was
asked for, a layer takes the nearest size that divides it, and the plan's `notes` name it:

    palettes   16 output rows; else the divisor of the rows nearest to 16 in ratio, 8 to 64; else the whole tensor
    integers   32 inputs; else the divisor of the inputs nearest to 32 that is a multiple of 16, to 128; else the row

Multiples of 16 because ONNX Runtime's blocks are (see `formats`). `keep_float` leaves layers out; each is a line in
the report.

A plan needs names and shapes, no weights: `ModelShapes` carries what the headers of a sharded checkpoint tell.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.anatomy import require_dense
from dwindle.errors import RecipeError, offenders
from dwindle.quantize.formats import check_runtimes, runtime_notes
from dwindle.quantize.options import INTEGER_BITS, PALETTE_BITS, QuantizeOptions, Scheme
from dwindle.report import Skipped
from dwindle.weights import AffineWeight, PalettizedWeight, spec_bits

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.bundle import ModelBundle
    from dwindle.weight_source import WeightSource

__all__ = ["LayerFormat", "LayerPlan", "ModelShapes", "end_format", "group_size_for", "plan_layers",
           "require_storable"]  # fmt: skip

Shape = tuple[int, int]

PREFERRED_GROUP: dict[str, int] = {"palettize": 16, "integer": 32}
"""Output rows that share a palette, inputs that share a scale, where no group_size is asked for."""
_LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class LayerFormat:
    """How one module is stored."""

    name: str
    scheme: Scheme
    bits: int
    group_size: int
    symmetric: bool = True
    row_scales: bool = False

    def spec(self, shape: Shape) -> dict[str, Any]:
        """Return the spec (see `dwindle.weights`) of a weight [O, I] in this format."""
        common = {"bits": self.bits, "group_size": self.group_size, "shape": list(shape)}
        if self.scheme == "palettize":
            return {"kind": PalettizedWeight.kind, **common, "row_scales": self.row_scales}
        return {"kind": AffineWeight.kind, **common, "symmetric": self.symmetric}

    def stored_bits(self, shape: Shape) -> int:
        """Return the bits of codes and tables of a weight [O, I] in this format.

        >>> LayerFormat("up", "palettize", 4, 16).stored_bits((32, 8))
        1536
        """
        return spec_bits(self.spec(shape))


@dataclass(frozen=True)
class LayerPlan:
    """What `quantize.run` will do: formats in the model's order, the tied head, what stays float, what to know."""

    layers: tuple[LayerFormat, ...]
    tied: dict[str, str]
    """Head -> embedding whose codes it reads; empty if each has its own, or if they stay float."""
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()
    """Layers whose groups have another size than the preferred one; what a runtime may run slower than hoped."""

    @property
    def formats(self) -> dict[str, LayerFormat]:
        """Return the formats by name."""
        return {layer.name: layer for layer in self.layers}

    def with_bits(self, bits: Mapping[str, int]) -> LayerPlan:
        """Return the plan with other bits in the named layers.

        Raises RecipeError naming every layer that is not in the plan and every width that its scheme does not have.
        """
        formats = self.formats
        wrong = [f"{name} (not a layer that is quantized)" for name in bits if name not in formats]
        for name, width in bits.items():
            allowed = PALETTE_BITS if name in formats and formats[name].scheme == "palettize" else INTEGER_BITS
            if name in formats and width not in allowed:
                wrong.append(f"{name}: {width} bits (needed: {', '.join(map(str, allowed))})")
        if wrong:
            raise RecipeError(f"quantize: {len(wrong)} entries of the bit plan cannot be meant: {offenders(wrong)}. "
                              "Change or remove them.")  # fmt: skip
        return replace(self, layers=tuple(replace(f, bits=bits.get(f.name, f.bits)) for f in self.layers))


@dataclass(frozen=True)
class ModelShapes:
    """What a plan needs to know of a model that is not in memory."""

    anatomy: Anatomy
    shapes: Mapping[str, Shape]
    """(O, I) of every linear, the embedding (V, D) and an untied head."""
    storage_dtype: torch.dtype
    quantized: bool = False

    @classmethod
    def of(cls, bundle: ModelBundle) -> ModelShapes:
        """Return those of a bundle."""
        names = _coded_names(bundle.anatomy)
        shapes = {name: tuple(bundle.model.get_submodule(name).weight.shape) for name in names}
        return cls(bundle.anatomy, shapes, bundle.storage_dtype, bundle.quantized)

    @classmethod
    def stored(cls, source: WeightSource) -> ModelShapes:
        """Return those of a checkpoint folder."""
        return cls.from_anatomy(source.anatomy, source.storage_dtype)

    @classmethod
    def from_anatomy(cls, anatomy: Anatomy, storage_dtype: torch.dtype, quantized: bool = False) -> ModelShapes:
        """Return those that a config alone implies."""
        shapes = {
            name: anatomy.linear_shape(layer, part)
            for layer in range(anatomy.layers)
            for part, name in anatomy.parts(layer).items()
        }
        ends = [name for name in _coded_names(anatomy) if name not in shapes]
        shapes |= dict.fromkeys(ends, (anatomy.vocab, anatomy.width))
        return cls(anatomy, {name: shapes[name] for name in _coded_names(anatomy)}, storage_dtype, quantized)


def plan_layers(model: ModelBundle | ModelShapes, options: QuantizeOptions) -> LayerPlan:
    """Return the plan, or raise RecipeError naming every layer that cannot have the format asked for.

    A bundle's weights are held to `require_storable`; whoever plans from shapes does that while it reads them.
    """
    known = model if isinstance(model, ModelShapes) else ModelShapes.of(model)
    if known.quantized:
        raise RecipeError(
            "quantize: the model is quantized already, and codes are rounded once. Start from the float checkpoint "
            "that it was made from."
        )
    check_runtimes(options)
    anatomy = known.anatomy
    kept = _kept_float(anatomy, options.keep_float)
    linears = set(anatomy.linear_names())
    shapes = {name: known.shapes[name] for name in _coded_names(anatomy) if name not in kept}
    if not linears & set(shapes):
        raise RecipeError("quantize: keep_float keeps every linear float, so there is nothing to plan. Shorten it.")
    groups, notes = _groups({name: shape for name, shape in shapes.items() if name in linears}, options)
    layers = tuple(
        LayerFormat(name, options.scheme, options.bits, groups[name], options.symmetric, options.row_scales)
        if name in linears
        else end_format(name, shape, options)
        for name, shape in shapes.items()
    )
    if not isinstance(model, ModelShapes):
        require_storable(model.model.named_parameters(), shapes)
    tied = {anatomy.head: anatomy.embedding} if anatomy.tied and anatomy.embedding not in kept else {}
    dtype = str(known.storage_dtype).removeprefix("torch.")
    lines = tuple(
        Skipped(f"quantize {name}", f"kept in {dtype}: keep_float lists {kept[name]}")
        for name in _coded_names(anatomy)
        if name in kept
    )
    return LayerPlan(layers, tied, lines, (*notes, *runtime_notes(options)))


def group_size_for(scheme: Scheme, shape: Shape) -> int:
    """Return the group of a layer [O, I] for which no group_size is asked: the nearest to the preferred that divides.

    >>> [group_size_for("palettize", (rows, 64)) for rows in (64, 172, 6)]
    [16, 43, 6]
    >>> [group_size_for("integer", (64, inputs)) for inputs in (64, 48, 172)]
    [32, 48, 172]
    """
    preferred = PREFERRED_GROUP[scheme]
    extent, sizes = (shape[0], range(8, 65)) if scheme == "palettize" else (shape[1], range(16, 129, 16))
    fitting = [size for size in sizes if extent % size == 0]
    return min(fitting, key=lambda size: max(size / preferred, preferred / size), default=extent)


def require_storable(tensors: Iterable[tuple[str, Tensor]], coded: Collection[str]) -> None:
    """Raise RecipeError naming every tensor that holds NaN or infinity, or is to be coded and exceeds fp16.

    `tensors` may be a stream: each is looked at once. `coded` holds names of modules, without `.weight`.
    """
    count, bad = 0, []
    for name, tensor in tensors:
        count += 1
        largest = float(tensor.detach().abs().max())
        if not math.isfinite(largest):
            bad.append(f"{name} (not finite)")
        elif largest > _LARGEST_FP16 and name.removesuffix(".weight") in coded:
            bad.append(f"{name} ({largest:.3g})")
    if bad:
        raise RecipeError(
            f"quantize: {len(bad)} of {count} tensors hold NaN, infinity, or weights that no fp16 palette or scale can "
            f"express (at most {_LARGEST_FP16:,.0f}): {offenders(bad)}. Mend the checkpoint, or list those that are "
            "finite under quantize.keep_float."
        )


def _coded_names(anatomy: Anatomy) -> list[str]:
    """Return the modules that get codes: all linears, the embedding, and the head if it has a weight of its own."""
    require_dense(anatomy, "quantize")
    return [*anatomy.linear_names(), anatomy.embedding, *([] if anatomy.tied else [anatomy.head])]


def end_format(name: str, shape: Shape, options: QuantizeOptions) -> LayerFormat:
    """Return the format of the embedding or the head: one palette for the table, or one scale per row."""
    if options.embedding_scheme == "palettize":
        return LayerFormat(name, "palettize", options.embedding_bits, shape[0])
    return LayerFormat(name, "integer", options.embedding_bits, shape[1])


def _kept_float(anatomy: Anatomy, patterns: Iterable[str]) -> dict[str, str]:
    """Return name -> pattern of what stays float; a tied pair stays together."""
    names = [*anatomy.linear_names(), anatomy.embedding, anatomy.head]
    patterns = tuple(patterns)
    _require_matches(patterns, names)
    kept = {name: pattern for name in names for pattern in patterns if fnmatchcase(name, pattern)}
    if anatomy.tied and (anatomy.embedding in kept or anatomy.head in kept):
        pattern = kept.get(anatomy.embedding) or kept[anatomy.head]
        kept |= {anatomy.embedding: pattern, anatomy.head: pattern}
    return kept


def _require_matches(patterns: Iterable[str], names: list[str]) -> None:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        near = {pattern: difflib.get_close_matches(pattern, names, n=1, cutoff=0.5) for pattern in idle}
        listed = [f"{p!r} (near: {near[p][0]})" if near[p] else repr(p) for p in idle]
        raise RecipeError(
            f"quantize: keep_float names nothing in this model: {offenders(listed)}. Give full module names such as "
            f"{names[0]}, or patterns such as '*.mlp.*'."
        )


def _groups(shapes: Mapping[str, Shape], options: QuantizeOptions) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the group size of every linear, and a note per size that is not the preferred one."""
    axis = 0 if options.scheme == "palettize" else 1
    if isinstance(options.group_size, int):
        _require_divisible({name: shape[axis] for name, shape in shapes.items()}, options.group_size, options.scheme)
        return dict.fromkeys(shapes, options.group_size), ()
    if options.group_size is not None:
        return {name: shape[axis] for name, shape in shapes.items()}, ()
    groups = {name: group_size_for(options.scheme, shape) for name, shape in shapes.items()}
    preferred = PREFERRED_GROUP[options.scheme]
    notes = []
    for size in sorted(set(groups.values()) - {preferred}):
        names = [name for name, group in groups.items() if group == size]
        notes.append(f"group_size {size} instead of {preferred} in {len(names)} layers: {offenders(names, 4)}")
    return groups, tuple(notes)


def _require_divisible(extents: Mapping[str, int], group_size: int, scheme: Scheme) -> None:
    bad = {name: extent for name, extent in extents.items() if extent % group_size}
    if not bad:
        return
    what = "a number of output rows" if scheme == "palettize" else "an input width"
    common = math.gcd(*extents.values())
    sizes = range(2, 65) if scheme == "palettize" else range(16, 129, 16)
    fitting = [str(size) for size in sizes if common % size == 0]
    whole = "tensor" if scheme == "palettize" else "channel"
    raise RecipeError(
        f"quantize: {len(bad)} of {len(extents)} layers have {what} not divisible by group_size={group_size}: "
        f"{offenders(f'{name} ({extent:,})' for name, extent in bad.items())}. Set group_size to one of "
        f"{', '.join([*fitting, whole])}, leave it out (each layer then takes the nearest size that divides it), or "
        "list them under quantize.keep_float."
    )
