"""The answer of `fit`: a plan with its predictions and the runners-up, as JSON, and as the options of the next steps.

fit.json (schema 1):

    schema, model, model_type, parameters, target, title, runtime, unit
    budgets        [{metric, limit}], with the memory that one app may use where no other was named
    prompt_tokens, context, pessimistic, searched, notes
    chosen         kind, shape {layers, width, ffn_width, heads, kv_heads, head_dim, vocab, tied}, rotated,
                   storage {scheme, bits, mixed} (bits of a code; mixed: mean bits per weight, tables included),
                   parameters, bytes, effective_parameters (see `capacity`),
                   predictions [{name, value, low, high, unit, basis, budget, passed}], binding,
                   prune and quantize (options of those steps; null where there is nothing to do), measured
    runners_up     the same, each the best of another kind
    recipe         steps for `dwindle run`

Predictions are estimates (`devices`); parameters and bytes are counted, and exact. The shares under `prune` are the
shortest decimals that round to the sizes of the shape. Where the vocabulary is cut, unseen tokens fill it up to the
size that was planned (`vocabulary_min_count: 0`); leave that out for a smaller one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwindle.devices.budgets import Budget
from dwindle.prune.options import PruneOptions
from dwindle.prune.shape import Shape
from dwindle.prune.stored_size import Storage
from dwindle.report import Metric

__all__ = ["STATIC_PLACE", "Candidate", "FitPlan", "worth"]

SCHEMA = 1
STATIC_PLACE = ("coreai", "neural-engine")
"""Runtime and unit that take programs of fixed shapes alone; in those every token reads the whole context's cache."""
_SIZES = ("layers", "width", "ffn_width", "heads", "kv_heads", "head_dim", "vocab", "tied")


@dataclass(frozen=True)
class Candidate:
    """One model that could be made, and what it would do on the device."""

    kind: str
    """What sets it apart: best, FFN alone, fewer bits, ..."""
    shape: Shape
    storage: Storage
    rotated: bool
    """The width is cut along its principal axes; a tied head becomes one of its own."""
    bytes: int
    effective_parameters: float
    streamed_bytes: int
    kv_bytes_per_token: int
    metrics: Mapping[str, Metric]
    judged: tuple[Metric, ...]
    """The metrics that have a budget."""
    binding: str
    """The metric of the budget with the least room."""
    measured: Mapping[str, Any] | None = None
    """steps, nats_per_token and kl_nats_per_token after a short distillation, where one was run."""

    @property
    def holds(self) -> bool:
        """Return whether all budgets hold."""
        return all(metric.passed for metric in self.judged)

    def prune_options(self, full: Shape, multiple: int) -> dict[str, Any] | None:
        """Return the options of the prune step that cuts `full` to this shape, or None if nothing is cut."""
        options = PruneOptions(multiple=multiple)
        after = self.shape
        found: dict[str, Any] = {}
        for name, kept, size, round_share in (
            ("ffn_keep", after.ffn_width, full.ffn_width, options.rounded),
            ("heads_keep", after.kv_heads, full.kv_heads, options.counted),
            ("width_keep", after.width, full.width, options.rounded),
            ("layers_keep", after.layers, full.layers, options.counted),
        ):
            if kept < size:
                found[name] = next(
                    share for digits in range(2, 17) if 0 < (share := round(kept / size, digits)) < 1
                    and round_share(share, size) == kept
                )  # fmt: skip
        if after.vocab < full.vocab:
            found |= {"vocabulary_size": after.vocab, "vocabulary_min_count": 0}
        if not found:
            return None
        if "width_keep" in found:
            found["rotate"] = self.rotated
        return found | ({} if multiple == PruneOptions.multiple else {"multiple": multiple})

    def quantize_options(self, runtime: str, unit: str) -> dict[str, Any] | None:
        """Return the options of the quantize step, or None if the weights stay float."""
        storage = self.storage
        if storage.scheme == "float":
            return None
        name = "coreai-engine" if (runtime, unit) == STATIC_PLACE else runtime
        bits = {"target_bits_per_weight": storage.bits} if storage.mixed else {"bits": int(storage.bits)}
        return {"scheme": storage.scheme, **bits, "runtimes": [name]}

    def to_json(self, plan: FitPlan) -> dict[str, Any]:
        """Return the object under `chosen` or in `runners_up`."""
        judged = {metric.name: metric for metric in self.judged}
        return {
            "kind": self.kind,
            "shape": {name: getattr(self.shape, name) for name in _SIZES},
            "rotated": self.rotated,
            "storage": {"scheme": self.storage.scheme, "bits": self.storage.bits, "mixed": self.storage.mixed},
            "parameters": self.shape.parameters,
            "bytes": self.bytes,
            "effective_parameters": round(self.effective_parameters),
            "predictions": [dataclasses.asdict(judged.get(name, metric)) for name, metric in self.metrics.items()],
            "binding": self.binding,
            "prune": self.prune_options(plan.full, plan.multiple),
            "quantize": self.quantize_options(plan.runtime, plan.unit),
            "measured": None if self.measured is None else dict(self.measured),
        }


@dataclass(frozen=True)
class FitPlan:
    """What to make of a model for a device."""

    model: str
    full: Shape
    target: str
    title: str
    runtime: str
    unit: str
    budgets: tuple[Budget, ...]
    prompt_tokens: int
    context: int
    pessimistic: bool
    multiple: int
    searched: int
    """Combinations of width, groups, layers and bits, each with its best FFN."""
    notes: tuple[str, ...]
    chosen: Candidate
    runners_up: tuple[Candidate, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Return the chosen plan and the runners-up."""
        return self.chosen, *self.runners_up

    def recipe(self, data: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return a recipe for `dwindle run` that makes the chosen model, exports it and holds it to the budgets."""
        prune = self.chosen.prune_options(self.full, self.multiple)
        quantize = self.chosen.quantize_options(self.runtime, self.unit)
        static = {"shapes": "static"} if (self.runtime, self.unit) == STATIC_PLACE else {}
        steps: list[dict[str, Any]] = [] if prune is None else [{"prune": prune}, {"distill": {}}]
        steps += [] if quantize is None else [{"quantize": quantize}]
        steps.append({"export": {"formats": [self.runtime], "context_length": self.context, **static}})
        budgets = {budget.metric: budget.text for budget in self.budgets}
        steps.append({"validate": {"targets": [self.target], "budgets": budgets, "prompt_tokens": self.prompt_tokens}})
        return {"version": 1, "name": f"fit {self.target}", "teacher": {"model": self.model},
                "data": {"train": list(data)}, "steps": steps}  # fmt: skip

    def to_json(self, data: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the object of fit.json."""
        return {
            "schema": SCHEMA, "model": self.model, "model_type": self.full.model_type,
            "parameters": self.full.parameters, "target": self.target, "title": self.title, "runtime": self.runtime,
            "unit": self.unit, "budgets": [{"metric": b.metric, "limit": b.text} for b in self.budgets],
            "prompt_tokens": self.prompt_tokens, "context": self.context,
            "pessimistic": self.pessimistic, "searched": self.searched, "notes": list(self.notes),
            "chosen": self.chosen.to_json(self),
            "runners_up": [candidate.to_json(self) for candidate in self.runners_up],
            "recipe": self.recipe(data),
        }  # fmt: skip


def worth(metric: Metric, pessimistic: bool) -> float:
    """Return the number a budget is held to: the middle of the estimate, or its unfavourable end."""
    assert metric.value is not None, metric
    if not pessimistic or metric.low is None or metric.high is None:
        return metric.value
    return metric.low if metric.name.startswith("tokens_per_second") else metric.high
