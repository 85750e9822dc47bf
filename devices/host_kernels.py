"""How fast this machine is at what a decoder does, through ONNX Runtime's own kernels. Torch-free.

A few small models, made here (`host_graphs.py`), on as many threads as asked for:

    read       one row times float32 matrices, 9 to 138 MB of them: bytes a second that decode reads of float weights,
               with weights that a cache holds and with such as it does not
    unpack     one row times 104 million 4-bit weights in blocks of 32 (MatMulNBits, float32 and int8 activations):
               operations a second of decode with packed weights
    prefill    256 rows times the first pair of such matrices: operations a second of a prompt
    a token    decoders of 2 and of 10 layers whose weights are too few to matter, run by `board_runner.OnnxDecoder` as
               artifacts are, after 16 and after 272 tokens: with t(layers, tokens) = c + layers (d + tokens a) the
               three times give what a token, a layer and a token in the cache cost

They take turns, in blocks of some 20 ms, and the median block counts: the speed of a machine that others use, too,
drifts within seconds, and what was measured one after the other would not belong together. Between sessions of several
threads there is a pause, in which the last one's threads stop spinning. `time.process_time` serves in place of the
clock where one thread is asked for: a product fits between two interruptions and a token does not, but both take the
same processor time.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwindle.devices.host_graphs import HEAD, HEADS, narrow_decoder, pairs, product_chain

__all__ = ["HostKernels", "Reading", "measure_kernels", "usual_seconds"]

_WIDTH, _FFN, _PAIRS = 1024, 2816, 12
_READ = ((512, 1408, 1), (512, 1408, 3), (1024, 2816, 2), (1024, 2816, 4))
"""Width, FFN and number of pairs of what is read: 9, 26, 69 and 138 MB."""
_PREFILL_ROWS = 256
_SHALLOW, _DEEP = 2, 10
_SHORT, _LONG = 16, 272
_ROUNDS = 7
_BLOCK_SECONDS = 0.02
_PAUSE_SECONDS = 0.05
"""Threads of ONNX Runtime spin for some 20 ms after a run."""
_FLOAT32, _INT8 = 1, 4
"""MatMulNBits' accuracy_level of float32 and int8 activations."""
_CACHES_HELP = 1.15
"""By how much the smallest weights must be read faster than the largest for a cache to be spoken of."""


@dataclass(frozen=True)
class Reading:
    """How fast float weights are read that are so large in all."""

    bytes: float
    bytes_per_second: float


@dataclass(frozen=True)
class HostKernels:
    """Rates of this machine: bytes or operations a second, and seconds."""

    reading: tuple[Reading, ...]
    """From the smallest weights to the largest."""
    unpack_flops: float
    unpack_flops_int8: float
    """With activations rounded to int8."""
    prefill_flops: float
    token_seconds: float
    """What a token costs whatever the model."""
    layer_seconds: float
    """What a layer adds to that beside its weights and the tokens in the cache."""
    attention_flops: float

    @property
    def read_bandwidth(self) -> float:
        """Return bytes a second of weights that no cache holds."""
        return self.reading[-1].bytes_per_second

    def cached(self) -> tuple[float, tuple[float, float]] | None:
        """Return bytes a second of weights that a cache holds, and between which sizes they stop to fit.

        None where small weights are not read faster.

        >>> found = (Reading(9e6, 20e9), Reading(26e6, 22e9), Reading(69e6, 18e9), Reading(138e6, 12e9))
        >>> HostKernels(found, 1, 1, 1, 1, 1, 1).cached()
        (20000000000.0, (69000000.0, 138000000.0))
        """
        slow = self.read_bandwidth
        limit = math.sqrt(slow * max(row.bytes_per_second for row in self.reading))
        fitting = [row for row in self.reading if row.bytes_per_second > limit]
        if not fitting or limit**2 < _CACHES_HELP * slow**2:
            return None
        over = next(row.bytes for row in self.reading if row.bytes > fitting[-1].bytes)
        return statistics.median(row.bytes_per_second for row in fitting), (fitting[-1].bytes, over)


def usual_seconds(work: Callable[[], Any]) -> float:
    """Return the median seconds of a few runs, after one that warms up."""
    return taking_turns({"": work}, time.perf_counter, block=0.0)[""]


def taking_turns(
    works: Mapping[str, Callable[[], Any]],
    clock: Callable[[], float],
    block: float | None = None,
    pause: float = 0.0,
) -> dict[str, float]:
    """Return the seconds of each: the median of rounds in which each works `block` seconds, after a warm-up."""
    counts, block = {}, _BLOCK_SECONDS if block is None else block
    for name, work in works.items():
        work()
        start = time.perf_counter()
        work()
        counts[name] = max(1, round(block / max(time.perf_counter() - start, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(_ROUNDS):
        for name, work in works.items():
            time.sleep(pause)
            for _ in range(counts[name] if pause else 1):  # threads that slept are at first on one core
                work()
            start = clock()
            for _ in range(counts[name]):
                work()
            found[name].append((clock() - start) / counts[name])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure_kernels(threads: int | None = None) -> HostKernels | None:
    """Return this machine's rates on so many threads (None: the runtime's choice); None without onnx or its runtime."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        return None
    reads = {f"read {shape}": pairs(*shape) for shape in _READ}
    works = {name: _product(product_chain(shapes), threads) for name, shapes in reads.items()}
    packed, first = pairs(_WIDTH, _FFN, _PAIRS), pairs(_WIDTH, _FFN, 1)
    works |= {
        "unpack": _product(product_chain(packed, _FLOAT32), threads),
        "unpack int8": _product(product_chain(packed, _INT8), threads),
        "prefill": _product(product_chain(first, _FLOAT32), threads, _PREFILL_ROWS),
        "shallow": _token(_SHALLOW, _SHORT, threads),
        "deep": _token(_DEEP, _SHORT, threads),
        "long": _token(_DEEP, _LONG, threads),
    }
    alone = threads == 1
    took = taking_turns(works, time.process_time if alone else time.perf_counter, pause=0 if alone else _PAUSE_SECONDS)
    each = max(1e-9, (took["long"] - took["deep"]) / (_DEEP * (_LONG - _SHORT)))
    layer = max(0.0, (took["deep"] - took["shallow"]) / (_DEEP - _SHALLOW) - _SHORT * each)
    token = max(0.0, took["shallow"] - _SHALLOW * (layer + _SHORT * each))
    unpacked = 2 * _weights(packed)
    return HostKernels(
        reading=tuple(Reading(4 * _weights(s), 4 * _weights(s) / took[name]) for name, s in reads.items()),
        unpack_flops=unpacked / took["unpack"],
        unpack_flops_int8=unpacked / took["unpack int8"],
        prefill_flops=2 * _weights(first) * _PREFILL_ROWS / took["prefill"],
        token_seconds=token,
        layer_seconds=layer,
        attention_flops=4 * HEADS * HEAD / each,
    )


def _weights(shapes: list[tuple[int, int]]) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes)


def _product(graph: bytes, threads: int | None, rows: int = 1) -> Callable[[], Any]:
    """Return what runs a chain of products once."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    with tempfile.TemporaryDirectory() as folder:  # from bytes, the session would keep them
        path = Path(folder) / "model.onnx"
        path.write_bytes(graph)
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": np.full((1, rows, session.get_inputs()[0].shape[2]), 0.5, np.float32)}
    return lambda: session.run(None, feed)


def _token(layers: int, length: int, threads: int | None) -> Callable[[], Any]:
    """Return what makes one token of a narrow decoder after a text of so many."""
    from dwindle.devices.board_runner import OnnxDecoder

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.onnx").write_bytes(narrow_decoder(layers))
        decoder = OnnxDecoder(Path(folder), threads, length + 1)
    decoder.step([1] * length)

    def one() -> None:
        decoder.length = length
        decoder.step([1])

    return one
