"""Codes of 1 to 8 bits in a dense byte string, and back.

Layout: little-endian bit order. Code i occupies the bits i*bits .. i*bits + bits - 1 of the string, where bit j of
the string is bit j % 8 (the least significant is 0) of byte j // 8. Nothing is padded but the last byte. For 4 bits
this is "low nibble first", the layout of ONNX Runtime's MatMulNBits and of Core ML's packed constants; 3, 5, 6 and 7
bits straddle bytes. Eight codes fill exactly `bits` bytes, so eight at a time pass through one 64-bit word.

>>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()   # 0x1 | 0x2 << 4, 0x3
[33, 3]
>>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
[1, 2, 3]
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_BITS", "pack_bits", "packed_bytes", "unpack_bits"]

MAX_BITS = 8
_CHUNK_CODES = 1 << 21
"""Codes in flight at a time; bounds the 64-bit scratch to 16 MB."""


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take.

    >>> packed_bytes(3, 3)
    2
    """
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 [packed_bytes]: the codes of a uint8 tensor (any shape, row-major), each below 2**bits."""
    _require_bits(bits)
    flat = codes.reshape(-1)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes to pack are {codes.dtype}; torch.uint8 is needed")
    if bits < MAX_BITS and flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    if bits == MAX_BITS:
        return flat.clone()
    if 8 % bits == 0:
        return _pack_within_bytes(flat, bits)
    packed = [_pack_across_bytes(flat[i : i + _CHUNK_CODES], bits) for i in range(0, flat.numel(), _CHUNK_CODES)]
    return torch.cat(packed) if packed else flat.clone()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return uint8 [count]: the first `count` codes of a packed string."""
    _require_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"{count:,} codes of {bits} bits need a uint8 string of {packed_bytes(count, bits):,} bytes; "
            f"found {packed.dtype} {list(packed.shape)}"
        )
    if bits == MAX_BITS:
        return packed.clone()
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).view(-1)[:count]
    step = _CHUNK_CODES * bits // 8
    codes = [_unpack_across_bytes(packed[i : i + step], bits) for i in range(0, packed.numel(), step)]
    return torch.cat(codes)[:count] if codes else packed.clone()


def _require_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}; 1 to {MAX_BITS} can be packed")


def _padded(flat: Tensor, multiple: int) -> Tensor:
    missing = -flat.numel() % multiple
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


def _pack_within_bytes(flat: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    columns = _padded(flat, per_byte).view(-1, per_byte)
    packed = columns[:, 0].clone()
    for place in range(1, per_byte):
        packed |= columns[:, place] << (place * bits)
    return packed


def _pack_across_bytes(flat: Tensor, bits: int) -> Tensor:
    columns = _padded(flat, 8).view(-1, 8)
    word = torch.zeros(len(columns), dtype=torch.int64, device=flat.device)
    for place in range(8):
        word |= columns[:, place].to(torch.int64) << (place * bits)
    lanes = [((word >> (8 * lane)) & 0xFF).to(torch.uint8) for lane in range(bits)]
    return torch.stack(lanes, dim=1).view(-1)[: packed_bytes(flat.numel(), bits)]


def _unpack_across_bytes(packed: Tensor, bits: int) -> Tensor:
    lanes = _padded(packed, bits).view(-1, bits)
    word = torch.zeros(len(lanes), dtype=torch.int64, device=packed.device)
    for lane in range(bits):
        word |= lanes[:, lane].to(torch.int64) << (8 * lane)
    codes = [((word >> (place * bits)) & ((1 << bits) - 1)).to(torch.uint8) for place in range(8)]
    return torch.stack(codes, dim=1).view(-1)
