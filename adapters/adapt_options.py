"""How to train a task adapter. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from dwindle.adapters.options import AdapterOptions
from dwindle.adapters.task_options import TaskOptions
from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions

__all__ = ["AdaptOptions", "AdaptStepOptions", "TaskObjective"]

TaskObjective = Literal["sft", "dpo"]
_OBJECTIVES = ("sft", "dpo")


@dataclass(frozen=True)
class AdaptOptions(AdapterOptions):
    """One adapter for one task. With an adapter to start from, its rank, kind and targets are taken over."""

    objective: TaskObjective | None = None
    """`sft`: learn the answers; `dpo`: prefer the chosen answer; None: dpo for preferences, sft for all else."""
    epochs: float = 3.0
    """How often the training records are gone through, if neither `steps` nor `tokens` are given."""
    batch_size: int = 16
    """Records per optimizer step; low-rank changes take small batches better than large ones."""
    warmup_share: float = 0.1
    """Share of the steps with a rising rate."""
    dpo_learning_rate: float = 5e-6
    """Peak rate for dpo, in the place of `learning_rate`."""
    beta: float = 0.1
    """dpo: how strongly the reference holds."""
    reference: Literal["start", "base"] = "start"
    """dpo: what is held to: the base with the adapter that training starts from, or the bare base."""
    nll_weight: float = 0.0
    """dpo: weight of the chosen answers' mean loss, which holds up their probability."""
    replay: float = 0.05
    """Share of the rows, and of the loss, that are windows of general text (if such text is given), against
    forgetting."""
    evaluations: int = 8
    """How often the held-out loss is looked at in a run, if `evaluate_every` does not say; the best adapter is kept."""
    patience: int | None = 3
    """Evaluations without a lower held-out loss after which training ends; None: never early."""
    held_out_records: int = 256
    """Look at no more than so many held-out records while training, and measure the task on no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = []
        if self.objective is not None and self.objective not in _OBJECTIVES:
            wrong.append(f"objective={self.objective!r} (needed: sft or dpo)")
        for name in ("epochs", "dpo_learning_rate", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                wrong.append(f"{name}={getattr(self, name)!r} (needed: above 0)")
        if self.reference not in ("start", "base"):
            wrong.append(f"reference={self.reference!r} (needed: start or base)")
        if not 0 <= self.nll_weight < math.inf:
            wrong.append(f"nll_weight={self.nll_weight!r} (needed: 0 or more)")
        if not 0 <= self.replay < 1:
            wrong.append(f"replay={self.replay!r} (needed: 0 to below 1)")
        for name in ("evaluations", "held_out_records", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                wrong.append(f"{name}={value!r} (needed: a whole number of at least 1)")
        if wrong:
            raise RecipeError(f"adapt: {'; '.join(wrong)}.")

    def objective_of(self, task: TaskOptions) -> TaskObjective:
        """Return the objective for a task; raise RecipeError for dpo without preferences."""
        if self.objective == "dpo" and task.form != "preference":
            raise RecipeError(
                f"adapt: objective=dpo, but task {task.name!r} has {task.form}s. Name its chosen and rejected columns."
            )
        return self.objective or ("dpo" if task.form == "preference" else "sft")

    def run_options(self, objective: TaskObjective, rows: int, window_tokens: int) -> TrainOptions:
        """Return the options of the training loop for a task of so many rows.

        >>> AdaptOptions(epochs=2, batch_size=4).run_options("sft", rows=10, window_tokens=64).steps
        5
        """
        values = {f.name: getattr(self, f.name) for f in fields(TrainOptions)}
        if objective == "dpo":
            values["learning_rate"] = self.dpo_learning_rate
        if self.steps is None and self.tokens is None:
            values["steps"] = math.ceil(self.epochs * rows / self.batch_size)
        made = TrainOptions(**values)
        every = self.evaluate_every or math.ceil(made.total_steps(rows, window_tokens) / self.evaluations)
        return replace(made, evaluate_every=every, log_every=min(self.log_every, every))


@dataclass(frozen=True)
class AdaptStepOptions(AdaptOptions):
    """The adapt step of a recipe: one adapter for each task, each from the recovery adapter if there is one."""

    tasks: tuple[TaskOptions, ...] = ()
    """The tasks."""
    from_recovery: bool = True
    """Start from the recovery adapter of the step before; false: from nothing, to compare."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names:
            raise RecipeError("adapt: no tasks. Name at least one, with data and the columns of its records.")
        if twice:
            raise RecipeError(f"adapt: tasks of one name: {', '.join(twice)}. Each adapter has a name of its own.")
        for task in self.tasks:
            self.objective_of(task)

    @property
    def each(self) -> AdaptOptions:
        """Return the options that every task is trained with."""
        return AdaptOptions(**{f.name: getattr(self, f.name) for f in fields(AdaptOptions)})
