"""How much of the text is written during training, and by whom. Torch-free; see `on_policy`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dwindle.distill.loss_spec import LossSpec
from dwindle.errors import RecipeError

__all__ = ["LABEL_LOSSES", "OnPolicyOptions"]

LABEL_LOSSES = ("label_cross_entropy", "top1_blend")
"""Losses that read the next token of the text."""

Writer = Literal["student", "teacher"]


@dataclass(frozen=True)
class OnPolicyOptions:
    """Which share of the windows is written anew, by whom."""

    share: float = 0.5
    """Share of the windows that are written during training."""
    writer: Writer = "student"
    """`student` (on-policy) or `teacher` (sequence-level)."""
    prompt_share: float = 0.25
    """Share of a window that is given, from the data."""
    temperature: float = 1.0
    """Temperature of the draws; 0 takes the most probable token."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 < self.share <= 1:
            wrong.append(f"share={self.share!r} (needed: above 0, at most 1)")
        if self.writer not in get_args(Writer):
            wrong.append(f"writer={self.writer!r} (needed: {' or '.join(get_args(Writer))})")
        if not 0 < self.prompt_share < 1:
            wrong.append(f"prompt_share={self.prompt_share!r} (needed: between 0 and 1)")
        if not 0 <= self.temperature < math.inf:
            wrong.append(f"temperature={self.temperature!r} (needed: 0 or more)")
        if wrong:
            raise RecipeError(f"distill: on_policy: {'; '.join(wrong)}.")

    def rows(self, batch: int, step: int) -> int:
        """Return how many windows of a batch are written at `step`; over the steps, exactly the share.

        >>> [OnPolicyOptions(share=0.3).rows(2, step) for step in range(5)]
        [0, 1, 0, 1, 1]
        """
        return math.floor((step + 1) * self.share * batch + 1e-9) - math.floor(step * self.share * batch + 1e-9)

    def losses(self, mix: tuple[LossSpec, ...]) -> tuple[LossSpec, ...]:
        """Return the losses that count on written text; raise RecipeError if there are none."""
        if self.writer == "teacher":
            return mix
        chosen = tuple(loss for loss in mix if loss.name not in LABEL_LOSSES)
        if not chosen:
            raise RecipeError(
                f"distill: on_policy: {', '.join(loss.name for loss in mix)} read labels, and the student's own words "
                "are none. Add a divergence, such as jsd or reverse_kl."
            )
        return chosen

    @classmethod
    def of(cls, text: str) -> OnPolicyOptions:
        """Return the options that a bare share means.

        >>> OnPolicyOptions.of("0.3").share
        0.3
        """
        try:
            return cls(share=float(text))
        except ValueError as error:
            raise RecipeError(f"distill: on_policy={text!r} is no number. Write a share, as in 0.5.") from error
