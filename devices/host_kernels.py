"""How fast this machine is at what a decoder does, through ONNX Runtime's own kernels. Torch-free.

Four small graphs, made here, each run a few times (the median counts), on as many threads as asked for:

    read      one row times a float32 matrix of 134 MB: bytes a second that decode reads of float weights
    unpack    one row times twelve pairs of matrices as a model of width 1024 has them, 104 million 4-bit weights in
              blocks of 32 (MatMulNBits, float32 activations): operations a second of decode with packed weights
    prefill   256 rows times the first of such matrices: operations a second of a prompt
    overhead  one row through twelve layers of the exporter's operators, of width 64, attention apart, and what
              handing arrays to a session costs: seconds of a token that no weight explains

`time.process_time` serves in place of the clock where one thread is asked for: on a machine that others use, a product
of milliseconds fits between two interruptions and a token does not, but both take the same processor time.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

__all__ = ["HostKernels", "measure_kernels", "usual_seconds"]

_WIDTH, _FFN, _BLOCK = 1024, 2816, 32
_READ_INPUTS, _READ_OUTPUTS = 4096, 8192
_PREFILL_ROWS = 256
_LAYERS, _NARROW = 12, 64
_REPEATS = 5
_HANDING_OVER_SECONDS = 0.00025
"""Of a token: arrays made, buffers bound, the largest logit found; measured on one core of a server, all in Python."""
_FLOAT32, _INT8 = 1, 4
"""MatMulNBits' accuracy_level of float32 and int8 activations."""


@dataclass(frozen=True)
class HostKernels:
    """Rates of this machine: bytes or operations a second, and seconds."""

    read_bandwidth: float
    unpack_flops: float
    unpack_flops_int8: float
    """With activations rounded to int8."""
    prefill_flops: float
    overhead_seconds: float


def usual_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the median seconds of a few runs, after one that warms up."""
    work()
    found = []
    for _ in range(_REPEATS):
        start = clock()
        work()
        found.append(clock() - start)
    return statistics.median(found)


def measure_kernels(threads: int | None = None) -> HostKernels | None:
    """Return this machine's rates on so many threads (None: the runtime's choice); None without onnx or its runtime."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return None
    clock = time.process_time if threads == 1 else time.perf_counter

    def seconds(graph: bytes, rows: int, width: int, repeats: int = 1) -> float:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feed = {"x": np.full((1, rows, width), 0.5, np.float32)}
        return usual_seconds(lambda: [session.run(None, feed) for _ in range(repeats)], clock) / repeats

    pairs = 2 * _LAYERS * (_WIDTH * 2 * _FFN + _FFN * _WIDTH)
    unpack = {level: pairs / seconds(_packed_graph(level, _LAYERS), 1, _WIDTH) for level in (_FLOAT32, _INT8)}
    prompt = seconds(_packed_graph(_FLOAT32, 1), _PREFILL_ROWS, _WIDTH)
    return HostKernels(
        read_bandwidth=4 * _READ_INPUTS * _READ_OUTPUTS / seconds(_float_graph(), 1, _READ_INPUTS),
        unpack_flops=unpack[_FLOAT32],
        unpack_flops_int8=unpack[_INT8],
        prefill_flops=pairs / _LAYERS * _PREFILL_ROWS / prompt,
        overhead_seconds=seconds(_deep_graph(), 1, _NARROW, repeats=10) + _HANDING_OVER_SECONDS,
    )


def _weights(name: str, inputs: int, outputs: int) -> list[Any]:
    """Return codes and scales of 4-bit weights."""
    from onnx import TensorProto, helper

    blocks = inputs // _BLOCK
    codes, scales = b"\x5a" * (outputs * blocks * _BLOCK // 2), struct.pack("<f", 1e-3) * (outputs * blocks)
    return [
        helper.make_tensor(f"{name}.codes", TensorProto.UINT8, [outputs, blocks, _BLOCK // 2], codes, raw=True),
        helper.make_tensor(f"{name}.scales", TensorProto.FLOAT, [outputs * blocks], scales, raw=True),
    ]


def _product(name: str, ends: tuple[str, str], shape: tuple[int, int], level: int) -> Any:
    from onnx import helper

    return helper.make_node("MatMulNBits", [ends[0], f"{name}.codes", f"{name}.scales"], [ends[1]],
                            domain="com.microsoft", K=shape[0], N=shape[1], bits=4, block_size=_BLOCK,
                            accuracy_level=level)  # fmt: skip


def _packed_graph(level: int, pairs: int) -> bytes:
    """Return a graph of pairs of products with 4-bit weights, wide and back, one after the other."""
    from onnx import helper

    nodes, weights, x = [], [], "x"
    for pair in range(pairs):
        up, half, down = f"up{pair}", f"half{pair}", f"down{pair}"
        weights += [*_weights(up, _WIDTH, 2 * _FFN), *_weights(down, _FFN, _WIDTH)]
        nodes.append(_product(up, (x, up), (_WIDTH, 2 * _FFN), level))
        nodes.append(helper.make_node("Split", [up], [half, f"{half}.rest"], axis=-1, num_outputs=2))
        nodes.append(_product(down, (half, down), (_FFN, _WIDTH), level))
        x = down
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    return _serialized(nodes, (_WIDTH, _WIDTH), weights)


def _float_graph() -> bytes:
    """Return a graph of one product with float32 weights."""
    from onnx import TensorProto, helper

    raw = struct.pack("<f", 1e-3) * (_READ_INPUTS * _READ_OUTPUTS)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [_READ_INPUTS, _READ_OUTPUTS], raw, raw=True)
    return _serialized([helper.make_node("MatMul", ["x", "w"], ["y"])], (_READ_INPUTS, _READ_OUTPUTS), [weight])


def _deep_graph() -> bytes:
    """Return layers of a decoder's small operators around products too small to matter."""
    from onnx import TensorProto, helper

    ones = struct.pack("<f", 1.0) * _NARROW
    weights = [helper.make_tensor("gamma", TensorProto.FLOAT, [_NARROW], ones, raw=True)]
    nodes, x, rest = [], "x", "x"
    square, wide = (_NARROW, _NARROW), (_NARROW, 2 * _NARROW)
    for layer in range(_LAYERS):
        at = f"layer{layer}"
        for name, shape in (("a", square), ("b", square), ("c", wide), ("d", square)):
            weights += _weights(f"{at}.{name}", *shape)
        for half, (first, second) in enumerate((("a", "b"), ("c", "d"))):
            norm, left = f"{at}.norm{half}", f"{at}.rest{half}"
            nodes.append(helper.make_node("SkipSimplifiedLayerNormalization", [x, rest, "gamma"],
                                          [norm, "", "", left], domain="com.microsoft", epsilon=1e-6))  # fmt: skip
            nodes.append(_product(f"{at}.{first}", (norm, f"{at}.{first}"), wide if half else square, _FLOAT32))
            inner = f"{at}.{first}"
            if half:
                nodes += [
                    helper.make_node("Split", [inner], [f"{at}.gate", f"{at}.up"], axis=-1, num_outputs=2),
                    helper.make_node("QuickGelu", [f"{at}.gate"], [f"{at}.silu"], domain="com.microsoft", alpha=1.0),
                    helper.make_node("Mul", [f"{at}.silu", f"{at}.up"], [f"{at}.mixed"]),
                ]
                inner = f"{at}.mixed"
            nodes.append(_product(f"{at}.{second}", (inner, f"{at}.{second}"), square, _FLOAT32))
            x, rest = f"{at}.{second}", left
    nodes.append(helper.make_node("Add", [x, rest], ["y"]))
    return _serialized(nodes, (_NARROW, _NARROW), weights)


def _serialized(nodes: Sequence[Any], widths: tuple[int, int], weights: Sequence[Any]) -> bytes:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "rows", width])
            for name, width in zip(("x", "y"), widths, strict=True)]  # fmt: skip
    graph = helper.make_graph(list(nodes), "probe", ends[:1], ends[1:], list(weights))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
