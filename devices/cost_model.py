"""Estimates: bytes and operations of a workload to tokens/s, seconds and memory on a device. Torch-free.

A roofline with one constant, per compute unit of the profile:

    weights  seconds per token = sum over layers of max(bytes / rate, 2 packed weights / decode compute)
    cache    seconds per token = max(KV bytes / rate, 4 T A / attention compute)
    decode   seconds per token = weights + cache + overhead + depth x layer overhead
    prefill  time to first token = max((2 N T + 2 T^2 A) / effective compute, weights) + overheads
    memory   of `memory_cost.py`
    load     package / storage + weights while loading / (share x bandwidth) + widened bytes x 7 ns + fixed cost

The rate is share x bandwidth, or `cache bandwidth` where the profile knows a cache that holds all that a token reads.
N is multiply-accumulates per token, T the prompt's length, A the attention width (layers x heads x width of a head;
causal scores and mixtures are 2 T^2 A operations). Why so simple: at batch 1 a decoder reads every weight for every
token and does two operations with it, so memory decides; published rates of phones, laptops and boards give shares of
0.4 to 0.9 of the peak that are steady within one kind of engine (`calibration.py` fits them and says how far off they
are). Two things stand beside the bandwidth. A CPU that unpacks integers or palettes may be slower at that than at
reading them: `decode compute` is a floor under every layer in such a format, where the profile has it, as `attention
compute` is under the cache. And the overheads matter for small models: below some 100 MB of weights they are most of
the time, and such an estimate is only as good as they are. Decode's rate is the one right after the prompt: the cache
holds the prompt's tokens, each read once, or three times by a graph that copies the past into the present
(`COPIED_CACHE_READS`); a program of static shapes reads the whole context's cache for every token. Eight bits with
float32 activations are two products of four in ONNX Runtime (`PRODUCTS`), each with an output of its own.

A runtime that computes in float32 alone reads 4 bytes of a 16-bit weight (`memory_cost.READS_FLOAT32`).

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

from dwindle.devices.device_profile import FLOAT_FORMATS, ComputeUnit, DeviceProfile
from dwindle.devices.memory_cost import Range, as_loaded, peak_memory_bytes, resident_weight_bytes
from dwindle.devices.quantity import Side
from dwindle.devices.workload import LayerLoad, Workload
from dwindle.errors import RecipeError, offenders
from dwindle.report import Basis, Metric, Skipped

__all__ = ["DEFAULT_PROMPT_TOKENS", "METRIC_UNITS", "PRODUCTS", "Estimate", "LayerTime", "estimate"]

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
_SLOWEST_LAST: tuple[Side, ...] = ("value", "high", "low")
"""The order of a `LayerTime`: seconds, low, high."""

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
    `reading_seconds` is what reading all weights takes alone, which unpacking may exceed.
    """

    metrics: Mapping[str, Metric]
    runtime: str | None
    unit: str | None
    skipped: tuple[Skipped, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    cache: LayerTime | None = None
    overhead: LayerTime | None = None
    reading_seconds: float = 0.0


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
    loaded = as_loaded(workload, chosen)
    machine = _Machine(profile, profile.compute_units[profile.runtimes[chosen].unit], products,
                       COPIED_CACHE_READS if workload.copies_cache else 1.0, loaded.streamed_bytes)  # fmt: skip
    prompt = min(prompt_tokens, room)
    cached = room if workload.static_shapes else prompt
    loading = machine.loading(workload, loaded, resident_weight_bytes(workload, chosen).loading)
    timed = (*machine.rates(loaded, prompt, cached), loading)
    held = peak_memory_bytes(workload, chosen, prompt, room, products.get(workload.head_format or "", 1))
    return Estimate(
        {m.name: m for m in (*timed, _metric("peak_memory_bytes", *held), _package(workload))},
        chosen,
        profile.runtimes[chosen].unit,
        layers=tuple(machine.layer_time(layer) for layer in loaded.layers),
        cache=machine.cache_time(loaded, cached),
        overhead=machine.overhead_time(loaded),
        reading_seconds=machine.stream_seconds(loaded.streamed_bytes, "value"),
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
    read_bytes: int
    """Bytes of weights that a token reads, which decide whether a cache holds them."""

    def memory_rate(self, side: Side) -> float:
        return self.unit.bandwidth_share.at(side) * self.profile.bandwidth.at(side)

    def stream_seconds(self, count: float, side: Side) -> float:
        """Return seconds of reading so much of what every token reads."""
        fast = self.unit.cache_bandwidth
        if self.unit.cache is None or fast is None or self.read_bytes > self.unit.cache.at(side):
            return count / self.memory_rate(side)
        return count / max(fast.at(side), self.memory_rate(side))

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
        """Return seconds of attending to so many tokens: reading the cache, or computing where that takes longer."""
        reading = self.stream_seconds(workload.kv_bytes_per_token * tokens * self.cache_reads, side)
        if self.unit.attention_compute is None:
            return reading
        return max(reading, 4 * tokens * workload.attention_width / self.unit.attention_compute.at(side))

    def overhead_seconds(self, workload: Workload, side: Side) -> float:
        """Return what a token costs beside weights and cache, of which a slow end is the large one."""
        layer, end = self.unit.layer_overhead, _OPPOSITE[side]
        return self.unit.overhead.at(end) + (0.0 if layer is None else workload.depth * layer.at(end))

    def decode_seconds(self, workload: Workload, tokens: int, side: Side) -> float:
        """Return seconds per token with so many tokens in the cache."""
        weights, cache = self.weights_seconds(workload, side), self.cache_seconds(workload, tokens, side)
        return weights + cache + self.overhead_seconds(workload, side)

    def first_token_seconds(self, workload: Workload, tokens: int, side: Side) -> float:
        operations = 2 * workload.multiply_accumulates * tokens + 2 * tokens**2 * workload.attention_width
        compute = operations / self.unit.effective_compute.at(side)
        return max(compute, self.weights_seconds(workload, side)) + self.overhead_seconds(workload, side)

    def layer_time(self, layer: LayerLoad) -> LayerTime:
        ends = (self.layer_seconds(layer, side) for side in _SLOWEST_LAST)
        return LayerTime(layer.name, layer.bytes, *ends)

    def cache_time(self, workload: Workload, tokens: int) -> LayerTime:
        ends = (self.cache_seconds(workload, tokens, side) for side in _SLOWEST_LAST)
        return LayerTime("KV cache", workload.kv_bytes_per_token * tokens, *ends)

    def overhead_time(self, workload: Workload) -> LayerTime:
        ends = (self.overhead_seconds(workload, side) for side in _SLOWEST_LAST)
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
            + resident[end] / self.memory_rate(side)
            + (loaded.weight_bytes - workload.weight_bytes) * WIDENING_SECONDS[end]
            + LOAD_SECONDS[end]
            for end, side in enumerate(sides)
        )
        return _metric("load_seconds", *ends)
