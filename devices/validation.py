"""Verdicts: artifacts against device profiles and budgets, and the same as JUnit XML for a build server. Torch-free.

For each target the artifacts it can run are judged, each on its own; what it cannot run is a `Skipped` line. A target
that can run none of them still gets a verdict, with unknown metrics, so its budgets fail: unknown never passes. On
`host` the artifact is run and measured; on a profile it is estimated, and an estimate never meets `require: measured`.
Memory has a budget even when nobody set one: what the profile says one app may use. A budget at a prompt of its own
(`time_to_first_token_ms <= 300 @ 512`) is judged on a metric of its own, estimated or measured at that length.

A measurement that the run folder keeps (`dwindle bench --on ... --profile NAME`) replaces the estimates it measured; on
`host` it saves measuring anew. Budgets on quality are held to what the last step of the artifact's variant measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from dwindle.devices.bench_options import BenchOptions
from dwindle.devices.budgets import QUALITY_UNITS, TASK, Budget, parse_budgets, unit_of
from dwindle.devices.cost_model import METRIC_UNITS, estimate
from dwindle.devices.device_profile import DeviceProfile, Memory, load_profile
from dwindle.devices.host_profile import host_memory
from dwindle.devices.kept import Kept
from dwindle.devices.workload import Workload
from dwindle.errors import RecipeError
from dwindle.report import Artifact, Metric, Report, Skipped, StepRecord, TargetVerdict

__all__ = ["ValidateOptions", "junit", "rejudge", "run", "validate"]

_NAME_OF_HOST = "host"
_ON_CODES = ("quantize", "recover", "adapt")
"""Steps whose model an artifact of the float model (variant `float`) is not."""
_ON_HOST = ("onnx",)
"""Formats whose runtime is meant for a machine like this; Core AI's is an interpreter here."""


@dataclass(frozen=True)
class ValidateOptions:
    """Which targets an artifact is held to, and to what."""

    targets: tuple[str, ...] = ("iphone-15-pro", "pixel-9", "raspberry-pi-5", "host")
    """Device profiles by name or YAML file; `host` is measured, the others are estimated."""
    budgets: Mapping[str, Any] | tuple[str, ...] = field(default_factory=dict)
    """Limits for every target: {tokens_per_second: 30, memory: 1.5GB} or ['tokens_per_second >= 30']."""
    require: Literal["measured"] | None = None
    """`measured`: a budget is met by measured numbers alone."""
    memory: Literal["default", "entitled", "pessimistic"] = "default"
    """Which of the profile's limits on an app's memory holds."""
    prompt_tokens: int = BenchOptions.prompt_tokens
    """Prompt length behind tokens/s and time to first token."""
    context: int | None = None
    """Tokens the KV cache is sized for; the artifact's whole context unless given."""
    decode_tokens: int = BenchOptions.decode_tokens
    """Tokens generated per measurement on the host."""
    repeats: int = BenchOptions.repeats
    """Measurements on the host; the median counts."""
    threads: int | None = None
    """Threads of the runtime on the host."""

    def __post_init__(self) -> None:
        problems = []
        if not self.targets or any(not isinstance(t, str) or not t for t in self.targets):
            problems.append(f"targets={self.targets!r}: name at least one device profile")
        if self.require not in (None, "measured"):
            problems.append(f"require={self.require!r}: can only be 'measured'")
        if self.memory not in ("default", "entitled", "pessimistic"):
            problems.append(f"memory={self.memory!r}: one of default, entitled, pessimistic")
        if self.context is not None and self.context < 1:
            problems.append(f"context={self.context}: must be at least 1")
        for build in (self.parsed_budgets, self.bench):
            try:
                build()
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError("; ".join(problems))

    def parsed_budgets(self) -> tuple[Budget, ...]:
        """Return the budgets as objects."""
        return parse_budgets(self.budgets)

    def bench(self) -> BenchOptions:
        """Return how the host measures."""
        return BenchOptions(self.prompt_tokens, self.decode_tokens, repeats=self.repeats, threads=self.threads)


def run(
    options: ValidateOptions,
    artifacts: Sequence[tuple[Artifact, Path]],
    *,
    steps: Sequence[StepRecord] = (),
    folder: Path | None = None,
) -> tuple[tuple[TargetVerdict, ...], tuple[Skipped, ...]]:
    """Return a verdict for each target and each artifact it can run, and what was skipped.

    `artifacts` gives each artifact with the folder or package it lies in, `steps` what quality it has, `folder` the run
    folder whose measurements count (and where one of this machine is kept). Profiles are loaded first, so a wrong name
    is an error before anything is measured.
    """
    devices = [_Device.of(name) for name in options.targets]
    kept = Kept.of(folder)
    verdicts: list[TargetVerdict] = []
    skipped: list[Skipped] = []
    for device in devices:
        judge = _Judge(device, options, kept, tuple(steps))
        judged: list[TargetVerdict] = []
        for artifact, place in artifacts:
            verdict, missing = judge.verdict(artifact, place)
            skipped += missing
            judged += [verdict] if verdict else []
        verdicts += judged or [judge.held(None)]
    return tuple(verdicts), tuple(skipped)


def rejudge(report: Report, options: ValidateOptions, folder: Path) -> tuple[TargetVerdict, ...]:
    """Return a run's verdicts, those anew whose artifact a measurement in its folder stands for; nothing is measured.

    This machine's verdicts are measurements already and stay. Raises DataError for a damaged measurement.
    """
    kept, by_path = Kept.of(folder), {artifact.path: artifact for artifact in report.artifacts}
    verdicts = []
    for verdict in report.targets:
        artifact, anew = by_path.get(verdict.artifact or ""), None
        judged = artifact is not None and verdict.profile != _NAME_OF_HOST
        if judged and artifact and kept.newest(verdict.profile, artifact, _measured_prompt(artifact, options)):
            named = (t for t in options.targets if t == verdict.profile or Path(t).stem == verdict.profile)
            device = _Device.of(next(named, verdict.profile))
            anew, _ = _Judge(device, options, kept, tuple(report.steps)).verdict(artifact, folder / artifact.path)
        verdicts.append(anew or verdict)
    return tuple(verdicts)


@dataclass(frozen=True)
class _Device:
    """What a verdict needs of a target. Of this machine, which is measured, only its memory: no profile is made."""

    name: str
    title: str
    memory: Memory
    profile: DeviceProfile | None = None

    @classmethod
    def of(cls, name: str) -> _Device:
        if name == _NAME_OF_HOST:
            return cls(name, "this machine", host_memory())
        return cls.from_profile(load_profile(name))

    @classmethod
    def from_profile(cls, profile: DeviceProfile) -> _Device:
        return cls(profile.name, profile.title, profile.memory, profile)


@dataclass(frozen=True)
class _Judge:
    """One target, and what is known beside the artifacts."""

    device: _Device
    options: ValidateOptions
    kept: Kept
    steps: tuple[StepRecord, ...]

    @property
    def is_host(self) -> bool:
        return self.device.profile is None

    def held(self, found: Mapping[str, Metric] | None) -> TargetVerdict:
        options = self.options
        return _verdict(self.device, found, options.parsed_budgets(), options.require, options.memory)

    def verdict(self, artifact: Artifact, place: Path) -> tuple[TargetVerdict | None, list[Skipped]]:
        """Return the verdict on one artifact, or None if the target does not run it; and what was skipped."""
        name = self.device.name
        what = f"{artifact.format}{f' ({artifact.variant})' if artifact.variant else ''} on {name}"
        if self.is_host and artifact.format not in _ON_HOST:
            return None, [Skipped(what, f"this machine has no runtime for {artifact.format} that dwindle can time")]
        usual = _measured_prompt(artifact, self.options)
        lengths = {usual, *(b.at_tokens for b in self.options.parsed_budgets() if b.at_tokens is not None)}
        skipped = self.kept.passed_over(name, artifact, lengths)
        found, refusal = self._metrics(artifact, place, self.options.prompt_tokens, self.options.context, usual)
        if found is None:
            return None, [*skipped, *(Skipped(what, line.why) for line in refusal)]
        beside, missing = self._at_own_prompts(artifact, place)
        quality = _quality(artifact, self.steps)
        asked = {b.metric for b in self.options.parsed_budgets()}
        found = {**found, **beside, **{key: metric for key, metric in quality.items() if key in asked}}
        verdict = replace(self.held(found), variant=artifact.variant, artifact=artifact.path)
        return verdict, [*skipped, *missing]

    def _metrics(
        self, artifact: Artifact, place: Path, prompt: int, context: int | None, measured_prompt: int
    ) -> tuple[dict[str, Metric] | None, tuple[Skipped, ...]]:
        """Return measured or estimated metrics after a prompt of so many tokens, or None and the reason."""
        if self.device.profile is None:
            bench = replace(self.options.bench(), prompt_tokens=prompt)
            return self.kept.on_this_machine(artifact, place, bench).metrics(), ()
        measured = self.kept.newest(self.device.name, artifact, measured_prompt)
        workload = Workload.from_artifact(artifact)
        longest = workload.context_length or None
        room = min(context, longest) if context and longest else context
        estimated = estimate(self.device.profile, workload, prompt, room)
        if estimated.runtime is None and measured is None:
            return None, estimated.skipped
        return {**estimated.metrics, **(measured.metrics() if measured else {})}, ()

    def _at_own_prompts(self, artifact: Artifact, place: Path) -> tuple[dict[str, Metric], list[Skipped]]:
        """Return a metric for every budget that names a prompt's length, and what could not be had."""
        metrics: dict[str, Metric] = {}
        skipped = []
        asked = [budget for budget in self.options.parsed_budgets() if budget.at_tokens is not None]
        for tokens in dict.fromkeys(budget.at_tokens for budget in asked if budget.at_tokens is not None):
            names = [budget.metric for budget in asked if budget.at_tokens == tokens]
            context = int(artifact.details.get("context_length", 0))
            room = context // 2 if self.is_host else context
            if context and tokens > room:
                why = f"{artifact.path} takes {context:,} tokens"
                why += ", half of them as a prompt" if room < context else ""
                skipped.append(Skipped(f"{', '.join(names)} @ {tokens} on {self.device.name}", why))
                continue
            there, _ = self._metrics(artifact, place, tokens, None, tokens)
            for name in names:
                if there and name in there:
                    metrics[f"{name} @ {tokens}"] = replace(there[name], name=f"{name} @ {tokens}")
        return metrics, skipped


def _measured_prompt(artifact: Artifact, options: ValidateOptions) -> int:
    """Return the prompt's length where a budget names none, cut to the artifact's context as a measurement cuts it."""
    context = int(artifact.details.get("context_length", 0))
    return options.bench().protocol(context).prompt_tokens if context else options.prompt_tokens


def _quality(artifact: Artifact, steps: Sequence[StepRecord]) -> dict[str, Metric]:
    """Return what the steps of an artifact's variant measured last: of the model, and of its adapters' tasks."""
    found: dict[str, Metric] = {}
    for step in steps:
        if step.variant not in (None, artifact.variant) or (artifact.variant == "float" and step.name in _ON_CODES):
            continue
        of_a_task = step.name == "adapt"  # its `after` is the base with a task's adapter: no quality of the model's
        values = {} if of_a_task else {name: getattr(step.after, name) for name in QUALITY_UNITS}
        task, scores = step.details.get("task"), step.details.get("metrics_after")
        if task is not None and isinstance(scores, Mapping):
            values |= {f"{TASK}{task}.{name}": value for name, value in scores.items()}
        found |= {n: Metric(n, float(v), unit_of(n), "measured") for n, v in values.items() if v is not None}
    return found


def validate(
    profile: DeviceProfile,
    found: Mapping[str, Metric] | None,
    budgets: Sequence[Budget],
    *,
    require: Literal["measured"] | None = None,
    memory: str = "default",
) -> TargetVerdict:
    """Return the verdict on metrics (estimated or measured) held to budgets and to the memory an app may use.

    `found` None means that the device runs none of the artifacts: every budget fails.
    """
    return _verdict(_Device.from_profile(profile), found, budgets, require, memory)


def _verdict(
    device: _Device,
    found: Mapping[str, Metric] | None,
    budgets: Sequence[Budget],
    require: Literal["measured"] | None,
    memory: str,
) -> TargetVerdict:
    unknown = {name: Metric(name, None, unit, "estimated") for name, unit in METRIC_UNITS.items()}
    metrics = dict(found if found is not None else unknown)
    by_metric = {budget.key: budget for budget in budgets}
    if found is not None:
        limit = _memory_limit(device, memory)
        asked = by_metric.get(limit.metric)
        by_metric[limit.metric] = limit if asked is None else asked.tighter(limit)
    for name in by_metric:
        metrics.setdefault(name, Metric(name, None, unit_of(by_metric[name].metric), "estimated"))
    judged = tuple(_held(metric, by_metric.get(name), require) for name, metric in metrics.items())
    return TargetVerdict(device.name, judged)


def _memory_limit(device: _Device, which: str) -> Budget:
    limit = getattr(device.memory, which)
    if limit is None:
        raise RecipeError(f"memory={which!r}: {device.title} knows no such limit. Use default or pessimistic.")
    return Budget("peak_memory_bytes", "<=", limit.at(), f"<= {limit.value:.3g} {limit.unit} (what an app may use)")


def _held(metric: Metric, budget: Budget | None, require: Literal["measured"] | None) -> Metric:
    if budget is None:
        return metric
    if require is not None and metric.basis != require:
        return replace(metric, budget=f"{budget.text}, {require}", passed=False)
    return replace(metric, budget=budget.text, passed=metric.value is not None and budget.holds(metric.value))


def junit(report: Report) -> str:
    """Return JUnit XML: one case per parity check and per budget, one skipped case per line of `skipped`."""
    suite = ElementTree.Element("testsuite", name="dwindle")
    counts = {"tests": 0, "failures": 0, "skipped": 0}

    def case(group: str, name: str, passed: bool, message: str) -> None:
        counts["tests"] += 1
        element = ElementTree.SubElement(suite, "testcase", classname=_clean(group), name=_clean(name))
        if not passed:
            counts["failures"] += 1
            ElementTree.SubElement(element, "failure", message=_clean(message))

    for artifact in report.artifacts:
        if artifact.parity is not None:
            parity = artifact.parity
            message = f"max |logit error| {parity.max_abs_logit_error:.3g}, KL {parity.kl_nats_per_token:.3g}"
            case("parity", f"{artifact.format} {artifact.path}", parity.passed, message)
    for target in report.targets:
        for metric in target.metrics:
            if metric.passed is not None:
                value = "not known" if metric.value is None else f"{metric.value:.4g} {metric.unit} ({metric.basis})"
                name = f"{metric.name} {metric.budget} {target.artifact or ''}".strip()
                case(
                    f"budget.{target.profile}", name, metric.passed, f"{metric.name} is {value}, needed {metric.budget}"
                )
    for line in report.skipped:
        counts["tests"] += 1
        counts["skipped"] += 1
        element = ElementTree.SubElement(suite, "testcase", classname="skipped", name=_clean(line.what))
        ElementTree.SubElement(element, "skipped", message=_clean(line.why))
    suite.attrib.update({key: str(value) for key, value in counts.items()})
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _clean(text: str) -> str:
    """Return text without the control characters that XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or c >= " ")
