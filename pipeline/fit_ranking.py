"""The best candidates of a fit, made small and trained for a moment, and ranked by what they became.

A prior over shapes is right about most of them and wrong about some, and rankings of pruned models still move in the
first few hundred steps of recovery (Minitron, arXiv:2407.14679, section 4). So each candidate is pruned and distilled
by the same steps, quantized by the cheapest method of its scheme where it is to be quantized, and measured on the
held-out text: KL to the teacher decides, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dwindle import distill, prune, quantize
from dwindle.errors import RecipeError
from dwindle.measure import Meter

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.data import TokenSets
    from dwindle.distill import DistillOptions
    from dwindle.prune.fit_plan import Candidate, FitPlan

__all__ = ["CHEAPEST", "ranked"]

CHEAPEST = {"palettize": "kmeans", "integer": "rtn"}
"""The data-free method of each scheme."""


@dataclass(frozen=True)
class _Bench:
    """What all candidates share."""

    teacher: ModelBundle
    sets: TokenSets
    options: DistillOptions
    meter: Meter


def ranked(
    plan: FitPlan, teacher: ModelBundle, sets: TokenSets, options: DistillOptions, count: int,
    notify: Callable[[str], None],
) -> FitPlan:  # fmt: skip
    """Return the plan with its first `count` candidates measured, the one of least KL chosen, the others in order."""
    if any(candidate.shape.vocab != plan.full.vocab for candidate in plan.candidates):
        raise RecipeError("fit: candidates with a cut vocabulary cannot be ranked by distillation, since KL needs one "
                          "vocabulary. Leave distill_steps or vocabulary out.")  # fmt: skip
    bench = _Bench(teacher, sets, options, Meter(sets.evaluation, teacher))
    measured = []
    for candidate in plan.candidates[:count]:
        notify(f"{candidate.kind}: cutting, {options.steps} steps of distillation, {candidate.storage}")
        measured.append(_measured(candidate, plan, bench))
    measured.sort(key=lambda candidate: float((candidate.measured or {})["kl_nats_per_token"]))
    first, *rest = [*measured, *plan.candidates[count:]]
    return replace(plan, chosen=first, runners_up=tuple(rest))


def _measured(candidate: Candidate, plan: FitPlan, bench: _Bench) -> Candidate:
    bundle = bench.teacher
    cut = candidate.prune_options(plan.full, plan.multiple)
    if cut is not None:
        bundle, _ = prune.run(bundle, prune.PruneOptions(**cut), bench.sets.calibration)
        bundle, _ = distill.run(bundle, bench.options, teacher=bench.teacher, train=bench.sets.train)
    stored = candidate.quantize_options(plan.runtime, plan.unit)
    if stored is not None:
        options = quantize.QuantizeOptions(**_cheap(stored))
        bundle, _ = quantize.run(bundle, options, bench.sets.calibration)
    found = bench.meter.measure(bundle)
    return replace(candidate, measured={
        "steps": bench.options.steps if cut is not None else 0, "nats_per_token": found.nats_per_token,
        "kl_nats_per_token": found.kl_nats_per_token, "parameters": found.parameters, "bytes": found.bytes,
    })  # fmt: skip


def _cheap(stored: dict[str, Any]) -> dict[str, Any]:
    cheap = {**stored, "method": CHEAPEST[stored["scheme"]]}
    return cheap | ({"importance": "magnitude"} if stored["scheme"] == "palettize" else {})
