"""Weights of an exported encoder in 8 or 4 bits: rounded once, stored as ONNX Runtime's block-quantized operators.

An encoder comes as a graph that another exporter wrote, so its weights are found in the graph:

    MatMul(x, W)               W a constant of two dimensions         -> MatMulNBits
    Gather(table, input_ids)   the word embedding                     -> GatherBlockQuantized

What multiplies one vector a text (a pooler, a classifier's head: `Gemm`) and what is small (positions, norms, biases)
stays float. Rounding looks at weights alone; what it costs is measured afterwards, on texts:

    8 bits   symmetric, one fp16 scale per 128 inputs: code = round(w / s) + 128, s = max|w| / 127
    4 bits   a scale and a zero point per 32 inputs, the range shrunk by the share (of SHRINKAGES) that leaves the
             smallest squared error in its group

Measured on MiniLM (22.7M parameters, 45 sentences, file, smallest and mean cosine of the embeddings with float's):

    float32                       90.4 MB
    8 bits, int8 activations      23.7 MB   0.9985  0.9990        dynamic int8 of ONNX Runtime   22.9 MB  0.9899  0.9932
    8 bits, float32 activations   24.0 MB   0.9996  0.9998
    4 bits                        13.9 MB   0.9666  0.9748        its 4-bit quantizer            14.7 MB  0.9633  0.9726
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from dwindle.bit_packing import pack_bits
from dwindle.errors import RecipeError, offenders
from dwindle.export.onnx_builder import MICROSOFT, OPSETS
from dwindle.export.onnx_quantized import Plane, planes
from dwindle.export.options import Activations
from dwindle.weights import AffineWeight

__all__ = ["GROUPS", "SHRINKAGES", "layer_rows", "quantize_graph", "rounded"]

Bits = Literal[4, 8]

GROUPS: dict[int, tuple[int, ...]] = {8: (128, 64, 32, 16), 4: (32, 16)}
"""Group sizes by bits, the preferred one first; the first that divides a weight's inputs is taken."""
SHRINKAGES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
"""Shares of a group's range that 4-bit rounding tries."""
_ACCURACY = {"float32": 1, "int8": 4}
"""MatMulNBits' accuracy_level by activation type."""
_ROWS = 4096
"""Rows that are rounded at a time."""


def quantize_graph(model: Any, bits: Bits, activations: Activations) -> dict[str, AffineWeight]:
    """Replace the weights of an ONNX `model` in place; return the codes by module name.

    Raises RecipeError naming every weight whose inputs no group size divides.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [(node, key) for node in model.graph.node if (key := _weight_of(node, constants)) is not None]
    names: dict[str, str] = {}
    for node, key in found:  # layers that share a constant share its codes
        names.setdefault(key, _module_name(node, key))
    inputs = {key: _inputs(node, constants[key]) for node, key in found}
    groups = {key: _group(count, bits) for key, count in inputs.items()}
    wrong = [f"{names[key]} ({inputs[key]:,})" for key, group in groups.items() if group is None]
    if wrong:
        raise RecipeError(f"export: {len(wrong)} weights have a number of inputs that none of the group sizes "
                          f"{GROUPS[bits]} divides: {offenders(wrong)}. Export this encoder in float.")  # fmt: skip
    codes: dict[str, AffineWeight] = {}
    nodes: dict[str, list[Any]] = {}
    for node, key in found:
        name, looked_up = names[key], node.op_type == "Gather"
        if name not in codes:
            values = numpy_helper.to_array(constants[key])
            matrix = torch.from_numpy(np.array(values if looked_up else values.T, order="C"))
            codes[name] = rounded(matrix, bits, groups[key] or 0)
        make = _gather_nodes if looked_up else _matmul_nodes
        nodes[node.output[0]] = make(model.graph, node, name, codes[name], activations)
    _replace(model, nodes, set(names))
    return codes


def rounded(weight: Tensor, bits: Bits, group: int) -> AffineWeight:
    """Return the codes of a float matrix O x I.

    >>> rounded(torch.tensor([[-127.0] * 15 + [1.0]]), 8, 16).codes[0, -2:].tolist()
    [1, 129]
    """
    if not bool(torch.isfinite(weight).all()):
        raise RecipeError("export: a weight holds NaN or infinity. Use an earlier checkpoint.")
    find = _symmetric if bits == 8 else _searched
    parts = [find(rows, bits, group) for rows in torch.split(weight.float(), _ROWS)]
    codes, scales, *zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return AffineWeight(codes.view(weight.shape), scales, zeros[0] if zeros else None, bits, group)


def layer_rows(model: Any, codes: dict[str, AffineWeight]) -> dict[str, dict[str, Any]]:
    """Return {module or constant: {parameters, bits, bytes, format}} of all float constants and all codes."""
    rows = {}
    for name, weight in codes.items():
        count = weight.codes.numel()
        rows[name] = {"parameters": count, "bits": weight.stored_bits / count,
                      "bytes": -(-weight.stored_bits // 8), "format": f"int{weight.bits}"}  # fmt: skip
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            count = int(np.prod(tensor.dims, dtype=np.int64))
            rows[tensor.name] = {"parameters": count, "bits": 32.0, "bytes": 4 * count, "format": "float32"}
    return rows


def _weight_of(node: Any, constants: dict[str, Any]) -> str | None:
    """Return the name of the constant that a node multiplies by or looks up, if it is one to be quantized."""
    if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2:
        return str(node.input[1])
    if node.op_type == "Gather" and node.input[0] in constants and node.input[1] == "input_ids":
        return str(node.input[0])
    return None


def _module_name(node: Any, key: str) -> str:
    """Return the module a node came from, as its path in the graph tells; else the constant's own name."""
    return node.name.strip("/").rpartition("/")[0].replace("/", ".") or key.removesuffix(".weight")


def _inputs(node: Any, constant: Any) -> int:
    return int(constant.dims[1 if node.op_type == "Gather" else 0])


def _group(inputs: int, bits: Bits) -> int | None:
    return next((group for group in GROUPS[bits] if inputs % group == 0), None)


def _symmetric(rows: Tensor, bits: int, group: int) -> tuple[Tensor, ...]:
    top = 2 ** (bits - 1) - 1
    x = rows.view(len(rows), -1, group)
    scales = _scale(x.abs().amax(-1) / top)
    codes = (x / scales.float()[..., None]).round().clamp(-top, top) + (top + 1)
    return codes.to(torch.uint8), scales


def _searched(rows: Tensor, bits: int, group: int) -> tuple[Tensor, ...]:
    top = 2**bits - 1
    x = rows.view(len(rows), -1, group)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    best: list[Tensor] = []
    for share in SHRINKAGES:
        scales = _scale((high - low) * share / top)
        step = scales.float()
        zeros = (-low * share / step).round().clamp(0, top)
        codes = ((x / step[..., None]).round() + zeros[..., None]).clamp(0, top)
        error = (((codes - zeros[..., None]) * step[..., None] - x) ** 2).sum(-1)
        found = [error, codes.to(torch.uint8), scales, zeros.to(torch.uint8)]
        if not best:
            best = found
            continue
        better = error < best[0]
        best = [torch.where(better[..., None] if new.dim() > 2 else better, new, old)
                for new, old in zip(found, best, strict=True)]  # fmt: skip
    return tuple(best[1:])


def _scale(values: Tensor) -> Tensor:
    """Return fp16 scales; 1 where a group is (nearly) all zeros."""
    scales = values.half()
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _matmul_nodes(graph: Any, node: Any, name: str, weight: AffineWeight, activations: Activations) -> list[Any]:
    """Return x W^T as one MatMulNBits a plane (`onnx_quantized.planes`), summed."""
    made, terms = [], []
    stored = planes(weight, activations)
    for index, plane in enumerate(stored):
        data, cast, *zeros = _constants(graph, node, name, index, plane)
        made.append(cast)
        inputs = [node.input[0], data, cast.output[0], *zeros]
        terms.append(node.output[0] if len(stored) == 1 else f"{node.output[0]}.term_{index}")
        made.append(helper.make_node(
            "MatMulNBits", inputs, [terms[-1]], name=f"{node.name}_{index}", domain=MICROSOFT, K=plane.inputs,
            N=weight.shape[0], bits=plane.bits, block_size=plane.block, accuracy_level=_ACCURACY[activations],
        ))  # fmt: skip
    if len(terms) > 1:
        made.append(helper.make_node("Sum", terms, [node.output[0]], name=f"{node.name}_sum"))
    return made


def _gather_nodes(graph: Any, node: Any, name: str, weight: AffineWeight, activations: Activations) -> list[Any]:
    """Return the rows of a table as one GatherBlockQuantized over [V, D] codes."""
    (plane,) = planes(weight, activations, multiplied=False)
    data, cast, *zeros = _constants(graph, node, name, 0, plane, rows=True)
    return [cast, helper.make_node(
        "GatherBlockQuantized", [data, node.input[1], cast.output[0], *zeros], [node.output[0]], name=node.name,
        domain=MICROSOFT, bits=plane.bits, block_size=plane.block, gather_axis=0, quantize_axis=1,
    )]  # fmt: skip


def _constants(graph: Any, node: Any, name: str, index: int, plane: Plane, *, rows: bool = False) -> list[Any]:
    """Store a plane's tensors in the graph, once; return [codes, Cast of the scales, zero points if there].

    Scales stay fp16 in the file; the Cast to the float32 that the operators want is folded when a session is made.
    """
    suffix = f"_{index}" if index else ""
    data, scales, zeros = (f"{name}.{part}{suffix}" for part in (f"weight_Q{plane.bits}", "scales", "zero_points"))
    tensors = {data: plane.data.reshape(len(plane.data), -1) if rows else plane.data, scales: plane.scales.half()}
    if plane.zero_points is not None:
        tensors[zeros] = _packed(plane.zero_points, plane.bits)
    stored = {tensor.name for tensor in graph.initializer}
    for key, tensor in tensors.items():
        if key not in stored:
            graph.initializer.append(numpy_helper.from_array(tensor.contiguous().numpy(), key))
    wide = f"{node.output[0]}.scales{suffix}"
    cast = helper.make_node("Cast", [scales], [wide], name=wide, to=onnx.TensorProto.FLOAT)
    return [data, cast, *([zeros] if zeros in tensors else [])]


def _packed(zeros: Tensor, bits: int) -> Tensor:
    """Return zero points [O, G] packed along a row, as both operators read them."""
    padded = torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % (8 // bits)))
    return pack_bits(padded, bits).view(len(padded), -1)


def _replace(model: Any, nodes: dict[str, list[Any]], used: set[str]) -> None:
    """Put `nodes` in the place of those with the same output, and drop the constants nobody reads any more."""
    graph = model.graph
    kept = [new for node in graph.node for new in nodes.get(node.output[0] if node.output else "", [node])]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name not in used or tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, OPSETS[MICROSOFT]))
