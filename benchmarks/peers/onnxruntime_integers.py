"""ONNX Runtime's MatMulNBits quantizers, blocks of 32 inputs with zero points: min-max (RTN), k-quant, HQQ.

They need no data and see one weight at a time, so the graph here is one MatMul per linear. Scales are float32 in the
files of a float32 model; they count 16 bits, which a float16 model's would have. HQQ keeps float zero points.
"""

from __future__ import annotations

import job
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)


def _graph(work: job.Job) -> onnx.ModelProto:
    nodes, initializers, inputs, outputs = [], [], [], []
    for name, linear in work.linears.items():
        weight = linear.weight.detach().numpy()
        inputs.append(helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, ["T", weight.shape[1]]))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["T", weight.shape[0]]))
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), f"{name}.w"))
        nodes.append(helper.make_node("MatMul", [f"{name}.x", f"{name}.w"], [f"{name}.y"], name=name))
    graph = helper.make_graph(nodes, "linears", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return one code per entry of the last axis, lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)


def _dequantized(node: onnx.NodeProto, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the weight [O, I] of a MatMulNBits node and the bits of one of its zero points."""
    read = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    outputs, inputs, bits = read["N"], read["K"], read["bits"]
    blocks = -(-inputs // read["block_size"])
    codes = _unpacked(tensors[node.input[1]].reshape(outputs, blocks, -1), bits).astype(np.float32)
    scales = tensors[node.input[2]].reshape(outputs, blocks, 1).astype(np.float32)
    zeros, zero_bits = np.float32(2 ** (bits - 1)), 0
    if len(node.input) > 3 and node.input[3]:
        stored = tensors[node.input[3]]
        if stored.dtype == np.uint8:
            zeros = _unpacked(stored.reshape(outputs, -1), bits)[:, :blocks, None].astype(np.float32)
            zero_bits = bits
        else:
            zeros, zero_bits = stored.reshape(outputs, blocks, 1).astype(np.float32), job.FLOAT_BITS
    return ((codes - zeros) * scales).reshape(outputs, -1)[:, :inputs], zero_bits


def _coded(work: job.Job, quantizer: MatMulNBitsQuantizer) -> dict[str, job.Coded]:
    quantizer.process()
    graph = quantizer.model.model.graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    linears, coded = work.linears, {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        name = node.output[0].removesuffix(".y")
        weight, zero_bits = _dequantized(node, tensors)
        stored = job.integer_bits(linears[name].weight, work.bits, job.BLOCK, zero_bits)
        coded[name] = job.Coded(torch.from_numpy(weight.copy()), stored)
    return coded


def rtn(work: job.Job) -> dict[str, job.Coded]:
    """Return round-to-nearest codes."""
    config = DefaultWeightOnlyQuantConfig(block_size=job.BLOCK, is_symmetric=False, bits=work.bits)
    return _coded(work, MatMulNBitsQuantizer(_graph(work), block_size=job.BLOCK, algo_config=config))


def k_quant(work: job.Job) -> dict[str, job.Coded]:
    """Return k-quant codes: 4 bits only, and it fails on rows of an odd number of blocks (babyllama-105: 11)."""
    config = KQuantWeightOnlyQuantConfig()
    return _coded(work, MatMulNBitsQuantizer(_graph(work), block_size=job.BLOCK, algo_config=config))


def hqq(work: job.Job) -> dict[str, job.Coded]:
    """Return half-quadratic codes."""
    config = HQQWeightOnlyQuantConfig(block_size=job.BLOCK, bits=work.bits)
    return _coded(work, MatMulNBitsQuantizer(_graph(work), block_size=job.BLOCK, algo_config=config))


if __name__ == "__main__":
    job.run("onnxruntime", ("onnxruntime", "onnx"), {"rtn": rtn, "k-quant": k_quant, "hqq": hqq})
