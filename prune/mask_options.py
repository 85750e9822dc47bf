"""How to learn masks: their schedules, on top of the training loop's options. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions

__all__ = ["MaskOptions", "MaskSchedule"]


@dataclass(frozen=True)
class MaskOptions(TrainOptions):
    """The masks, and everything the training loop takes (`core.train_options`); that of scores unless it says else."""

    steps: int | None = None
    """Optimizer steps; with neither these nor `tokens`, every window is seen once."""
    batch_size: int = 8
    """Windows per optimizer step."""
    learning_rate: float = 0.05
    """Peak rate of the scores, whose standard deviation in a layer is 1 at the start."""
    weight_decay: float = 0.0
    """Decoupled decay of whatever is trained."""
    divergence_margin: float | None = None
    """As in the training loop; off, because the loss of masks begins at 0 and rises with what they remove."""
    weight_rate: float | None = None
    """Peak rate of the model's own weights, which then learn along; None leaves them as they are."""
    masks_warmup_share: float = 0.2
    """Share of the steps in which the number of kept units falls from all to the target."""
    first_temperature: float = 4.0
    """Temperature of the first step, in standard deviations of a layer's scores."""
    last_temperature: float = 0.02
    """Temperature of the last step; it falls by the same factor every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = []
        if self.weight_rate is not None and not 0 < self.weight_rate < math.inf:
            wrong.append(f"weight_rate={self.weight_rate!r} (needed: above 0, or none)")
        if not 0 <= self.masks_warmup_share <= 1:
            wrong.append(f"masks_warmup_share={self.masks_warmup_share!r} (needed: 0 to 1)")
        if not 0 < self.last_temperature <= self.first_temperature < math.inf:
            wrong.append(
                f"first_temperature={self.first_temperature!r}, last_temperature={self.last_temperature!r} "
                "(needed: both above 0, the last not above the first)"
            )
        if wrong:
            raise RecipeError(f"prune: masks: {'; '.join(wrong)}.")

    @property
    def training(self) -> TrainOptions:
        """Return the options of the training loop alone; its rate is that of the weights where they learn along."""
        values = {f.name: getattr(self, f.name) for f in fields(TrainOptions)}
        return TrainOptions(**{**values, "learning_rate": self.weight_rate or self.learning_rate})

    @property
    def schedules(self) -> dict[str, float | None]:
        """Return what decides the numbers of a run beyond the training loop's options."""
        inherited = {f.name for f in fields(TrainOptions)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inherited}
        return {"score_rate": self.learning_rate, **own}


@dataclass(frozen=True)
class MaskSchedule:
    """How many units stay and how soft the choice is: pure functions of the step, 0-based.

    >>> schedule = MaskSchedule(100, 40, 10, MaskOptions(first_temperature=1, last_temperature=0.001))
    >>> [schedule.kept_at(step) for step in (0, 1, 2, 9)]
    [70.0, 40.0, 40.0, 40.0]
    >>> [round(schedule.temperature_at(step), 6) for step in (0, 3, 6, 9)]
    [1.0, 0.1, 0.01, 0.001]
    """

    units: int
    """Units of a layer."""
    kept: int
    """How many of them stay in the end."""
    steps: int
    """Optimizer steps of the run."""
    options: MaskOptions
    """Where the shares and temperatures stand."""

    def kept_at(self, step: int) -> float:
        """Return the sum of a layer's masks at `step`: what is removed grows linearly to its target."""
        warmup = round(self.options.masks_warmup_share * self.steps)
        share = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return self.units - share * (self.units - self.kept)

    def temperature_at(self, step: int) -> float:
        """Return the temperature at `step`, geometric from the first to the last."""
        first, last = self.options.first_temperature, self.options.last_temperature
        return first * math.exp(min(1.0, step / max(1, self.steps - 1)) * math.log(last / first))
