"""How to distill: a mix of losses on top of the training loop's options. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dwindle.data.options import DataOptions
from dwindle.distill.cache_options import CacheOptions
from dwindle.distill.loss_spec import LossName, LossSpec
from dwindle.distill.on_policy_options import OnPolicyOptions
from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions

__all__ = ["DistillOptions", "LossName", "LossSpec", "TeacherSpec"]


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher beside the first one."""

    model: str
    """Folder or Hugging Face id of any causal language model; its tokenizer must be the first one's."""
    share: float
    """Its part in the mean of the teachers' probabilities; the first one has what is left."""
    offload: bool = False
    """Its weights stay on the disk and are read layer by layer."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RecipeError(f"distill: share={self.share!r} of teacher {self.model} (needed: between 0 and 1).")


@dataclass(frozen=True)
class DistillOptions(TrainOptions):
    """The losses, and everything the training loop takes (`core.train_options`)."""

    losses: tuple[LossSpec, ...] = (LossSpec("forward_kl"),)
    """Losses that are added; also mappings or `NAME=WEIGHT`."""
    cache: CacheOptions | None = None
    """Logit cache to train from, by its folder or in full; what is missing in it is written first."""
    on_policy: OnPolicyOptions | None = None
    """Which share of the windows student or teacher write anew during training; None: none."""
    other_teachers: tuple[TeacherSpec, ...] = ()
    """Further live teachers: the student follows the weighted mean of all probabilities."""
    data: DataOptions | None = None
    """In a recipe: this step's own text, mix and length in place of the recipe's: a stage of a curriculum."""

    def __post_init__(self) -> None:
        given = self.losses if isinstance(self.losses, list | tuple) else (self.losses,)
        object.__setattr__(self, "losses", tuple(LossSpec.of(loss) for loss in given))
        names = [loss.name for loss in self.losses]
        if not names or len(set(names)) != len(names):
            raise RecipeError(f"distill: losses={names} (needed: at least one, each once).")
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", CacheOptions.of(self.cache))
        if self.cache is not None and (
            wrong := self.cache.wrong_losses((loss.name, loss.temperature) for loss in self.losses)
        ):
            raise RecipeError(f"distill: {'; '.join(wrong)}.")
        object.__setattr__(self, "other_teachers", tuple(self.other_teachers))
        if self.other_teachers:
            total = sum(spec.share for spec in self.other_teachers)
            if total >= 1 or self.cache is not None:
                raise RecipeError(f"distill: other_teachers with shares of {total:g} in all"
                                  f"{' and a cache' if self.cache else ''} (needed: below 1, live).")  # fmt: skip
        if self.on_policy is not None:
            self.on_policy.losses(self.losses)
            if self.cache is not None:
                raise RecipeError("distill: on_policy with a cache (needed: one; unwritten text is in no cache).")
        super().__post_init__()

    @property
    def training(self) -> TrainOptions:
        """Return the options of the training loop alone."""
        return TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions)})
