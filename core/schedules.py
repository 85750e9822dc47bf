"""The share of the peak learning rate at each step: warm-up/stable/decay, and cosine.

Both are pure functions of (step, steps), so that a resumed run needs no scheduler state.

- `WarmupStableDecay` (WSD; Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4): linear warm-up, a constant
  plateau, then a short decay. The plateau can be branched: one long run gives checkpoints for many budgets. The
  decay follows 1 - sqrt(x), which Haegele et al. 2024 (arXiv 2405.18392, section 3) found better than linear.
- `Cosine` (Loshchilov and Hutter 2017, arXiv 1608.03983): linear warm-up, then half a cosine.

torch's `LambdaLR` is not used: it keeps a counter that has to be saved, and it hides the value behind the optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dwindle.errors import RecipeError

__all__ = ["Cosine", "Schedule", "ScheduleName", "WarmupStableDecay", "schedule_of"]

ScheduleName = Literal["wsd", "cosine"]


def _warmup_steps(share: float, steps: int) -> int:
    return round(share * steps)


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, plateau at 1, then 1 - sqrt decay towards `final_share`.

    >>> wsd = WarmupStableDecay(warmup_share=0.2, decay_share=0.4, final_share=0.0)
    >>> [round(wsd.scale(step, steps=10), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134]
    """

    warmup_share: float
    decay_share: float
    final_share: float

    def scale(self, step: int, steps: int) -> float:
        """Return the factor of the peak rate at `step` (0-based); `final_share` would be reached at `steps`."""
        warmup = _warmup_steps(self.warmup_share, steps)
        if step < warmup:
            return (step + 1) / warmup
        decay = min(round(self.decay_share * steps), steps - warmup)
        start = steps - decay
        if step < start:
            return 1.0
        return 1.0 - (1.0 - self.final_share) * math.sqrt((step - start) / decay)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 towards `final_share`.

    >>> [round(Cosine(warmup_share=0.2, final_share=0.0).scale(step, steps=10), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """

    warmup_share: float
    final_share: float

    def scale(self, step: int, steps: int) -> float:
        """Return the factor of the peak rate at `step` (0-based); `final_share` would be reached at `steps`."""
        warmup = _warmup_steps(self.warmup_share, steps)
        if step < warmup:
            return (step + 1) / warmup
        passed = (step - warmup) / max(1, steps - warmup)
        return self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * passed))


Schedule = WarmupStableDecay | Cosine


def schedule_of(name: str, warmup_share: float, decay_share: float, final_share: float) -> Schedule:
    """Return the schedule called `name`; raise RecipeError for another name. Cosine has no use for `decay_share`.

    >>> schedule_of("cosine", 0.01, 0.2, 0.1)
    Cosine(warmup_share=0.01, final_share=0.1)
    """
    if name == "wsd":
        return WarmupStableDecay(warmup_share, decay_share, final_share)
    if name == "cosine":
        return Cosine(warmup_share, final_share)
    raise RecipeError(f"train: schedule='{name}' is not known. Use 'wsd' or 'cosine'.")
