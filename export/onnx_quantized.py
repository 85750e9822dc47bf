"""Our integer codes in the layout of ONNX Runtime's block-quantized operators, bit for bit.

`MatMulNBits` and `GatherBlockQuantized` (domain com.microsoft) read

    W[o, i] = (code[o, i] - zero[o, i // block]) * scale[o, i // block]         zero = 2^(bits-1) unless given

with 2, 4 or 8 bits, block a power of two from 16 on, and codes packed little-end first, `[O, blocks, block * bits / 8]`
bytes. This is `AffineWeight`'s own arithmetic, so codes go in unchanged and nothing is rounded:

- a group that is a multiple of a block repeats its scale (per-channel weights take the block that costs least bytes);
- 1 and 3 bits are stored as 2 and 4 with their zero point written out;
- **2 bits with float32 activations get float zero points**: the same product of 2048 x 2048 takes 2.3 ms with them
  and 12 ms without, on one x86 core (uint8 zero points have a kernel for int8 activations only: 0.2 ms);
- balanced weights (zero = 2^(bits-1) - 1/2) have that zero point as a float in 2 bits. In wider codes a float zero
  point is slow or refused (4 bits 18 ms instead of 0.5, 8 bits an error), so the half step becomes a product of its
  own, W x = W_int x + 1/2 sum_blocks s (sum of x in the block), which reads the same scales;
- **8 bits with float32 activations are stored as two planes of 4 bits**, code = 16 high + low:
  (code - z) s = (high - z_high) 16 s + (low - z_low) s. The runtime has fast float32 kernels for 4 bits only: one
  2048 x 2048 product takes 0.31 ms in 4 bits, 12 ms in 8 (it unpacks the whole weight first) and 0.6 ms in two
  planes, on one x86 core. With int8 activations 8 bits have their own kernel and are stored as they are.

An embedding read by a tied head is stored once; both operators read the same bytes. Scales stay in the fp16 they have;
a Cast to the float32 that the operators want is folded when a session is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
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
    """Codes of 2, 4 or 8 bits in blocks along the inputs; a weight is the sum of its planes.

    A balanced weight is half a step (1/2 of the last plane's scales) above that sum.
    """

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
    terms, stored = [], planes(weight, activations)
    float_zeros = stored[0].bits == 2 and activations == "float32"
    for index, plane in enumerate(stored):
        data, scales = _stored(graph, name, index, plane)
        if float_zeros:
            zeros = _float_zero_points(graph, name, plane, 0.5 if weight.balanced else 0.0)
        else:
            zeros = _packed_zero_points(graph, name, index, plane)
        inputs = [x, data, scales, zeros, "", bias if index == 0 else ""]
        while not inputs[-1]:
            inputs.pop()
        terms.append(graph.op("MatMulNBits", *inputs, name=name, domain=MICROSOFT, K=plane.inputs,
                              N=weight.shape[0], bits=plane.bits, block_size=plane.block,
                              accuracy_level=_ACCURACY[activations]))  # fmt: skip
    if weight.balanced and not float_zeros:
        terms.append(_half_step_product(graph, x, name, stored[-1], scales))
    return _sum(graph, terms, name)


def gather(graph: GraphBuilder, ids: str, name: str, weight: AffineWeight, activations: Activations, *,
           tied: bool) -> str:  # fmt: skip
    """Return rows [B, T, D] of a quantized V x D table; `tied` shares the planes that `matmul` reads."""
    terms, stored = [], planes(weight, activations, multiplied=tied)
    for index, plane in enumerate(stored):
        data, scales = _stored(graph, name, index, plane)
        inputs = [data, ids, graph.op("Unsqueeze", scales, graph.ints(2), name=f"{name}.scales")]
        if plane.zero_points is not None:
            inputs.append(_column_zero_points(graph, name, index, plane.zero_points))
        terms.append(graph.op("GatherBlockQuantized", *inputs, name=name, domain=MICROSOFT, bits=plane.bits,
                              block_size=plane.block, gather_axis=0, quantize_axis=2))  # fmt: skip
    if weight.balanced:
        half = graph.op("Mul", graph.op("Gather", scales, ids, name=name), graph.scalar(0.5), name=name)
        terms.append(graph.op("Unsqueeze", half, graph.ints(3), name=name))
    rows = graph.op("Reshape", _sum(graph, terms, name), graph.ints(0, 0, -1), name=name)
    plane = stored[-1]
    if plane.scales.shape[1] * plane.block == plane.inputs:
        return rows
    return graph.op("Slice", rows, graph.ints(0), graph.ints(plane.inputs), graph.ints(2), name=name)


def _sum(graph: GraphBuilder, terms: list[str], name: str) -> str:
    total = terms[0]
    for term in terms[1:]:
        total = graph.op("Add", total, term, name=name)
    return total


def _half_step_product(graph: GraphBuilder, x: str, name: str, plane: Plane, scales: str) -> str:
    """Return 1/2 sum_blocks s (sum of x in the block), [B, T, O], from the scales that are stored anyway."""
    blocks, block = plane.scales.shape[1], plane.block
    if blocks * block != plane.inputs:  # a padded row: one scale for all of its blocks
        scales = graph.op("Slice", scales, graph.ints(0), graph.ints(1), graph.ints(1), name=name)
        blocks, block = 1, plane.inputs
    parts = graph.op("Reshape", x, graph.ints(0, 0, blocks, block), name=name)
    sums = graph.op("ReduceSum", parts, graph.ints(-1), name=name, keepdims=0)
    halves = graph.op("Mul", sums, graph.scalar(0.5), name=name)
    return graph.op("MatMul", halves, graph.op("Transpose", scales, name=name, perm=[1, 0]), name=name)


def _stored(graph: GraphBuilder, name: str, index: int, plane: Plane) -> tuple[str, str]:
    suffix = f"_{index}" if index else ""
    data = graph.weight(f"{name}.weight_Q{plane.bits}{suffix}", lambda: plane.data)
    return data, graph.float_weight(f"{name}.scales{suffix}", lambda: plane.scales, torch.float16)


def _packed_zero_points(graph: GraphBuilder, name: str, index: int, plane: Plane) -> str:
    """Return zero points as MatMulNBits reads integers: uint8 [O, ceil(blocks * bits / 8)], packed along a row."""
    if plane.zero_points is None:
        return ""
    blocks = plane.zero_points.shape[1]
    padded = torch.nn.functional.pad(plane.zero_points, (0, -blocks % (8 // plane.bits)))
    packed = pack_bits(padded, plane.bits).view(len(padded), -1)
    return _constant_or_stored(graph, f"{name}.zero_points_{index}", packed)


def _float_zero_points(graph: GraphBuilder, name: str, plane: Plane, half_step: float) -> str:
    """Return zero points as MatMulNBits reads floats: float32 [O, blocks]; stored, if they differ, as a byte each."""
    if plane.zero_points is None:
        return graph.filled(f"{name}.zero_points", tuple(plane.scales.shape), 2.0 ** (plane.bits - 1) - half_step)
    zeros = graph.op("Cast", _constant_or_stored(graph, f"{name}.zero_points", plane.zero_points), name=name,
                     to=onnx.TensorProto.FLOAT)  # fmt: skip
    return graph.op("Sub", zeros, graph.scalar(half_step), name=name) if half_step else zeros


def _column_zero_points(graph: GraphBuilder, name: str, index: int, zero_points: Tensor) -> str:
    """Return zero points as GatherBlockQuantized reads them beside [V, blocks, bytes]: one a byte, [V, blocks, 1]."""
    return _constant_or_stored(graph, f"{name}.row_zero_points_{index}", zero_points[:, :, None])


def _constant_or_stored(graph: GraphBuilder, name: str, tensor: Tensor) -> str:
    """Return `tensor` as a weight, or as a ConstantOfShape (no bytes in the file) if all its values are equal."""
    first = int(tensor.reshape(-1)[0])
    if bool((tensor != first).any()):
        return graph.weight(name, lambda: tensor)
    return graph.filled(name, tuple(tensor.shape), first)
