"""The profile of this machine, measured when asked for. Torch-free; numpy inside.

Memory comes from the operating system. Bandwidth is that of a copy of a block larger than most caches, counted as bytes
read plus bytes written (STREAM "copy", J. D. McCalpin, 1995). Where ONNX Runtime is installed, everything else is what
its own kernels reach (`host_kernels.py`): the share of the bandwidth that decode reads float weights with, and what a
cache adds to that; the floors that unpacking 4-bit weights and attention put under it; the rate of a prompt; the
overhead of a token and of a layer. Without it numpy's products stand in. All are what one process gets now, on a
machine that may be busy: they are "measured", their range says how well. The disk is not measured. `dwindle bench` and
`dwindle validate` run the artifact itself, and that number wins.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from datetime import UTC, datetime

from dwindle.devices.device_profile import ComputeUnit, DeviceProfile, Memory, Runtime
from dwindle.devices.host_kernels import HostKernels, measure_kernels, usual_seconds
from dwindle.devices.quantity import Dimension, Quantity, Trust

__all__ = ["host_memory", "measure_profile"]

_ONNX_FORMATS = ("float32", "float16", "int2", "int4", "int8")
_COPY_BYTES = 128 * 2**20
_MATRIX_SIZE = 768


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


_SUSTAINED = _number(1.0, "share", "share", "Mains-powered machines hold their rate", "derived", 0.8, 1.0)


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
def measure_profile(threads: int | None = None) -> DeviceProfile:
    """Return this machine's profile on so many threads (None: the runtime's choice); measured once per process."""
    memory, system = host_memory(), platform.platform(terse=True)
    kernels = measure_kernels(threads)
    read = kernels.read_bandwidth if kernels else _read_bandwidth()
    copied = max(_copy_bandwidth(), read)
    return DeviceProfile(
        name="host",
        title=f"this machine ({platform.system()} {platform.machine()}, {os.cpu_count()} processors)",
        memory=memory,
        bandwidth=_number(copied / 1e9, "GB/s", "bandwidth", f"Copy of {_COPY_BYTES >> 20} MiB in numpy"),
        compute_units={"cpu": _by_runtime(kernels, read / copied) if kernels else _by_numpy(read / copied)},
        runtimes={
            "onnx": Runtime("cpu", system, _ONNX_FORMATS, {system: _ONNX_FORMATS}),
        },
        storage=_number(
            1.0, "GB/s", "bandwidth", "A judgement; a file read before comes from memory", "unverified", 0.2, 8.0
        ),
    )


def _by_runtime(kernels: HostKernels, share: float) -> ComputeUnit:
    """Return what ONNX Runtime's kernels reach."""
    prompts, unpack = sorted((kernels.prefill_flops, _matrix_flops())), kernels.unpack_flops
    cached, more = kernels.cached(), {}
    if cached is not None:
        rate, (fitting, over) = cached
        more = {
            "cache_bandwidth": _around(rate / 1e9, "GB/s", "bandwidth", "float32 matrices in a cache times one row"),
            "cache": _number(math.sqrt(fitting * over) / 1e6, "MB", "memory", "Between matrices that are read from a "
                             "cache and larger ones that are not", "measured", fitting / 1e6, over / 1e6),
        }  # fmt: skip
    return ComputeUnit(
        effective_compute=_number(
            kernels.prefill_flops / 1e9, "GFLOP/s", "compute",
            "Products of many rows with 4-bit weights in ONNX Runtime", "measured",
            0.6e-9 * prompts[0], 1.5e-9 * prompts[1],
        ),
        bandwidth_share=_share(share, "ONNX Runtime"),
        overhead=_around(1e3 * kernels.token_seconds, "ms", "time", "Narrow decoders, what is left without layers",
                         0.5, 4),
        sustained=_SUSTAINED,
        decode_compute=_number(
            unpack / 1e9, "GFLOP/s", "compute",
            "One row with 4-bit weights in ONNX Runtime; high end: with int8 activations", "measured",
            0.7 * unpack / 1e9, 1.3 * max(unpack, kernels.unpack_flops_int8) / 1e9,
        ),
        attention_compute=_around(kernels.attention_flops / 1e9, "GFLOP/s", "compute",
                                  "A narrow decoder after a short and after a long text", 0.5, 2),
        layer_overhead=_around(1e3 * kernels.layer_seconds, "ms", "time", "Decoders of few and of many narrow layers",
                               0.5, 4),
        **more,
    )  # fmt: skip


def _by_numpy(share: float) -> ComputeUnit:
    """Return what numpy's products reach, where there is no ONNX Runtime to ask."""
    flops = _matrix_flops()
    return ComputeUnit(
        effective_compute=_number(flops / 1e9, "GFLOP/s", "compute", "float32 products in numpy; ONNX Runtime was not "
                                  "there to ask", "derived", 0.6e-9 * flops, 1.5e-9 * flops),
        bandwidth_share=_share(share, "numpy; ONNX Runtime was not there to ask"),
        overhead=_number(1.0, "ms", "time", "0.1 to 3 ms per token over models and backends", "derived", 0.1, 3.0),
        sustained=_SUSTAINED,
    )  # fmt: skip


def _around(
    value: float, unit: str, dimension: Dimension, source: str, low: float = 0.7, high: float = 1.3
) -> Quantity:
    return _number(value, unit, dimension, source, "measured", low * value, high * value)


def _share(share: float, who: str) -> Quantity:
    return _number(share, "share", "share", f"float32 matrix times one row in {who}", "measured",
                   0.6 * share, min(1, 1.4 * share))  # fmt: skip


def _copy_bandwidth() -> float:
    """Return bytes per second of a copy, read and written bytes both counted."""
    import numpy as np

    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    return 2 * _COPY_BYTES / usual_seconds(lambda: np.copyto(target, source))


def _read_bandwidth() -> float:
    """Return bytes per second that a matrix-vector product reads."""
    import numpy as np

    matrix, vector = np.ones((_COPY_BYTES // 4 // 4096, 4096), np.float32), np.ones(4096, np.float32)
    return float(matrix.nbytes / usual_seconds(lambda: matrix @ vector))


def _matrix_flops() -> float:
    """Return operations per second of a float32 matrix product."""
    import numpy as np

    matrix = np.ones((_MATRIX_SIZE, _MATRIX_SIZE), dtype=np.float32)
    return float(2 * _MATRIX_SIZE**3 / usual_seconds(lambda: matrix @ matrix))
