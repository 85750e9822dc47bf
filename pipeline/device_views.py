"""What the cost model says of a run's artifacts on its targets, for charts: a token's time in parts, memory by context.

The numbers are `devices.estimate`'s, made anew when a report is written. `host` is never estimated here (its profile
is a measurement of minutes), and a profile that is not known on this machine is left out: both are said.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from dwindle.devices.cost_model import Estimate, estimate
from dwindle.devices.device_profile import HOST, DeviceProfile, load_profile
from dwindle.devices.workload import Workload
from dwindle.errors import DwindleError
from dwindle.pipeline.charts import Curve, Limit, Split
from dwindle.report import Artifact, Report

__all__ = ["DeviceViews", "device_views", "known_profile"]

_SHORTEST = 64
"""Tokens at which the memory curve begins."""


@dataclass(frozen=True)
class DeviceViews:
    """A split for each target and artifact it runs, a memory curve for each artifact, a limit for each target."""

    splits: tuple[Split, ...] = ()
    curves: tuple[Curve, ...] = ()
    limits: tuple[Limit, ...] = ()
    left_out: tuple[str, ...] = ()
    """Targets that nothing could be estimated for, with why."""


@functools.cache
def known_profile(name: str) -> DeviceProfile | None:
    """Return a profile that needs no measurement, or None."""
    if name == HOST:
        return None
    try:
        return load_profile(name)
    except DwindleError:
        return None


def device_views(report: Report) -> DeviceViews:
    """Return the views of a run's artifacts on its targets."""
    names = list(dict.fromkeys(target.profile for target in report.targets))
    profiles = [profile for name in names if (profile := known_profile(name))]
    left_out = [f"{name}: measured, not estimated" if name == HOST else f"{name}: the profile is not known here"
                for name in names if known_profile(name) is None]  # fmt: skip
    splits: list[Split] = []
    curves: dict[str, Curve] = {}
    for profile in profiles:
        for label, artifact, workload in _workloads(report):
            found = estimate(profile, workload)
            if found.runtime is None:
                continue
            splits.append(_split(f"{profile.title}, {label}", found))
            if artifact.path not in curves and workload.context_length:
                curves[artifact.path] = Curve(label, tuple(_memory(profile, workload)))
    limits = tuple(Limit(profile.title, profile.memory.default.at()) for profile in profiles)
    return DeviceViews(tuple(splits), tuple(curves.values()), limits if curves else (), tuple(left_out))


def _workloads(report: Report) -> Iterator[tuple[str, Artifact, Workload]]:
    for artifact in report.artifacts:
        try:
            workload = Workload.from_artifact(artifact)
        except DwindleError:
            continue
        yield artifact.format + (f" ({artifact.variant})" if artifact.variant else ""), artifact, workload


def _split(label: str, found: Estimate) -> Split:
    assert found.cache is not None
    assert found.overhead is not None
    total = sum(layer.seconds for layer in found.layers)
    reading = min(total, found.reading_seconds)
    return Split(label, reading, total - reading, found.cache.seconds, found.overhead.seconds)


def _memory(profile: DeviceProfile, workload: Workload) -> Iterator[tuple[int, float, float, float]]:
    tokens = min(_SHORTEST, workload.context_length)
    while tokens <= workload.context_length:
        held = estimate(profile, workload, context=tokens).metrics["peak_memory_bytes"]
        if held.value is not None and held.low is not None and held.high is not None:
            yield tokens, held.low, held.value, held.high
        following = tokens * 2
        tokens = workload.context_length if tokens < workload.context_length < following else following
