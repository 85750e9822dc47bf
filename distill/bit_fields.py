"""Whole numbers of a fixed width of up to 25 bits, packed without gaps: token ids and counts of a logit cache.

The bit stream is little-endian: field i has its lowest bit at stream bit i * bits, and stream bit k is bit k mod 8 of
byte k div 8. Any field then lies within four bytes, so that reading is one gather, a shift and a mask, all in numpy:
for the ids of a vocabulary `bit_packing` is too narrow (8 bits), and numpy has `packbits` for single bits only.

>>> pack_fields(np.array([5, 0, 7]), 3).tolist()
[197, 1]
>>> unpack_fields(np.array([197, 1], np.uint8), 3, 3).tolist()
[5, 0, 7]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_FIELD_BITS", "field_bytes", "pack_fields", "unpack_fields"]

MAX_FIELD_BITS = 25
"""A field starts anywhere in a byte and must end within the four bytes read for it."""


def field_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` fields.

    >>> field_bytes(3, 18)
    7
    """
    return (count * bits + 7) // 8


def pack_fields(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Return the packed bytes of `values`, each from 0 to below 2**bits."""
    _require_bits(bits)
    wide = np.ascontiguousarray(values, dtype="<u4").reshape(-1)
    if wide.size and int(wide.max()) >> bits:
        raise ValueError(f"a value of {int(wide.max())} does not fit into {bits} bits")
    lanes = wide.view(np.uint8).reshape(-1, 4)[:, : (bits + 7) // 8]
    return np.packbits(np.unpackbits(lanes, axis=1, count=bits, bitorder="little").reshape(-1), bitorder="little")


def unpack_fields(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return the first `count` fields of `packed`."""
    _require_bits(bits)
    if packed.size < field_bytes(count, bits):
        needed = field_bytes(count, bits)
        raise ValueError(f"{count:,} fields of {bits} bits need {needed:,} bytes, found {packed.size:,}")
    padded = np.concatenate([packed, np.zeros(4, np.uint8)])
    words = np.ndarray((packed.size + 1,), "<u4", padded.data, strides=(1,))
    start = np.arange(count, dtype=np.int64) * bits
    fields: NDArray[np.int64] = (words[start >> 3] >> (start & 7).astype(np.uint32)).astype(np.int64)
    return fields & ((1 << bits) - 1)


def _require_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_FIELD_BITS:
        raise ValueError(f"bits is {bits}; 1 to {MAX_FIELD_BITS} can be packed")
