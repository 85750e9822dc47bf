"""What a run tells: measurements, step records, artifacts, verdicts, and the report that holds them.

This file is torch-free and imports nothing of dwindle but `errors`. Its types are the contract of
`report.json` (schema 1): field names here are key names there. A number that was not measured is None,
never a guess; a check that did not run is a line in `skipped`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

__all__ = [
    "Artifact",
    "Basis",
    "Measurement",
    "Metric",
    "Parity",
    "Report",
    "Sample",
    "Skipped",
    "StepRecord",
    "TargetVerdict",
]

Basis = Literal["measured", "estimated", "published"]
"""Where a number comes from. An estimate is never printed as a measurement."""

SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """Size and quality of one model. Quality is None until a `core.measure.Meter` fills it.

    `bytes` counts the stored bytes of all weights (codes, scales, zero points, palettes; tied tensors once),
    `bits_per_weight` is 8 * bytes / parameters over all of them; the two halves are reported apart:
    `bits_per_weight_linear` for the decoder's linear layers, `bits_per_weight_embedding` for embedding and head.
    KL is KL(teacher||model) in nats per token over the full vocabulary; agreement is a share in 0..1.
    """

    parameters: int
    bytes: int
    bits_per_weight: float
    bits_per_weight_linear: float | None = None
    bits_per_weight_embedding: float | None = None
    nats_per_token: float | None = None
    bits_per_byte: float | None = None
    kl_nats_per_token: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands under `before` or `after` in report.json."""
        return asdict(self)


@dataclass(frozen=True)
class Skipped:
    """Something that did not happen, and why. Nothing is skipped in silence."""

    what: str
    why: str


@dataclass(frozen=True)
class StepRecord:
    """Before and after of one step. `details` is free for the step (a plan, losses, per-layer bits)."""

    name: str
    before: Measurement
    after: Measurement
    variant: str | None = None
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in `steps` of report.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepRecord:
        """Return the record written by `to_json`."""
        values = dict(data)
        values["before"] = Measurement(**values["before"])
        values["after"] = Measurement(**values["after"])
        values["skipped"] = tuple(Skipped(**s) for s in values.get("skipped", ()))
        return cls(**values)


@dataclass(frozen=True)
class Parity:
    """How closely an artifact's logits follow the measured torch model, and who executed the artifact."""

    max_abs_logit_error: float
    kl_nats_per_token: float
    top1_agreement: float
    tokens_checked: int
    executed_by: str
    passed: bool = True
    limits: Mapping[str, float] = field(default_factory=dict)
    longest_tokens: int = 0
    """Length of the longest text among those checked."""


@dataclass(frozen=True)
class Artifact:
    """One exported folder or package: `path` is relative to the run folder when it lies inside one."""

    format: str
    path: str
    bytes: int
    sha256: str
    parity: Parity | None = None
    variant: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    minimum_os: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Artifact:
        """Return the artifact that `asdict` wrote."""
        values = dict(data)
        if values.get("parity") is not None:
            values["parity"] = Parity(**values["parity"])
        return cls(**values)


@dataclass(frozen=True)
class Metric:
    """One number about a target, its unit and basis, and the budget it was held to (None: no budget)."""

    name: str
    value: float | None
    unit: str
    basis: Basis
    budget: str | None = None
    passed: bool | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TargetVerdict:
    """All metrics of one artifact (or plan) on one device profile."""

    profile: str
    metrics: tuple[Metric, ...]
    variant: str | None = None
    artifact: str | None = None

    @property
    def passed(self) -> bool | None:
        """Return False if a budget was missed, True if all budgets held, None if there was none."""
        judged = [m.passed for m in self.metrics if m.passed is not None]
        return all(judged) if judged else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetVerdict:
        """Return the verdict that `asdict` wrote."""
        values = dict(data)
        values["metrics"] = tuple(Metric(**m) for m in values["metrics"])
        return cls(**values)


@dataclass(frozen=True)
class Sample:
    """One prompt and what each model wrote after it: name of the model -> text, the teacher first."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Everything one run tells. Owns its exit code and its JSON."""

    steps: tuple[StepRecord, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    targets: tuple[TargetVerdict, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Return one line per failed gate: parity misses, then missed budgets."""
        lines = [
            f"parity: {a.format} {a.path} differs from the measured model "
            f"(max |logit error| {a.parity.max_abs_logit_error:.3g}, KL {a.parity.kl_nats_per_token:.3g})"
            for a in self.artifacts
            if a.parity is not None and not a.parity.passed
        ]
        lines += [
            f"budget: {t.profile} {m.name} = {m.value:.4g} {m.unit} ({m.basis}), needed {m.budget}"
            if m.value is not None
            else f"budget: {t.profile} {m.name} is not known, needed {m.budget}"
            for t in self.targets
            for m in t.metrics
            if m.passed is False
        ]
        return tuple(lines)

    @property
    def exit_code(self) -> int:
        """Return 1 if any gate failed, else 0."""
        return 1 if self.failures else 0

    def adding(
        self,
        *,
        steps: tuple[StepRecord, ...] = (),
        artifacts: tuple[Artifact, ...] = (),
        targets: tuple[TargetVerdict, ...] = (),
        skipped: tuple[Skipped, ...] = (),
    ) -> Report:
        """Return a report with more in it; the skipped lines of added steps come along."""
        inherited = tuple(s for step in steps for s in step.skipped)
        return replace(
            self,
            steps=self.steps + steps,
            artifacts=self.artifacts + artifacts,
            targets=self.targets + targets,
            skipped=self.skipped + skipped + inherited,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object written to report.json."""
        body = {
            f.name: [asdict(x) for x in getattr(self, f.name)]
            for f in fields(self)
            if f.name in ("steps", "artifacts", "targets", "skipped")
        }
        return {
            "schema": SCHEMA,
            **body,
            "environment": dict(self.environment),
            "inputs": dict(self.inputs),
            "samples": [asdict(sample) for sample in self.samples],
            "failures": list(self.failures),
            "exit_code": self.exit_code,
        }

    def dumps(self) -> str:
        """Return report.json's text: stable key order, no NaN."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Return the report written by `to_json`."""
        return cls(
            steps=tuple(StepRecord.from_json(s) for s in data["steps"]),
            artifacts=tuple(Artifact.from_json(a) for a in data.get("artifacts", ())),
            targets=tuple(TargetVerdict.from_json(t) for t in data.get("targets", ())),
            skipped=tuple(Skipped(**s) for s in data.get("skipped", ())),
            environment=data.get("environment", {}),
            inputs=data.get("inputs", {}),
            samples=tuple(Sample(**s) for s in data.get("samples", ())),
        )
