"""Estimates: bytes and operations of a workload to tokens/s, seconds and memory on a device. Torch-free.

A roofline with one constant, per compute unit of the profile:

    weights  seconds per token = sum over layers of max(bytes / (share x bandwidth), 2 packed weights / decode compute)
    decode   seconds per token = weights + KV bytes / (share x bandwidth) + overhead
    prefill  time to first token = max((2 N T + 2 T^2 A) / effective compute, weights) + overhead
    memory   max(weights while loading, weights + logits of the prompt) + KV cache of the context x copies + fixed cost
    load     package / storage + weights while loading / (share x bandwidth) + widened bytes x 7 ns + fixed cost

N is multiply-accumulates per token, T the prompt's length, A the attention width (layers x heads x width of a head;
causal scores and mixtures are 2 T^2 A operations). Why so simple: at batch 1 a decoder reads every weight for every
token and does two operations with it, so memory decides; published rates of phones, laptops and boards give shares of
0.4 to 0.9 of the peak that are steady within one kind of engine (`calibration.py` fits them and says how far off they
are). Two things stand beside the bandwidth. A CPU that unpacks integers or palettes may be slower at that than at
reading them: `decode compute` is a floor under every layer in such a format, where the profile has it. And the overhead
matters for small models: below some 100 MB of weights it is most of the time, and such an estimate is only as good as
the overhead. Decode's rate is the one right after the prompt: the cache holds the prompt's tokens, each read once, or
three times by a graph that copies the past into the present (`COPIED_CACHE_READS`); a program of static shapes reads
the whole context's cache for every token. Eight bits with float32 activations are two products of four in ONNX Runtime
(`PRODUCTS`), each with an output of its own.

A runtime that computes in float32 alone (ONNX Runtime's CPU kernels) turns 16-bit weights into float32 when it loads
them: it then reads 4 bytes a weight (`READS_FLOAT32`).

Weights in memory are the sum over layers of loaded bytes x copies, where the copies depend on what a weight is for and
on where it lies (`MemoryCost.weight_copies`): a matrix that is repacked, a table that is also looked up in, floats
inside the graph's file (there twice while they are widened) or mapped from one of their own. `resident_weight_bytes`
is the one function that counts them.

Apple's 2024 on-device model on an iPhone 15 Pro, published as 30 tokens/s and 0.6 ms per prompt token
(arXiv:2407.21075); 1.343 GB = 3.7 bits x 2.58B + 8 bits x 0.15B:

>>> from dwindle.devices.device_profile import load_profile
>>> from dwindle.devices.workload import LayerLoad, Workload
>>> layers = (LayerLoad("decoder", 2_580_000_000, 1_193_000_000), LayerLoad("embedding", 150_000_000, 150_000_000))
>>> afm = Workload(layers, kv_bytes_per_token=0, context_length=4096, vocabulary=49_152,
...                package_bytes=1_343_000_000)
>>> metrics = estimate(load_profile("iphone-15-pro"), afm, prompt_tokens=1000).metrics
>>> f"{metrics['tokens_per_second'].value:.1f} tokens/s, {metrics['time_to_first_token_seconds'].value:.3f} s"
'30.0 tokens/s, 0.602 s'

Every estimate has a range: its low end takes every number of the profile at its unfavourable end, its high end at the
favourable one (`Quantity.at`). It is an envelope, not a confidence interval. A weight format that the runtime does not
accept there is never estimated: the metrics are None and a `Skipped` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from dwindle.devices.device_profile import FLOAT_FORMATS, ComputeUnit, DeviceProfile
from dwindle.devices.quantity import Side
from dwindle.devices.workload import LayerLoad, WeightUse, Workload
from dwindle.errors import RecipeError, offenders
from dwindle.report import Basis, Metric, Skipped

__all__ = [
    "DEFAULT_PROMPT_TOKENS",
    "MEMORY_COSTS",
    "METRIC_UNITS",
    "PRODUCTS",
    "Estimate",
    "LayerTime",
    "MemoryCost",
    "estimate",
    "memory_cost",
    "resident_weight_bytes",
]

DEFAULT_PROMPT_TOKENS = 512
"""Prompt length behind tokens/s and time to first token where nobody states another."""

METRIC_UNITS: Mapping[str, str] = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_sustained": "tokens/s",
    "time_to_first_token_seconds": "seconds",
    "load_seconds": "seconds",
    "peak_memory_bytes": "bytes",
    "package_bytes": "bytes",
}
"""Every metric a target can have, with its unit."""

_OPPOSITE: Mapping[Side, Side] = {"low": "high", "value": "value", "high": "low"}
Range = tuple[float, float, float]
"""Low end, middle, high end."""
_SLOWEST_LAST: tuple[Side, ...] = ("value", "high", "low")
"""The order of a `LayerTime`: seconds, low, high."""


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


READS_FLOAT32 = ("onnx",)
"""Runtimes that hold and read every float weight as float32, however it was stored."""

COPIED_CACHE_READS = 3.0
"""How often a token moves a byte of a cache that is copied: past read, present written, present read."""

PRODUCTS: Mapping[str, Mapping[str, int]] = {"onnx": {"int8": 2}}
"""Runtime -> weight format -> products that one with float32 activations takes, where not one (`onnx_quantized`)."""

LOAD_SECONDS: tuple[float, float, float] = (0.02, 0.1, 0.5)
"""What loading costs whatever the size: start of the runtime, its graph, its buffers. A judgement with a wide range."""


WIDENING_SECONDS: tuple[float, float, float] = (2e-9, 7e-9, 20e-9)
"""What turning 16-bit weights into float32 at load costs per byte they grow by. ONNX Runtime 1.31 on one core of a
server took 2.5 s for 168 million weights; other machines are a judgement."""


@dataclass(frozen=True)
class LayerTime:
    """What one layer adds to a decoded token: seconds, and the range they may lie in."""

    name: str
    bytes: int
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """The metrics of one workload on one device by name, the runtime and unit they hold for, and what was skipped.

    `layers` splits a decoded token: the weights layer by layer, then the cache and the overhead, which sum to it.
    """

    metrics: Mapping[str, Metric]
    runtime: str | None
    unit: str | None
    skipped: tuple[Skipped, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    cache: LayerTime | None = None
    overhead: LayerTime | None = None


def estimate(
    profile: DeviceProfile,
    workload: Workload,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    context: int | None = None,
    runtime: str | None = None,
) -> Estimate:
    """Return what `workload` would do on `profile` after a prompt of so many tokens.

    `context` (tokens the KV cache is sized for) is the workload's own unless given, and the prompt is cut to it.
    `runtime` is the artifact's format; for a plan without one, the profile's first runtime. Raises RecipeError for
    lengths that cannot be meant.
    """
    room = context or workload.context_length or prompt_tokens
    if prompt_tokens < 1 or room < 1:
        raise RecipeError(f"prompt_tokens={prompt_tokens}, context={context}: both must be at least 1.")
    if workload.context_length and room > workload.context_length:
        raise RecipeError(f"context={room} is more than the {workload.context_length} tokens the model takes.")
    chosen = runtime or workload.format or next(iter(profile.runtimes))
    refusal = _refusal(profile, workload, chosen)
    if refusal is not None:
        metrics = {name: Metric(name, None, unit, "estimated") for name, unit in METRIC_UNITS.items()}
        metrics["package_bytes"] = _package(workload)
        return Estimate(metrics, None, None, (Skipped(f"estimate for {profile.name}", refusal),))
    products = {} if workload.int8_activations else PRODUCTS.get(chosen, {})
    machine = _Machine(profile, profile.compute_units[profile.runtimes[chosen].unit], products,
                       COPIED_CACHE_READS if workload.copies_cache else 1.0)  # fmt: skip
    loaded = _loaded(workload, chosen)
    prompt, memory = min(prompt_tokens, room), memory_cost(chosen)
    cached = room if workload.static_shapes else prompt
    resident = resident_weight_bytes(workload, chosen)
    timed = (*machine.rates(loaded, prompt, cached), machine.loading(workload, loaded, resident.loading))
    more = products.get(workload.head_format or "", 1) - 1
    ends = (_memory_bytes(workload, resident, memory, (prompt, room, more), end) for end in range(3))
    held = _metric("peak_memory_bytes", *ends)
    return Estimate(
        {m.name: m for m in (*timed, held, _package(workload))},
        chosen,
        profile.runtimes[chosen].unit,
        layers=tuple(machine.layer_time(layer) for layer in loaded.layers),
        cache=machine.cache_time(loaded, cached),
        overhead=machine.overhead_time(),
    )


def _refusal(profile: DeviceProfile, workload: Workload, runtime: str) -> str | None:
    """Return why the device cannot run this, or None."""
    if runtime not in profile.runtimes:
        return f"{profile.title} runs {', '.join(profile.runtimes)}, not {runtime}"
    accepted = profile.runtimes[runtime].weight_formats
    convertible = FLOAT_FORMATS if any(f in accepted for f in FLOAT_FORMATS) else ()
    refused = {f: names for f, names in workload.weight_formats.items() if f not in (*accepted, *convertible)}
    if not refused:
        return None
    listed = "; ".join(f"{f}: {offenders(names, limit=3)}" for f, names in refused.items())
    return f"{runtime} on {profile.title} takes {', '.join(accepted)}; found {listed}"


def _metric(name: str, low: float, value: float, high: float) -> Metric:
    return Metric(name, value, METRIC_UNITS[name], "estimated", low=low, high=high)


def _package(workload: Workload) -> Metric:
    """Return the size on disk: counted for an artifact that exists, estimated for a plan."""
    basis: Basis = "estimated" if workload.format is None else "measured"
    return Metric("package_bytes", float(workload.package_bytes), METRIC_UNITS["package_bytes"], basis)


@dataclass(frozen=True)
class _Machine:
    """One compute unit of a device and how its runtime treats the cache. Side "low" is always the slow end."""

    profile: DeviceProfile
    unit: ComputeUnit
    products: Mapping[str, int]
    cache_reads: float

    def stream_seconds(self, count: float, side: Side) -> float:
        return count / (self.unit.bandwidth_share.at(side) * self.profile.bandwidth.at(side))

    def layer_seconds(self, layer: LayerLoad, side: Side) -> float:
        """Return seconds per token of one layer: reading it, or unpacking it where that takes longer."""
        reading = self.stream_seconds(layer.streamed_bytes, side)
        if self.unit.decode_compute is None:
            return reading
        unpacked = layer.packed_parameters * self.products.get(layer.format or "", 1)
        return max(reading, 2 * unpacked / self.unit.decode_compute.at(side))

    def weights_seconds(self, workload: Workload, side: Side) -> float:
        return sum(self.layer_seconds(layer, side) for layer in workload.layers)

    def cache_seconds(self, workload: Workload, tokens: int, side: Side) -> float:
        return self.stream_seconds(workload.kv_bytes_per_token * tokens * self.cache_reads, side)

    def decode_seconds(self, workload: Workload, tokens: int, side: Side) -> float:
        """Return seconds per token with so many tokens in the cache."""
        overhead = self.unit.overhead.at(_OPPOSITE[side])
        return self.weights_seconds(workload, side) + self.cache_seconds(workload, tokens, side) + overhead

    def first_token_seconds(self, workload: Workload, tokens: int, side: Side) -> float:
        operations = 2 * workload.multiply_accumulates * tokens + 2 * tokens**2 * workload.attention_width
        compute = operations / self.unit.effective_compute.at(side)
        return max(compute, self.weights_seconds(workload, side)) + self.unit.overhead.at(_OPPOSITE[side])

    def layer_time(self, layer: LayerLoad) -> LayerTime:
        ends = (self.layer_seconds(layer, side) for side in _SLOWEST_LAST)
        return LayerTime(layer.name, layer.bytes, *ends)

    def cache_time(self, workload: Workload, tokens: int) -> LayerTime:
        ends = (self.cache_seconds(workload, tokens, side) for side in _SLOWEST_LAST)
        return LayerTime("KV cache", workload.kv_bytes_per_token * tokens, *ends)

    def overhead_time(self) -> LayerTime:
        ends = (self.unit.overhead.at(_OPPOSITE[side]) for side in _SLOWEST_LAST)
        return LayerTime("overhead", 0, *ends)

    def rates(self, workload: Workload, prompt: int, cached: int) -> tuple[Metric, ...]:
        decode = {side: self.decode_seconds(workload, cached, side) for side in _OPPOSITE}
        first = {side: self.first_token_seconds(workload, prompt, side) for side in _OPPOSITE}
        sustained = {side: self.unit.sustained.at(side) / decode[side] for side in _OPPOSITE}
        return (
            _metric("tokens_per_second", 1 / decode["low"], 1 / decode["value"], 1 / decode["high"]),
            _metric("tokens_per_second_sustained", sustained["low"], sustained["value"], sustained["high"]),
            _metric("time_to_first_token_seconds", first["high"], first["value"], first["low"]),
        )

    def loading(self, workload: Workload, loaded: Workload, resident: Range) -> Metric:
        """Return the load time: the package from storage, what is widened, what the runtime then holds."""
        storage = self.profile.storage
        if storage is None:
            return Metric("load_seconds", None, METRIC_UNITS["load_seconds"], "estimated")
        sides: tuple[Side, ...] = ("high", "value", "low")
        ends = (
            workload.package_bytes / storage.at(side)
            + self.stream_seconds(resident[end], side)
            + (loaded.weight_bytes - workload.weight_bytes) * WIDENING_SECONDS[end]
            + LOAD_SECONDS[end]
            for end, side in enumerate(sides)
        )
        return _metric("load_seconds", *ends)


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

    >>> matrix = Workload((LayerLoad("q_proj", 1000, 2000, format="float16"),), 0, 8, 10, 2000)
    >>> held = resident_weight_bytes(matrix, "onnx")
    >>> held.loading[1], held.running[1]
    (6320.0, 4400.0)
    """
    cost, loaded = memory_cost(runtime), _loaded(workload, runtime).layers

    def held(loading: bool) -> Range:
        all_copies = [(x.bytes, cost.weight_copies(x.use, packed=x.packed, loading=loading)) for x in loaded]
        low, middle, high = (sum(count * copies[end] for count, copies in all_copies) for end in range(3))
        return low, middle, high

    return Resident(held(not workload.weights_apart), held(False))


def _loaded(workload: Workload, runtime: str) -> Workload:
    return workload.with_float32_weights() if runtime in READS_FLOAT32 else workload


def _memory_bytes(
    workload: Workload, resident: Resident, cost: MemoryCost, lengths: tuple[int, int, int], end: int
) -> float:
    """Return bytes at one end of the range.

    `lengths` are the prompt, the context, and the copies of the prompt's logits beyond the runtime's usual.
    """
    prompt, context, more = lengths
    copies = cost.cache_copies[2 if workload.copies_cache else end]
    logits = 4 * prompt * workload.vocabulary * (cost.logit_copies[end] + (more if end else 0))
    return (
        max(resident.loading[end], resident.running[end] + logits)
        + workload.kv_bytes_per_token * context * copies
        + cost.fixed_bytes[end]
    )
