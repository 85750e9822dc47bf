"""What a runtime holds in memory of a model: weights by their use, cache, logits, itself. Torch-free.

    peak = max(weights while loading, weights + logits of the prompt x copies)
           + KV cache of the context x copies + fixed cost

Weights in memory are the sum over layers of loaded bytes x copies, where the copies depend on what a weight is for and
on where it lies (`MemoryCost.weight_copies`): a matrix that is repacked, a table that is also looked up in, floats
inside the graph's file (there twice while they are widened) or mapped from one of their own. `resident_weight_bytes`
is the one function that counts them. A runtime that computes in float32 alone (ONNX Runtime's CPU kernels) turns 16-bit
weights into float32 when it loads them: it then holds 4 bytes a weight (`READS_FLOAT32`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from dwindle.devices.workload import WeightUse, Workload

__all__ = [
    "MEMORY_COSTS",
    "READS_FLOAT32",
    "MemoryCost",
    "Range",
    "Resident",
    "as_loaded",
    "memory_cost",
    "peak_memory_bytes",
    "resident_weight_bytes",
]

Range = tuple[float, float, float]
"""Low end, middle, high end."""

READS_FLOAT32 = ("onnx",)
"""Runtimes that hold and read every float weight as float32, however it was stored."""


@dataclass(frozen=True)
class MemoryCost:
    """What a runtime holds beside the weights and the cache: at the low end, in the middle, at the high end."""

    packed: Mapping[WeightUse, Range]
    """Copies of integers and palettes: 1 when mapped from the file, 2 when read and then repacked."""
    floats: Mapping[WeightUse, Range]
    """Copies of floats, of their loaded bytes; also while loading those that are mapped from a file of their own."""
    floats_loading: Mapping[WeightUse, Range]
    """Copies of floats in the graph's file while they are loaded."""
    cache_copies: Range
    """Copies of the KV cache; the high end, 2, is for past and present in separate tensors."""
    logit_copies: Range
    """Copies of the prompt's float32 logits; 0 when only the last row is computed."""
    fixed_bytes: Range
    """Runtime, graph and arenas of small tensors."""

    def weight_copies(self, use: WeightUse, *, packed: bool, loading: bool = False) -> Range:
        """Return the copies of such weights while the model runs, or while it is loading from the graph's file."""
        return (self.packed if packed else self.floats_loading if loading else self.floats)[use]

    @classmethod
    def alike(cls, copies: Range, cache_copies: Range, logit_copies: Range, fixed_bytes: Range) -> MemoryCost:
        """Return the cost where nobody knows that weights differ."""
        uses: tuple[WeightUse, ...] = get_args(WeightUse)
        weights = dict.fromkeys(uses, copies)
        return cls(weights, weights, weights, cache_copies, logit_copies, fixed_bytes)


MEMORY_COSTS: Mapping[str, MemoryCost] = {
    "onnx": MemoryCost(
        packed={"linear": (1.0, 1.25, 2.0), "shared": (2.0, 2.76, 3.2), "embedding": (1.0, 1.1, 2.0),
                "head": (1.0, 2.2, 2.6)},
        floats={"linear": (1.0, 1.1, 1.6), "shared": (1.0, 1.93, 2.5), "embedding": (0.4, 0.5, 1.6),
                "head": (1.0, 1.43, 2.0)},
        floats_loading={"linear": (1.0, 1.58, 2.1), "shared": (1.5, 2.5, 3.0), "embedding": (0.4, 0.5, 1.6),
                        "head": (1.0, 1.49, 2.1)},
        cache_copies=(1.0, 1.0, 2.0), logit_copies=(0.0, 2.0, 4.0),
        fixed_bytes=(5e6, 14e6, 40e6),
    ),
}  # fmt: skip
"""Per runtime where it was measured: ONNX Runtime 1.31, fresh processes on x86-64, random Llamas of 6M to 500M
weights, float16 and int4 with an 8-bit table that is also the head (docs/experiments.md, "Measuring on targets").
Packed linears are held 1.25 times once repacked, the shared table 2.76 times: as it is looked up in, and repacked as
two planes. The floats of a graph's file are there as stored and as float32 while loading; the logits then take what is
freed. 12 to 16 MB for the smallest models; one more set of prompt logits for a head in two products. A graph in the
fused form keeps one cache. Of an embedding beside a head only the sum was measured (int8 3.3; float16 1.93, loading
1.99): the parts are what their use suggests."""

UNMEASURED_MEMORY_COST = MemoryCost.alike((1.0, 1.25, 2.0), (1.0, 1.0, 2.0), (0.0, 1.0, 2.0), (5e6, 15e6, 40e6))
"""For runtimes nobody could measure: weights mapped once, the cache kept in place. A guess with a wide range."""


def memory_cost(runtime: str) -> MemoryCost:
    """Return what a runtime holds, measured or guessed."""
    return MEMORY_COSTS.get(runtime, UNMEASURED_MEMORY_COST)


@dataclass(frozen=True)
class Resident:
    """Bytes that a runtime holds for the weights: at most while it loads them, and while it runs."""

    loading: Range
    running: Range


def resident_weight_bytes(workload: Workload, runtime: str) -> Resident:
    """Return the bytes that a runtime holds for the weights.

    A float16 matrix of 1,000 weights inside an ONNX graph: 4 bytes each once loaded, held 1.58 times meanwhile.

    >>> from dwindle.devices.workload import LayerLoad
    >>> matrix = Workload((LayerLoad("q_proj", 1000, 2000, format="float16"),), 0, 8, 10, 2000)
    >>> held = resident_weight_bytes(matrix, "onnx")
    >>> held.loading[1], held.running[1]
    (6320.0, 4400.0)
    """
    cost, loaded = memory_cost(runtime), as_loaded(workload, runtime).layers

    def held(loading: bool) -> Range:
        all_copies = [(x.bytes, cost.weight_copies(x.use, packed=x.packed, loading=loading)) for x in loaded]
        low, middle, high = (sum(count * copies[end] for count, copies in all_copies) for end in range(3))
        return low, middle, high

    return Resident(held(not workload.weights_apart), held(False))


def as_loaded(workload: Workload, runtime: str) -> Workload:
    """Return the workload as the runtime holds and reads its weights."""
    return workload.with_float32_weights() if runtime in READS_FLOAT32 else workload


def peak_memory_bytes(workload: Workload, runtime: str, prompt: int, context: int, products: int = 1) -> Range:
    """Return the peak after a prompt, with a cache for the context, where the head is computed as so many products."""
    cost, resident = memory_cost(runtime), resident_weight_bytes(workload, runtime)

    def end(column: int) -> float:
        logits = 4 * prompt * workload.vocabulary * (cost.logit_copies[column] + (products - 1 if column else 0))
        return (
            max(resident.loading[column], resident.running[column] + logits)
            + workload.kv_bytes_per_token * context * cost.cache_copies[2 if workload.copies_cache else column]
            + cost.fixed_bytes[column]
        )

    return end(0), end(1), end(2)
