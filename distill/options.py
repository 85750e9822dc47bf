"""How to distill: a mix of losses on top of the training loop's options. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions

__all__ = ["DistillOptions", "LossName", "LossSpec"]

LossName = Literal["forward_kl", "top1_blend", "label_cross_entropy"]


@dataclass(frozen=True)
class LossSpec:
    """One loss of the mix. The losses are added."""

    name: LossName
    """`forward_kl`, `top1_blend` or `label_cross_entropy`; see `losses`."""
    weight: float = 1.0
    """`forward_kl`, `label_cross_entropy`: the factor of this loss. `top1_blend`: the teacher's share w; the label has
    1 - w, and the factor is 1."""
    temperature: float = 1.0
    """`forward_kl` only: temperature of teacher and student."""

    def __post_init__(self) -> None:
        if self.name not in get_args(LossName):
            near = difflib.get_close_matches(str(self.name), get_args(LossName), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"distill: loss {self.name!r} is not one of {', '.join(get_args(LossName))}.{hint}")
        wrong = []
        if self.name == "top1_blend" and not 0 <= self.weight <= 1:
            wrong.append(f"weight={self.weight!r} (needed: the teacher's share, 0 to 1)")
        elif not 0 < self.weight < float("inf") and self.name != "top1_blend":
            wrong.append(f"weight={self.weight!r} (needed: above 0)")
        if not 0 < self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature!r} (needed: above 0)")
        elif self.temperature != 1 and self.name != "forward_kl":
            wrong.append(f"temperature={self.temperature!r} (needed: 1, only forward_kl has a temperature)")
        if wrong:
            raise RecipeError(f"distill: loss {self.name}: {'; '.join(wrong)}.")

    @classmethod
    def of(cls, value: LossSpec | Mapping[str, Any] | str) -> LossSpec:
        """Return the spec that a recipe's mapping, a name, or a flag such as `top1_blend=0.9` means.

        >>> LossSpec.of("top1_blend=0.9")
        LossSpec(name='top1_blend', weight=0.9, temperature=1.0)
        """
        if isinstance(value, LossSpec):
            return value
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {f.name for f in fields(cls)})
            if unknown or "name" not in value:
                found = f"unknown keys {', '.join(unknown)}" if unknown else "no name"
                raise RecipeError(f"distill: a loss has {found}. The keys are name, weight, temperature.")
            return cls(**value)
        name, _, weight = value.partition("=")
        try:
            return cls(name, float(weight)) if weight else cls(name)  # type: ignore[arg-type]
        except ValueError as error:
            raise RecipeError(f"distill: loss {value!r}: {weight!r} is no number. Write NAME=WEIGHT.") from error


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """The losses, and everything the training loop takes (`core.train_options`)."""

    losses: tuple[LossSpec, ...] = (LossSpec("forward_kl"),)
    """Losses that are added; also mappings or `NAME=WEIGHT`."""

    def __post_init__(self) -> None:
        given = self.losses if isinstance(self.losses, list | tuple) else (self.losses,)
        object.__setattr__(self, "losses", tuple(LossSpec.of(loss) for loss in given))
        names = [loss.name for loss in self.losses]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"distill: losses={names} (needed: at least one, each once).")
        super().__post_init__()

    @property
    def training(self) -> TrainOptions:
        """Return the options of the training loop alone."""
        return TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions)})
