"""The profile of this machine, measured when asked for in about half a second. Torch-free; numpy inside.

Memory comes from the operating system. Bandwidth is the best of a few copies of a block larger than any cache, counted
as bytes read plus bytes written (STREAM "copy", J. D. McCalpin, 1995). Compute is a float32 matrix product through
numpy's BLAS. Both are what one process gets now, on a machine that may be busy: they are "measured", their spread says
how well. The share of the measured bandwidth that decode reaches (0.6) and the overhead per token are not measured
here: `dwindle bench` and `dwindle validate` run the artifact itself on this machine, and that number wins.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from dwindle.devices.device_profile import ComputeUnit, DeviceProfile, Memory, Runtime
from dwindle.devices.quantity import Dimension, Quantity, Trust

__all__ = ["measure_profile"]

_ONNX_FORMATS = ("float32", "float16", "int2", "int4", "int8")
_COPY_BYTES = 128 * 2**20
_MATRIX_SIZE = 768
_REPEATS = 5


@functools.cache
def measure_profile() -> DeviceProfile:
    """Return this machine's profile; measured once per process."""
    import psutil

    today = datetime.now(UTC).date().isoformat()

    def number(
        value: float,
        unit: str,
        dimension: Dimension,
        source: str,
        trust: Trust = "measured",
        low: float | None = None,
        high: float | None = None,
    ) -> Quantity:
        return Quantity(value, unit, dimension, source, today, trust, low, high)

    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, min(memory.available, memory.total) / 1e9
    compute = number(
        _matrix_flops() / 1e9, "GFLOP/s", "compute", f"float32 product of {_MATRIX_SIZE}x{_MATRIX_SIZE} in numpy"
    )
    unit = ComputeUnit(
        effective_compute=compute,
        bandwidth_share=number(
            0.6, "share", "share", "Published CPU rates: 0.28 to 0.6 of the peak", "derived", 0.28, 1.0
        ),
        overhead=number(2.0, "ms", "time", "1 to 3 ms per token over backends", "derived", 0.2, 3.0),
        sustained=number(1.0, "share", "share", "Mains-powered machines hold their rate", "derived", 0.8, 1.0),
    )
    return DeviceProfile(
        name="host",
        title=f"this machine ({platform.system()} {platform.machine()}, {os.cpu_count()} processors)",
        memory=Memory(
            physical=number(total, "GB", "memory", "The operating system"),
            default=number(free, "GB", "memory", "Memory the operating system calls available now"),
            pessimistic=number(free / 2, "GB", "memory", "Half of the memory available now", "derived"),
        ),
        bandwidth=number(_copy_bandwidth() / 1e9, "GB/s", "bandwidth", f"Copy of {_COPY_BYTES >> 20} MiB in numpy"),
        compute_units={"cpu": unit},
        runtimes={
            "onnx": Runtime("cpu", platform.platform(terse=True), ("float32", "float16", "int2", "int4", "int8"))
        },
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


def _matrix_flops() -> float:
    """Return operations per second of a float32 matrix product."""
    import numpy as np

    matrix = np.ones((_MATRIX_SIZE, _MATRIX_SIZE), dtype=np.float32)
    return float(2 * _MATRIX_SIZE**3 / _best_seconds(lambda: matrix @ matrix))
