"""One loss of a distillation recipe: its name, weight, parameters, and how the weight changes. Torch-free."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dwindle.errors import RecipeError

__all__ = ["LossName", "LossSpec", "WeightSchedule"]

LossName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "top_k", "taid", "top1_blend",
                   "label_cross_entropy", "hidden_states"]  # fmt: skip
_WITH_TEMPERATURE = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "top_k", "taid")
_READ_BY: dict[str, tuple[str, ...]] = {
    "temperature": _WITH_TEMPERATURE, "beta": ("jsd",), "alpha": ("skew_kl", "skew_reverse_kl"), "k": ("top_k",),
    "t_start": ("taid",), "measure": ("hidden_states",), "layers": ("hidden_states",),
}  # fmt: skip
"""Which losses read a parameter; for the others it must be as it is."""


@dataclass(frozen=True)
class WeightSchedule:
    """A weight's factor over a run: up from `start` to 1, 1 for a while, then to `end`, in straight lines.

    WSD-alpha of Peng et al. 2024 (arXiv 2410.16215) is a distillation loss with a warm-up and a decay from
    and to 0 beside labels that get the rest: for weights 0.9 and 0.1, `start` and `end` of the labels are 10, since
    1 - 0.9 f = 0.1 (10 - 9 f) for every factor f.
    """

    warmup: float = 0.0
    """Share of the steps with a rising factor."""
    stable: float | None = None
    """Share of the steps at 1; None: what warm-up and decay leave."""
    decay: float = 0.0
    """Share of the steps with a falling factor."""
    start: float = 0.0
    """Factor before the warm-up."""
    end: float = 0.0
    """Factor after the decay."""

    def __post_init__(self) -> None:
        shares = {"warmup": self.warmup, "decay": self.decay}
        if self.stable is not None:
            shares["stable"] = self.stable
        wrong = [f"{name}={value!r} (needed: 0 to 1)" for name, value in shares.items() if not _within(value, 0, 1)]
        wrong += [f"{name}={getattr(self, name)!r} (needed: 0 or more)" for name in ("start", "end")
                  if not _within(getattr(self, name), 0, math.inf)]  # fmt: skip
        if not wrong:
            total = sum(shares.values())
            if total > 1 + 1e-9 or (self.stable is not None and total < 1 - 1e-9):
                needed = "at most 1" if self.stable is None else "1"
                wrong.append(f"{' + '.join(shares)}={total:g} (needed: {needed})")
        if wrong:
            raise RecipeError(f"distill: schedule of a weight: {'; '.join(wrong)}.")

    def factor(self, step: int, steps: int) -> float:
        """Return the factor at `step` (0-based) of `steps`.

        >>> [round(WeightSchedule(warmup=0.2, decay=0.4).factor(step, 10), 2) for step in range(10)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        at = step / max(1, steps)
        if at < self.warmup:
            return self.start + (1 - self.start) * at / self.warmup
        falling = at - (1 - self.decay)
        return 1.0 if falling <= 0 else 1 + (self.end - 1) * falling / self.decay


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and low <= value <= high and value < math.inf


@dataclass(frozen=True)
class LossSpec:
    """One loss of the mix. The losses are added."""

    name: LossName
    """See `losses`; `hidden_states` is in `layer_match`."""
    weight: float = 1.0
    """The factor of this loss. `top1_blend`: the teacher's share w; the label has 1 - w, and the factor is 1."""
    temperature: float = 1.0
    """Temperature of teacher and student (the losses on whole distributions only)."""
    beta: float = 0.5
    """`jsd`: the teacher's part in the mixture; 0 is forward KL, 1 is reverse KL."""
    alpha: float = 0.1
    """`skew_kl`, `skew_reverse_kl`: how much of the first distribution is mixed into the second; 0 to below 1."""
    k: int = 64
    """`top_k`: tokens of the teacher; all others are one outcome."""
    t_start: float = 0.4
    """`taid`: the teacher's part in the target at the first step; it grows in a straight line to 1 at the last. (The
    paper's adaptive step depends on past losses, which a resumed run would need.)"""
    measure: Literal["mse", "cosine"] = "mse"
    """`hidden_states`: the distance."""
    layers: tuple[tuple[int, int], ...] = ()
    """`hidden_states`: pairs of a student's and a teacher's layer, counted from 1; none: each student layer with the
    teacher's at the same share of the depth."""
    schedule: WeightSchedule | None = None
    """How the weight (of `top1_blend`: the teacher's share) changes over the run; None: not at all."""

    def __post_init__(self) -> None:
        if self.name not in get_args(LossName):
            near = difflib.get_close_matches(str(self.name), get_args(LossName), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"distill: loss {self.name!r} is not one of {', '.join(get_args(LossName))}.{hint}")
        wrong = self._wrong_types() or [*self._wrong_weight(), *self._wrong_numbers(), *self._unread()]
        if wrong:
            raise RecipeError(f"distill: loss {self.name}: {'; '.join(wrong)}.")

    def _wrong_types(self) -> list[str]:
        """Bring lists and mappings of a recipe to their types; return what cannot be."""
        if isinstance(self.schedule, Mapping):
            unknown = sorted(set(self.schedule) - {f.name for f in fields(WeightSchedule)})
            if unknown:
                named = ", ".join(f.name for f in fields(WeightSchedule))
                return [f"unknown keys {', '.join(unknown)} in schedule (the keys are {named})"]
            object.__setattr__(self, "schedule", WeightSchedule(**self.schedule))
        pairs = list(self.layers.items()) if isinstance(self.layers, Mapping) else self.layers
        try:
            object.__setattr__(self, "layers", tuple((int(own), int(other)) for own, other in pairs))
        except (TypeError, ValueError):
            return [f"layers={self.layers!r} (needed: pairs of a student's and a teacher's layer)"]
        numbers = {name: getattr(self, name) for name in ("weight", "temperature", "beta", "alpha", "k", "t_start")}
        return [f"{name}={value!r} (needed: a number)" for name, value in numbers.items()
                if isinstance(value, bool) or not isinstance(value, int | float)]  # fmt: skip

    def _wrong_weight(self) -> list[str]:
        if self.name != "top1_blend":
            return [] if 0 < self.weight < math.inf else [f"weight={self.weight!r} (needed: above 0)"]
        ends = [] if self.schedule is None else [self.schedule.start, self.schedule.end]
        largest = max([1.0, *ends]) * self.weight
        if 0 <= self.weight <= 1 and largest <= 1:
            return []
        return [f"weight={self.weight!r} (needed: the teacher's share, 0 to 1 at every step)"]

    def _wrong_numbers(self) -> list[str]:
        wrong = []
        if not 0 < self.temperature < math.inf:
            wrong.append(f"temperature={self.temperature!r} (needed: above 0)")
        if not 0 <= self.beta <= 1:
            wrong.append(f"beta={self.beta!r} (needed: 0 to 1)")
        if not 0 <= self.alpha < 1:
            wrong.append(f"alpha={self.alpha!r} (needed: 0 to below 1)")
        if not isinstance(self.k, int) or self.k < 1:
            wrong.append(f"k={self.k!r} (needed: a whole number of at least 1)")
        if not 0 <= self.t_start <= 1:
            wrong.append(f"t_start={self.t_start!r} (needed: 0 to 1)")
        if self.measure not in ("mse", "cosine"):
            wrong.append(f"measure={self.measure!r} (needed: mse or cosine)")
        if any(own < 1 or other < 1 for own, other in self.layers):
            wrong.append(f"layers={list(self.layers)} (needed: layers counted from 1)")
        return wrong

    def _unread(self) -> list[str]:
        """Return a line for each parameter that was set and that this loss does not have."""
        usual = {f.name: f.default for f in fields(self)}
        return [f"{name}={getattr(self, name)!r} (needed: {usual[name]!r}, only {' and '.join(readers)} read it)"
                for name, readers in _READ_BY.items()
                if self.name not in readers and getattr(self, name) != usual[name]]  # fmt: skip

    @classmethod
    def of(cls, value: LossSpec | Mapping[str, Any] | str) -> LossSpec:
        """Return the spec that a recipe's mapping, a name, or a flag such as `top1_blend=0.9` means.

        >>> LossSpec.of("top1_blend=0.9") == LossSpec(name="top1_blend", weight=0.9)
        True
        """
        if isinstance(value, LossSpec):
            return value
        if isinstance(value, Mapping):
            names = [f.name for f in fields(cls)]
            unknown = sorted(set(value) - set(names))
            if unknown or "name" not in value:
                found = f"unknown keys {', '.join(unknown)}" if unknown else "no name"
                raise RecipeError(f"distill: a loss has {found}. The keys are {', '.join(names)}.")
            return cls(**value)
        name, _, weight = value.partition("=")
        try:
            return cls(name, float(weight)) if weight else cls(name)  # type: ignore[arg-type]
        except ValueError as error:
            raise RecipeError(f"distill: loss {value!r}: {weight!r} is no number. Write NAME=WEIGHT.") from error

    def weight_at(self, step: int, steps: int) -> float:
        """Return the weight at `step` (0-based) of `steps`."""
        return self.weight if self.schedule is None else self.weight * self.schedule.factor(step, steps)

    def teacher_part_at(self, step: int, steps: int) -> float:
        """Return `taid`'s t at `step` (0-based) of `steps`.

        >>> [LossSpec("taid", t_start=0.5).teacher_part_at(step, 3) for step in range(3)]
        [0.5, 0.75, 1.0]
        """
        return self.t_start + (1 - self.t_start) * (step / (steps - 1) if steps > 1 else 1.0)
