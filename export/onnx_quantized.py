"""Our integer codes in the layout of ONNX Runtime's block-quantized operators, bit for bit.

`MatMulNBits` and `GatherBlockQuantized` (domain com.microsoft) read

    W[o, i] = (code[o, i] - zero[o, i // block]) * scale[o, i // block]         zero = 2^(bits-1) unless given

with 2, 4 or 8 bits, block a power of two from 16 on, and codes packed little-end first, `[O, blocks, block * bits / 8]`
bytes. This is `AffineWeight`'s own arithmetic, so codes go in unchanged and nothing is rounded:

- a group that is a multiple of a block repeats its scale (per-channel weights take the block that costs least bytes);
- 1 and 3 bits are stored as 2 and 4 with their zero point written out;
- **8 bits with float32 activations are stored as two planes of 4 bits**, code = 16 high + low:
  (code - z) s = (high - z_high) 16 s + (low - z_low) s. The runtime has fast float32 kernels for 4 bits only: one
  2048 x 2048 product takes 0.31 ms in 4 bits, 12 ms in 8 (it unpacks the whole weight first) and 0.6 ms in two
  planes, on one x86 core. With int8 activations 8 bits have their own kernel and are stored as they are.

An embedding read by a tied head is stored once; both operators read the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dwindle.bit_packing import pack_bits
from dwindle.export.onnx_builder import MICROSOFT, GraphBuilder
from dwindle.export.options import Activations
from dwindle.weights import AffineWeight

__all__ = ["BLOCKS", "Plane", "block_size", "gather", "matmul", "planes"]

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes with kernels of their own, largest first."""
_ACCURACY = {"float32": 1, "int8": 4}
"""MatMulNBits' accuracy_level by activation type."""


def block_size(inputs: int, group_size: int, bits: int) -> int | None:
    """Return the block to store such a weight in, or None if the runtime has none for its group size.

    >>> block_size(256, 32, 4), block_size(192, 96, 4), block_size(256, 256, 8), block_size(48, 24, 4)
    (32, 32, 256, None)
    """
    if group_size == inputs:
        return min(BLOCKS, key=lambda block: -(-inputs // block) * (block * bits // 8 + 4))
    return next((block for block in BLOCKS if group_size % block == 0), None)


@dataclass(frozen=True)
class Plane:
    """Codes of 2, 4 or 8 bits in blocks along the inputs; a weight is the sum of its planes."""

    data: Tensor
    """uint8 [O, blocks, block * bits / 8], packed."""
    scales: Tensor
    """float32 [O, blocks]."""
    zero_points: Tensor | None
    """uint8 [O, blocks]; None: 2^(bits-1)."""
    bits: int
    block: int
    inputs: int


def planes(weight: AffineWeight, activations: Activations, *, multiplied: bool = True) -> list[Plane]:
    """Return the planes a weight is stored in; `multiplied` is False for a table that is only looked up."""
    block = block_size(weight.shape[1], weight.group_size, weight.bits)
    if block is None:
        raise ValueError(f"group_size={weight.group_size} has no block; check before packing")
    bits = next(b for b in (2, 4, 8) if b >= weight.bits)
    repeats = -(-weight.group_size // block)
    scales = weight.scales.to(torch.float32).repeat_interleave(repeats, dim=1)
    zeros = weight.zero_points
    if zeros is None and bits != weight.bits:
        zeros = torch.full_like(weight.scales, 1 << (weight.bits - 1), dtype=torch.uint8)
    zeros = None if zeros is None else zeros.repeat_interleave(repeats, dim=1)
    if bits == 8 and activations == "float32" and multiplied:
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8) if zeros is None else zeros
        high = _plane(weight.codes >> 4, scales * 16, zeros >> 4, 4, block)
        return [high, _plane(weight.codes & 15, scales, zeros & 15, 4, block)]
    return [_plane(weight.codes, scales, zeros, bits, block)]


def _plane(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Plane:
    outputs, inputs = codes.shape
    blocks = scales.shape[1]
    padded = torch.nn.functional.pad(codes, (0, blocks * block - inputs))
    if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    return Plane(pack_bits(padded, bits).view(outputs, blocks, block * bits // 8), scales, zeros, bits, block, inputs)


def matmul(graph: GraphBuilder, x: str, name: str, weight: AffineWeight, activations: Activations,
           bias: str = "") -> str:  # fmt: skip
    """Return x W^T + bias as a sum of MatMulNBits, one a plane."""
    terms = []
    for index, plane in enumerate(planes(weight, activations)):
        data, scales = _stored(graph, name, index, plane)
        zeros = (
            "" if plane.zero_points is None else _packed_zero_points(graph, name, index, plane.zero_points, plane.bits)
        )
        inputs = [x, data, scales, zeros, "", bias if index == 0 else ""]
        while not inputs[-1]:
            inputs.pop()
        terms.append(graph.op("MatMulNBits", *inputs, name=name, domain=MICROSOFT, K=plane.inputs,
                              N=weight.shape[0], bits=plane.bits, block_size=plane.block,
                              accuracy_level=_ACCURACY[activations]))  # fmt: skip
    return terms[0] if len(terms) == 1 else graph.op("Add", *terms, name=name)


def gather(graph: GraphBuilder, ids: str, name: str, weight: AffineWeight, activations: Activations, *,
           tied: bool) -> str:  # fmt: skip
    """Return rows [B, T, D] of a quantized V x D table; `tied` shares the planes that `matmul` reads."""
    terms = []
    for index, plane in enumerate(planes(weight, activations, multiplied=tied)):
        data, scales = _stored(graph, name, index, plane)
        inputs = [data, ids, graph.op("Unsqueeze", scales, graph.ints(2), name=f"{name}.scales")]
        if plane.zero_points is not None:
            inputs.append(_column_zero_points(graph, name, index, plane.zero_points))
        terms.append(graph.op("GatherBlockQuantized", *inputs, name=name, domain=MICROSOFT, bits=plane.bits,
                              block_size=plane.block, gather_axis=0, quantize_axis=2))  # fmt: skip
    rows = terms[0] if len(terms) == 1 else graph.op("Add", *terms, name=name)
    rows = graph.op("Reshape", rows, graph.ints(0, 0, -1), name=name)
    inputs_padded = plane.scales.shape[1] * plane.block
    if inputs_padded == plane.inputs:
        return rows
    return graph.op("Slice", rows, graph.ints(0), graph.ints(plane.inputs), graph.ints(2), name=name)


def _stored(graph: GraphBuilder, name: str, index: int, plane: Plane) -> tuple[str, str]:
    suffix = f"_{index}" if index else ""
    data = graph.weight(f"{name}.weight_Q{plane.bits}{suffix}", lambda: plane.data)
    return data, graph.weight(f"{name}.scales{suffix}", lambda: plane.scales)


def _packed_zero_points(graph: GraphBuilder, name: str, index: int, zero_points: Tensor, bits: int) -> str:
    """Return zero points as MatMulNBits reads them: uint8 [O, ceil(blocks * bits / 8)], packed along a row."""
    blocks = zero_points.shape[1]
    padded = torch.nn.functional.pad(zero_points, (0, -blocks % (8 // bits)))
    packed = pack_bits(padded, bits).view(len(padded), -1)
    return _constant_or_stored(graph, f"{name}.zero_points_{index}", packed)


def _column_zero_points(graph: GraphBuilder, name: str, index: int, zero_points: Tensor) -> str:
    """Return zero points as GatherBlockQuantized reads them beside [V, blocks, bytes]: one a byte, [V, blocks, 1]."""
    return _constant_or_stored(graph, f"{name}.row_zero_points_{index}", zero_points[:, :, None])


def _constant_or_stored(graph: GraphBuilder, name: str, tensor: Tensor) -> str:
    """Return `tensor` as a weight, or as a ConstantOfShape (no bytes in the file) if all its values are zero."""
    if bool(tensor.any()):
        return graph.weight(name, lambda: tensor)
    return graph.zeros(name, tuple(tensor.shape))
