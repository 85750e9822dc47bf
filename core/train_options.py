"""How to train: every default of the loop, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dwindle.errors import RecipeError
from dwindle.schedules import ScheduleName

__all__ = ["TRACKERS", "TrainOptions"]

TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Steps come from `steps` or `tokens`; with neither, every window is seen once."""

    tokens: int | None = None
    """Tokens to read; rounded up to whole steps."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int = 32
    """Windows per optimizer step, over all pieces and processes together."""
    gradient_accumulation: int = 1
    """Pieces a batch is cut into, one forward and backward pass each: less memory, the same gradient."""
    learning_rate: float = 1e-3
    """Peak rate."""
    schedule: ScheduleName = "wsd"
    """`wsd` or `cosine`."""
    warmup_share: float = 0.02
    """Share of the steps with a rising rate."""
    decay_share: float = 0.2
    """Share of the steps in which `wsd` falls."""
    final_share: float = 0.0
    """Rate at the end as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled decay of weights with two axes or more."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: float | None = 1.0
    """Largest gradient norm, over all weights together; None for no clipping."""
    seed: int = 0
    """Order of the data and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: forward passes under autocast; weights and moments stay fp32."""
    activation_checkpointing: bool = False
    """Keep only the inputs of decoder layers and compute the rest again: less memory, a third more time, same bits."""
    divergence_margin: float | None = 3.0
    """Stop when the mean loss of a log line is this far above the lowest line before; None: never."""
    evaluate_every: int | None = None
    """Steps between evaluations, each at the next log line; None: none."""
    checkpoint_every: int = 200
    """Steps between checkpoints (only with a folder; the last step always has one)."""
    checkpoints_kept: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 10
    """Steps per log line; a line's losses are means over them."""
    trackers: tuple[str, ...] = ()
    """Further places for the log: `tensorboard`, `wandb`, `trackio`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "trackers", tuple(self.trackers))
        wrong = [*self._wrong_counts(), *self._wrong_rates()]
        if wrong:
            raise RecipeError(f"train: {'; '.join(wrong)}.")

    def _wrong_counts(self) -> list[str]:
        counts = ["batch_size", "gradient_accumulation", "checkpoint_every", "checkpoints_kept", "log_every"]
        counts += [name for name in ("tokens", "steps", "evaluate_every") if getattr(self, name) is not None]
        wrong = [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least 1)"
            for name in counts
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if self.tokens is not None and self.steps is not None:
            wrong.append(f"tokens={self.tokens} and steps={self.steps} (needed: one of the two)")
        if not wrong and self.batch_size % self.gradient_accumulation:
            wrong.append(
                f"batch_size={self.batch_size} (needed: a multiple of "
                f"gradient_accumulation={self.gradient_accumulation})"
            )
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            wrong.append(f"trackers={', '.join(unknown)} (needed: {', '.join(TRACKERS)})")
        return wrong

    def _wrong_rates(self) -> list[str]:
        wrong = [
            f"{name}={getattr(self, name)!r} (needed: 0 to 1)"
            for name in ("warmup_share", "decay_share", "final_share")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 < self.learning_rate < math.inf:
            wrong.append(f"learning_rate={self.learning_rate!r} (needed: more than 0)")
        if not 0 <= self.weight_decay < math.inf:
            wrong.append(f"weight_decay={self.weight_decay!r} (needed: 0 or more)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"betas={self.betas!r} (needed: two numbers from 0 to below 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            wrong.append(f"clip_norm={self.clip_norm!r} (needed: more than 0, or none)")
        if self.divergence_margin is not None and not self.divergence_margin > 0:
            wrong.append(f"divergence_margin={self.divergence_margin!r} (needed: more than 0, or none)")
        if self.precision not in ("fp32", "bf16"):
            wrong.append(f"precision={self.precision!r} (needed: 'fp32' or 'bf16')")
        if self.schedule not in ("wsd", "cosine"):
            wrong.append(f"schedule={self.schedule!r} (needed: 'wsd' or 'cosine')")
        elif self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            wrong.append(f"warmup_share + decay_share={self.warmup_share + self.decay_share:g} (needed: at most 1)")
        return wrong

    def total_steps(self, windows: int, window_tokens: int) -> int:
        """Return the optimizer steps of a run over `windows` windows of `window_tokens` tokens.

        >>> TrainOptions(tokens=1000, batch_size=4).total_steps(windows=50, window_tokens=64)
        4
        >>> TrainOptions(batch_size=4).total_steps(windows=50, window_tokens=64)
        13
        """
        if self.steps is not None:
            return self.steps
        needed = windows * window_tokens if self.tokens is None else self.tokens
        return math.ceil(needed / (self.batch_size * window_tokens))
