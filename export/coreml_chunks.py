"""Where a model is cut when its weights would not fit into one Core ML package, and what each cut weighs.

A package's weights lie in one file, and files have limits: apps' downloads, the memory of the process that compiles
the model, and 2 GB where offsets are 32 bits (coremltools issue 1807; Anemll cuts iOS models at about 1 GB). The cut
runs between layers: the embedding stands in the first package, the head in the last, and the hidden state goes from one
to the next. A head tied to the embedding is stored twice once the two stand in different packages.

The sizes are upper bounds, counted before any work: codes at their width, tables, and 64 bytes of header and up to 63
of alignment for each constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dwindle.bundle import ModelBundle
from dwindle.errors import offenders
from dwindle.export.coreml_decoder import Part
from dwindle.quantized_model import packed_specs
from dwindle.weights import AffineWeight, spec_bits

__all__ = ["chunk_problems", "part_bytes", "planned_parts"]

_CONSTANT_BYTES = 128
_CONSTANTS_PER_MODULE = 5
"""Codes, lookup table, scales, offsets, and the bias that the converter gives every linear layer."""
_SMALL_CONSTANTS_BYTES = 16_384
"""For what is in no module: shapes, indices and the like that are large enough for the file."""


def planned_parts(bundle: ModelBundle, context: int, limit_bytes: int) -> tuple[Part, ...]:
    """Return the parts of the model, each within the limit if one unit is: as few as go from first to last."""
    parts: list[Part] = []
    layers, first, embedding = bundle.anatomy.layers, 0, True
    while True:
        last = Part(first, layers, embedding, True)
        if (first == layers and not embedding) or part_bytes(bundle, last, context) <= limit_bytes:
            return (*parts, last)
        end = first if embedding else first + 1
        while end < layers and part_bytes(bundle, Part(first, end + 1, embedding, False), context) <= limit_bytes:
            end += 1
        parts.append(Part(first, end, embedding, False))
        first, embedding = end, False


def chunk_problems(bundle: ModelBundle, context: int, limit_bytes: int) -> list[str]:
    """Return a line if a part that cannot be cut passes the limit; empty is good."""
    sizes = {part: part_bytes(bundle, part, context) for part in planned_parts(bundle, context, limit_bytes)}
    large = {part: size for part, size in sizes.items() if size > limit_bytes}
    if not large:
        return []
    named = [f"{_named(part)} ({size:,} bytes)" for part, size in large.items()]
    return [f"coreml: {len(large)} parts that cannot be cut pass largest_file_bytes={limit_bytes:,}: "
            f"{offenders(named, 6)}. Set it to {max(large.values()):,} at least."]  # fmt: skip


def part_bytes(bundle: ModelBundle, part: Part, context: int) -> int:
    """Return the most bytes that the weights of a part take in its package."""
    anatomy, total = bundle.anatomy, _SMALL_CONSTANTS_BYTES
    layers = [f"model.layers.{row}." for row in range(part.first, part.end)]
    names = [*layers] + [anatomy.embedding] * part.embedding + ["model.norm"] * part.head
    if part.head and not (anatomy.tied and part.embedding):
        names.append(anatomy.embedding if anatomy.tied else anatomy.head)
    specs = packed_specs(bundle.model)
    total += sum(_packed_bytes(spec) for name, spec in _within(specs, names))
    for name, parameter in _within(dict(bundle.model.named_parameters()), names):
        # Norms are stored twice over (see coreml_decoder.MirroredNorm), all else once; both in float16.
        total += (4 if name.endswith("norm.weight") else 2) * parameter.numel() + _CONSTANT_BYTES
    ropes = dict.fromkeys(anatomy.traits.ropes[part.first : part.end])
    total += sum(2 * context * anatomy.head_dim for rope in ropes if rope is not None) + 4 * context
    return total


def _within(items: Mapping[str, Any], names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Return the items of these modules: a layer's by its prefix, others by name."""
    prefixes = tuple(name if name.endswith(".") else f"{name}." for name in names)
    return ((name, item) for name, item in items.items() if f"{name}.".startswith(prefixes))


def _packed_bytes(spec: Mapping[str, Any]) -> int:
    outputs, inputs = map(int, spec["shape"])
    widened = 0
    if spec["kind"] == AffineWeight.kind and not spec.get("symmetric", True):
        # Zero points take whole bytes where codes are looked up.
        widened = outputs * (inputs // int(spec["group_size"]))
    return -(-spec_bits(spec) // 8) + widened + 2 * outputs + _CONSTANTS_PER_MODULE * _CONSTANT_BYTES + 1024


def _named(part: Part) -> str:
    rows = f"layer {part.first}" if part.layers == 1 else f"layers {part.first} to {part.end - 1}"
    return " with ".join(["the embedding"] * part.embedding + [rows] * bool(part.layers) + ["the head"] * part.head)
