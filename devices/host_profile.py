"""The profile of this machine, measured when asked for in about a second. Torch-free; numpy inside.

Memory comes from the operating system. Bandwidth is the best of a few copies of a block larger than any cache, counted
as bytes read plus bytes written (STREAM "copy", J. D. McCalpin, 1995); the share of it that decode reaches is what a
float32 matrix-vector product reads in a second, the very thing that decode does. Prefill's compute is a matrix product
through numpy's BLAS, and the same with 4-bit weights where ONNX Runtime is installed; that product with one row is the
floor under decode, unpacking included (`MatMulNBits`, blocks of 32, float32 activations; with int8 activations at the
high end). All are what one process gets now, on a machine that may be busy: they are "measured", their range says how
well. The overhead per token and the disk are not measured here: `dwindle bench` and `dwindle validate` run the artifact
itself on this machine, and that number wins.
"""

from __future__ import annotations

import functools
import os
import platform
import struct
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any

from dwindle.devices.device_profile import ComputeUnit, DeviceProfile, Memory, Runtime
from dwindle.devices.quantity import Dimension, Quantity, Trust

__all__ = ["host_memory", "measure_profile"]

_ONNX_FORMATS = ("float32", "float16", "int2", "int4", "int8")
_COPY_BYTES = 128 * 2**20
_MATRIX_SIZE = 768
_PACKED_INPUTS, _BLOCK = 4096, 32
_PACKED_TASKS: Mapping[str, tuple[int, int]] = {"decode": (1, 8192), "prompt": (64, 1024)}
"""Rows and outputs of the products with 4-bit weights. Decode's weights, 17 MB of codes and 4 MB of scales, are more
than most caches hold, as a model's are; a prompt reads them once for all its rows."""
_REPEATS = 5
_ACCURACY_FLOAT32, _ACCURACY_INT8 = 1, 4
"""MatMulNBits' accuracy_level of float32 and int8 activations."""


def _number(
    value: float,
    unit: str,
    dimension: Dimension,
    source: str,
    trust: Trust = "measured",
    low: float | None = None,
    high: float | None = None,
) -> Quantity:
    return Quantity(value, unit, dimension, source, datetime.now(UTC).date().isoformat(), trust, low, high)


def host_memory() -> Memory:
    """Return what the operating system says of this machine's memory now."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, min(memory.available, memory.total) / 1e9
    return Memory(
        physical=_number(total, "GB", "memory", "The operating system"),
        default=_number(free, "GB", "memory", "Memory the operating system calls available now"),
        pessimistic=_number(free / 2, "GB", "memory", "Half of the memory available now", "derived"),
    )


@functools.cache
def measure_profile() -> DeviceProfile:
    """Return this machine's profile; measured once per process."""
    memory, system = host_memory(), platform.platform(terse=True)
    float_flops, packed = _matrix_flops(), _packed_flops()
    prompt = [float_flops, *(row["prompt"] for row in packed.values())]
    copied = _copy_bandwidth()
    share = min(1.0, _read_bandwidth() / copied)
    compute = _number(
        packed[_ACCURACY_FLOAT32]["prompt"] / 1e9 if packed else float_flops / 1e9,
        "GFLOP/s",
        "compute",
        "Product of 64 rows with 4-bit weights in ONNX Runtime; the range takes in float32 in numpy"
        if packed
        else f"float32 product of {_MATRIX_SIZE}x{_MATRIX_SIZE} in numpy; ONNX Runtime was not there to ask",
        "measured" if packed else "derived",
        0.8 * min(prompt) / 1e9,
        1.5 * max(prompt) / 1e9,
    )
    unit = ComputeUnit(
        effective_compute=compute,
        bandwidth_share=_number(
            share,
            "share",
            "share",
            "float32 matrix-vector product in numpy",
            "measured",
            0.6 * share,
            min(1, 1.4 * share),
        ),
        overhead=_number(1.0, "ms", "time", "0.1 to 3 ms per token over models and backends", "derived", 0.1, 3.0),
        sustained=_number(1.0, "share", "share", "Mains-powered machines hold their rate", "derived", 0.8, 1.0),
        decode_compute=_number(
            packed[_ACCURACY_FLOAT32]["decode"] / 1e9,
            "GFLOP/s",
            "compute",
            "One row with 4-bit weights in ONNX Runtime; high end: with int8 activations",
            "measured",
            0.7 * packed[_ACCURACY_FLOAT32]["decode"] / 1e9,
            1.3 * max(row["decode"] for row in packed.values()) / 1e9,
        )
        if packed
        else None,
    )
    return DeviceProfile(
        name="host",
        title=f"this machine ({platform.system()} {platform.machine()}, {os.cpu_count()} processors)",
        memory=memory,
        bandwidth=_number(copied / 1e9, "GB/s", "bandwidth", f"Copy of {_COPY_BYTES >> 20} MiB in numpy"),
        compute_units={"cpu": unit},
        runtimes={
            "onnx": Runtime("cpu", system, _ONNX_FORMATS, {system: _ONNX_FORMATS}),
        },
        storage=_number(
            1.0, "GB/s", "bandwidth", "A judgement; a file read before comes from memory", "unverified", 0.2, 8.0
        ),
    )


def _best_seconds(work: Callable[[], Any]) -> float:
    work()
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _copy_bandwidth() -> float:
    """Return bytes per second of a copy, read and written bytes both counted."""
    import numpy as np

    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    return 2 * _COPY_BYTES / _best_seconds(lambda: np.copyto(target, source))


def _read_bandwidth() -> float:
    """Return bytes per second that a matrix-vector product reads."""
    import numpy as np

    matrix, vector = np.ones((_COPY_BYTES // 4 // 4096, 4096), np.float32), np.ones(4096, np.float32)
    return float(matrix.nbytes / _best_seconds(lambda: matrix @ vector))


def _packed_flops() -> dict[int, dict[str, float]]:
    """Return accuracy_level -> operations per second with 4-bit weights, of one row and of a prompt; or nothing."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return {}
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    found: dict[int, dict[str, float]] = {}
    for level in (_ACCURACY_FLOAT32, _ACCURACY_INT8):
        found[level] = {}
        for name, (rows, outputs) in _PACKED_TASKS.items():
            model = _packed_model(level, outputs)
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            feed = {"x": np.ones((rows, _PACKED_INPUTS), np.float32)}
            seconds = _best_seconds(lambda session=session, feed=feed: session.run(None, feed))  # type: ignore[misc]
            found[level][name] = 2 * rows * outputs * _PACKED_INPUTS / seconds
    return found


def _packed_model(accuracy_level: int, outputs: int) -> bytes:
    """Return an ONNX model of one MatMulNBits."""
    from onnx import TensorProto, helper

    blocks = _PACKED_INPUTS // _BLOCK
    codes = b"\x5a" * (outputs * blocks * _BLOCK // 2)
    scales = struct.pack("<f", 1.0) * (outputs * blocks)
    weights = [
        helper.make_tensor("codes", TensorProto.UINT8, [outputs, blocks, _BLOCK // 2], codes, raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, [outputs * blocks], scales, raw=True),
    ]
    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=_PACKED_INPUTS,
                            N=outputs, bits=4, block_size=_BLOCK, accuracy_level=accuracy_level)  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", _PACKED_INPUTS), ("y", outputs))
    ]
    graph = helper.make_graph([node], "packed", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _matrix_flops() -> float:
    """Return operations per second of a float32 matrix product."""
    import numpy as np

    matrix = np.ones((_MATRIX_SIZE, _MATRIX_SIZE), dtype=np.float32)
    return float(2 * _MATRIX_SIZE**3 / _best_seconds(lambda: matrix @ matrix))
