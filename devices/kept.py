"""The measurements a run folder keeps, asked for one target and one artifact. Torch-free.

A measurement stands in for an estimate if it is whole, names the profile, was made of the very artifact (sha256) and
after a prompt of the length that is judged; the newest one counts. On `host` it must also come from this machine. One
that cannot stand in is told with the reason, never passed over.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwindle.devices.bench_options import BenchOptions
from dwindle.devices.board_runner import machine
from dwindle.devices.measurement import Measurement, read_measurements, write_measurement
from dwindle.devices.targets import measure
from dwindle.report import Artifact, Skipped

__all__ = ["Kept", "this_machine"]

HOST = "host"
_SAME_MACHINE = ("machine", "cpu", "processors", "memory_bytes")


@dataclass
class Kept:
    """A run folder's measurements; without a folder there are none and none are written."""

    folder: Path | None = None
    found: list[Measurement] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path | None) -> Kept:
        """Return what a run folder keeps. Raises DataError if one of its files is damaged."""
        return cls(folder, [] if folder is None else read_measurements(folder))

    def newest(self, profile: str, artifact: Artifact, prompt_tokens: int) -> Measurement | None:
        """Return the measurement that stands in for the estimate, or None."""
        fitting = (m for m in reversed(self.found) if _why_not(m, profile, artifact) is None and m.profile == profile)
        return next((m for m in fitting if m.protocol.prompt_tokens == prompt_tokens), None)

    def on_this_machine(self, artifact: Artifact, place: Path, options: BenchOptions) -> Measurement:
        """Return the kept measurement of this machine with these options, or make one and keep it."""
        context = int(artifact.details.get("context_length", 0)) or None
        wanted = options.protocol(context) if context else None
        for kept in reversed(self.found):
            if kept.protocol == wanted and kept.profile == HOST and _why_not(kept, HOST, artifact) is None:
                return kept
        made = measure(place, options=options)
        if self.folder is not None:
            write_measurement(made, self.folder)
            self.found.append(made)
        return made

    def passed_over(self, profile: str, artifact: Artifact, prompts: Collection[int]) -> list[Skipped]:
        """Return a line for each measurement of this profile and path that cannot stand in, with the reason.

        `prompts` are the lengths that are judged.
        """
        told = []
        for kept in self.found:
            if kept.profile == profile and kept.artifact == artifact.path:
                why = _why_not(kept, profile, artifact)
                if why is None and profile != HOST and kept.protocol.prompt_tokens not in prompts:
                    why = f"made after a prompt of {kept.protocol.prompt_tokens:,} tokens; judged are prompts of " \
                        f"{', '.join(f'{length:,}' for length in sorted(prompts))}"  # fmt: skip
                told += [] if why is None else [Skipped(f"measurement of {kept.artifact} on {kept.on}", why)]
        return told


def this_machine() -> dict[str, Any]:
    """Return what two measurements must agree in to be of one machine."""
    here = machine()
    return {key: here[key] for key in _SAME_MACHINE}


def _why_not(kept: Measurement, profile: str, artifact: Artifact) -> str | None:
    """Return why a measurement says nothing about an artifact on a profile, or None."""
    if not kept.complete:
        return f"only {len(kept.repeats)} of {kept.protocol.repeats} repeats: {kept.stopped}"
    if kept.sha256 != artifact.sha256:
        return "the artifact has changed since; measure it again"
    if profile == HOST and any(kept.machine.get(key) != value for key, value in this_machine().items()):
        return "made on another machine"
    return None
