"""What a shape weighs once it is quantized: the bits of a plan whose model does not exist yet. Torch-free.

A linear O x I, as `dwindle.weights` stores it and `quantize` groups it where no group size is asked for:

    palettes of b bits   b O I + 16 x 2^b x O / g       one palette of fp16 values per g = 16 output rows
    integers of b bits   b O I + 16 x O I / g           one fp16 scale per g = 32 inputs
    mixed                x O I                          at most x bits per weight, tables included
    float                16 O I or 32 O I               as the checkpoint stores it

Where 16 or 32 does not divide a layer, g is the nearest size that does. Embedding and head take 8 bits and one fp16
scale per row; norms and biases stay float. A test holds these numbers to the plans of `quantize`, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dwindle.devices.workload import LayerLoad, Workload
from dwindle.families import family_of
from dwindle.prune.shape import Shape

__all__ = ["EMBEDDING_BITS", "TABLE_SHARE", "Storage", "StorageScheme", "layer_bits", "model_bytes", "planned_workload"]

StorageScheme = Literal["palettize", "integer", "float"]

EMBEDDING_BITS = 8
"""Bits of a quantized embedding or head."""
TABLE_SHARE: Mapping[StorageScheme, float] = {"palettize": 0.0, "integer": 0.5, "float": 0.0}
"""Bits per weight that scales and palettes add: one of 16 bits per 32 integers, next to nothing for palettes."""
_TABLE_BITS = 16
"""Bits of a palette's entry or of a scale."""


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored."""

    scheme: StorageScheme
    bits: float
    """Bits of a code; mixed: most bits per weight; float: the checkpoint's own width."""
    float_bits: int
    """Width of what is not quantized: 16 or 32."""
    mixed: bool = False
    """Bits differ from layer to layer, `bits` is their average with all tables."""

    def __str__(self) -> str:
        """Return what a table says of it.

        >>> str(Storage("palettize", 4, 16)), str(Storage("integer", 3.5, 16, mixed=True))
        ('palettes of 4 bits', 'integers, 3.5 bits/weight')
        """
        kind = {"palettize": "palettes", "integer": "integers", "float": "float"}[self.scheme]
        return f"{kind}, {self.bits:g} bits/weight" if self.mixed else f"{kind} of {self.bits:g} bits"

    @property
    def code_bits(self) -> float:
        """Return the bits of a code, on average: what quality depends on.

        >>> Storage("integer", 4, 16, mixed=True).code_bits, Storage("integer", 4, 16).code_bits
        (3.5, 4)
        """
        return self.bits - TABLE_SHARE[self.scheme] if self.mixed else self.bits

    @property
    def weight_format(self) -> str | None:
        """Return the name that device profiles have for a linear's format; None: several."""
        if self.mixed:
            return None
        return {"palettize": "palette", "integer": "int", "float": "float"}[self.scheme] + f"{self.bits:g}"

    @property
    def table_format(self) -> str:
        """Return the name that device profiles have for the format of an embedding or a head."""
        return f"float{self.float_bits}" if self.scheme == "float" else f"int{EMBEDDING_BITS}"

    def linear_bits(self, outputs: int, inputs: int) -> float:
        """Return the stored bits of a linear's weight.

        >>> Storage("palettize", 4, 16).linear_bits(32, 8), Storage("integer", 4, 16).linear_bits(32, 64)
        (1536, 9216)
        """
        if self.mixed or self.scheme == "float":
            return self.bits * outputs * inputs
        codes = -(-int(self.bits) * outputs * inputs // 8) * 8
        group = _group(self.scheme, outputs if self.scheme == "palettize" else inputs)
        if self.scheme == "palettize":
            return codes + (_TABLE_BITS * (outputs // group) << int(self.bits))
        return codes + _TABLE_BITS * outputs * (inputs // group)

    def table_bits(self, rows: int, width: int) -> int:
        """Return the stored bits of an embedding or a head."""
        if self.scheme == "float":
            return self.float_bits * rows * width
        return EMBEDDING_BITS * rows * width + _TABLE_BITS * rows


@functools.cache
def _group(scheme: str, extent: int) -> int:
    preferred, sizes = (16, range(8, 65)) if scheme == "palettize" else (32, range(16, 129, 16))
    fitting = [size for size in sizes if extent % size == 0]
    return min(fitting, key=lambda size: max(size / preferred, preferred / size), default=extent)


def _linears(shape: Shape) -> list[tuple[int, int]]:
    queries, keys, width, ffn = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.width,
        shape.ffn_width,
    )
    if family_of(shape.model_type).fused:
        return [(queries + 2 * keys, width), (width, queries), (2 * ffn, width), (width, ffn)]
    return [(queries, width), (keys, width), (keys, width), (width, queries), (ffn, width), (ffn, width), (width, ffn)]


def layer_bits(shape: Shape, storage: Storage) -> tuple[float, int]:
    """Return the stored bits of one layer's linears, and of its norms and biases."""
    linears = _linears(shape)
    others = shape.layer_parameters - sum(outputs * inputs for outputs, inputs in linears)
    return sum(storage.linear_bits(*one) for one in linears), others * storage.float_bits


def model_bytes(shape: Shape, storage: Storage) -> int:
    """Return the stored bytes of all weights, a tied head once: what `ModelBundle.size` counts."""
    tables = storage.table_bits(shape.vocab, shape.width) * (1 if shape.tied else 2)
    rest = shape.width * storage.float_bits
    return -(-int(shape.layers * sum(layer_bits(shape, storage)) + tables + rest) // 8)


def planned_workload(
    shape: Shape, storage: Storage, context: int, kv_number_bytes: int, static_shapes: bool = False
) -> Workload:
    """Return what a token of this model costs, for `devices.estimate`."""
    linear, other = layer_bits(shape, storage)
    weights = shape.layers * sum(outputs * inputs for outputs, inputs in _linears(shape))
    floats = shape.layers * shape.layer_parameters - weights + shape.width
    table = shape.vocab * shape.width
    table_bytes = -(-storage.table_bits(shape.vocab, shape.width) // 8)
    as_float = f"float{storage.float_bits}"
    of_table = storage.table_format
    layers = [
        LayerLoad("linears", weights, -(-int(shape.layers * linear) // 8), format=storage.weight_format),
        LayerLoad("norms and biases", floats, (shape.layers * other + shape.width * storage.float_bits) // 8,
                  format=as_float),
        LayerLoad("model.embed_tokens", table, table_bytes, shape.tied, of_table),
    ]  # fmt: skip
    if not shape.tied:
        layers.append(LayerLoad("lm_head", table, table_bytes, format=of_table))
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * kv_number_bytes
    return Workload(tuple(layers), kv_bytes, context, shape.vocab, sum(layer.bytes for layer in layers),
                    attention_width=shape.layers * shape.heads * shape.head_dim, depth=shape.layers,
                    static_shapes=static_shapes)  # fmt: skip
