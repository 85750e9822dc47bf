"""Estimates: bytes and operations of a workload to tokens/s, seconds and memory on a device. Torch-free.

A roofline with one constant, per compute unit of the profile:

    decode   seconds per token = (streamed weight bytes + KV bytes so far) / (share x bandwidth) + overhead
    prefill  time to first token = max(2 N T / effective compute, streamed bytes / (share x bandwidth)) + overhead
    memory   weights x copies + KV cache of the context x copies + logits of the prompt + fixed cost of the runtime

N is multiply-accumulates per token, T the prompt's length. Why so simple: at batch 1 a decoder reads every weight for
every token and does two operations with it, so memory decides; published rates of phones, laptops and boards give
shares of 0.4 to 0.85 of the peak that are steady within one kind of engine. The constant matters for small models:
below some 100 MB of weights the overhead of 1 to 3 ms a token is most of the time, and such an estimate is only as
good as the overhead. Attention's own operations (4 T^2 x width x layers) are left out: under 5 % of prefill while
T < width / 4.

A runtime that computes in float32 alone (ONNX Runtime's CPU kernels) turns 16-bit weights into float32 when it loads
them: it then reads 4 bytes a weight (`READS_FLOAT32`).

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
from dwindle.devices.quantity import Side
from dwindle.devices.workload import Workload
from dwindle.errors import RecipeError, offenders
from dwindle.report import Basis, Metric, Skipped

__all__ = ["DEFAULT_PROMPT_TOKENS", "MEMORY_COSTS", "METRIC_UNITS", "Estimate", "MemoryCost", "estimate"]

DEFAULT_PROMPT_TOKENS = 128
"""Prompt length behind tokens/s and time to first token where nobody states another."""

METRIC_UNITS: Mapping[str, str] = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_sustained": "tokens/s",
    "time_to_first_token_seconds": "seconds",
    "peak_memory_bytes": "bytes",
    "package_bytes": "bytes",
}
"""Every metric a target can have, with its unit."""

_OPPOSITE: Mapping[Side, Side] = {"low": "high", "value": "value", "high": "low"}


@dataclass(frozen=True)
class MemoryCost:
    """What a runtime holds beside the weights and the cache: at the low end, in the middle, at the high end."""

    weight_copies: tuple[float, float, float]
    """Copies of the weights: 1 when mapped from the file, 2 when read and then repacked."""
    cache_copies: tuple[float, float, float]
    """Copies of the KV cache: 2 when past and present are separate tensors."""
    logit_copies: tuple[float, float, float]
    """Copies of the prompt's float32 logits; 0 when only the last row is computed."""
    fixed_bytes: tuple[float, float, float]
    """Runtime, graph and arenas of small tensors."""


MEMORY_COSTS: Mapping[str, MemoryCost] = {
    "onnx": MemoryCost((1.0, 2.0, 2.3), (1.0, 2.0, 2.0), (0.0, 2.0, 4.0), (5e6, 12e6, 40e6)),
}
"""Per runtime where it was measured: ONNX Runtime 1.31, fresh processes, 0.3M to 48M parameters, float32 and int4.
Peak 2.05 times the weights while loading float32, 2.0 to 2.3 times after loading int4; 12 to 16 MB for the smallest
models; three sets of prompt logits at once for an int8 head in two halves."""

UNMEASURED_MEMORY_COST = MemoryCost((1.0, 1.25, 2.0), (1.0, 1.0, 2.0), (0.0, 1.0, 2.0), (5e6, 15e6, 40e6))
"""For runtimes nobody could measure: weights mapped once, the cache kept in place. A guess with a wide range."""


READS_FLOAT32 = ("onnx",)
"""Runtimes that hold and read every float weight as float32, however it was stored."""


@dataclass(frozen=True)
class Estimate:
    """The metrics of one workload on one device by name, the runtime and unit they hold for, and what was skipped."""

    metrics: Mapping[str, Metric]
    runtime: str | None
    unit: str | None
    skipped: tuple[Skipped, ...] = ()


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
    unit_name = profile.runtimes[chosen].unit
    loaded = workload.with_float32_weights() if chosen in READS_FLOAT32 else workload
    weights = (workload.weight_bytes + loaded.weight_bytes) / 2
    prompt, memory = min(prompt_tokens, room), MEMORY_COSTS.get(chosen, UNMEASURED_MEMORY_COST)
    timed = _timed(profile, profile.compute_units[unit_name], loaded, prompt)
    ends = (_memory_bytes(workload, weights, memory, prompt, room, end) for end in range(3))
    held = _metric("peak_memory_bytes", *ends)
    return Estimate({m.name: m for m in (*timed, held, _package(workload))}, chosen, unit_name)


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


def _timed(profile: DeviceProfile, unit: ComputeUnit, workload: Workload, prompt: int) -> tuple[Metric, ...]:
    decode = {side: _decode_seconds(profile, unit, workload, prompt, side) for side in _OPPOSITE}
    first = {side: _first_token_seconds(profile, unit, workload, prompt, side) for side in _OPPOSITE}
    sustained = {side: unit.sustained.at(side) / decode[side] for side in _OPPOSITE}
    return (
        _metric("tokens_per_second", 1 / decode["low"], 1 / decode["value"], 1 / decode["high"]),
        _metric("tokens_per_second_sustained", sustained["low"], sustained["value"], sustained["high"]),
        _metric("time_to_first_token_seconds", first["high"], first["value"], first["low"]),
    )


def _metric(name: str, low: float, value: float, high: float) -> Metric:
    return Metric(name, value, METRIC_UNITS[name], "estimated", low=low, high=high)


def _package(workload: Workload) -> Metric:
    """Return the size on disk: counted for an artifact that exists, estimated for a plan."""
    basis: Basis = "estimated" if workload.format is None else "measured"
    return Metric("package_bytes", float(workload.package_bytes), METRIC_UNITS["package_bytes"], basis)


def _stream_seconds(profile: DeviceProfile, unit: ComputeUnit, count: float, side: Side) -> float:
    return count / (unit.bandwidth_share.at(side) * profile.bandwidth.at(side))


def _decode_seconds(profile: DeviceProfile, unit: ComputeUnit, workload: Workload, tokens: int, side: Side) -> float:
    """Return seconds per token with so many tokens in the cache; side "low" is the slow end."""
    count = workload.streamed_bytes + workload.kv_bytes_per_token * tokens
    return _stream_seconds(profile, unit, count, side) + unit.overhead.at(_OPPOSITE[side])


def _first_token_seconds(
    profile: DeviceProfile, unit: ComputeUnit, workload: Workload, tokens: int, side: Side
) -> float:
    compute = 2 * workload.multiply_accumulates * tokens / unit.effective_compute.at(side)
    stream = _stream_seconds(profile, unit, workload.streamed_bytes, side)
    return max(compute, stream) + unit.overhead.at(_OPPOSITE[side])


def _memory_bytes(workload: Workload, weights: float, cost: MemoryCost, prompt: int, context: int, end: int) -> float:
    """Return bytes at one end of the range; `weights` is the mean of stored and loaded bytes, each held once or so."""
    return (
        weights * cost.weight_copies[end]
        + workload.kv_bytes_per_token * context * cost.cache_copies[end]
        + 4 * prompt * workload.vocabulary * cost.logit_copies[end]
        + cost.fixed_bytes[end]
    )
