"""What stops a training run before it spoils its checkpoints: a number that is none, and a loss that runs away.

A loss or gradient that is not finite stops the step before the update. A run that diverges stays finite for long: its
loss climbs towards ln V and stays there. So the mean loss of every log line is held against the lowest line before it,
and a rise by more than `divergence_margin` ends the run. The unfinished line is looked at before a checkpoint is
written too, so that what a run leaves behind is from before the rise.
"""

from __future__ import annotations

import math

from dwindle.errors import GateFailed
from dwindle.train_log import RunProgress
from dwindle.train_options import TrainOptions

__all__ = ["require_finite", "require_no_divergence"]


def require_finite(loss: float, norm: float, step: int, steps: int, options: TrainOptions) -> None:
    """Raise GateFailed if the loss or the gradient norm of step `step` (0-based) is no finite number."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise GateFailed(
        f"train: step {step + 1} of {steps} has loss {loss} and gradient norm {norm}. "
        "The update was not made, and earlier checkpoints are kept. "
        f"Lower learning_rate ({options.learning_rate:g}), raise warmup_share "
        f"({options.warmup_share:g}), or mend the data."
    )


def require_no_divergence(progress: RunProgress, options: TrainOptions) -> None:
    """Raise GateFailed if the steps since the last log line lie too far above the lowest line."""
    if options.divergence_margin is None or progress.lowest_line is None or not progress.line_steps:
        return
    mean = progress.line_loss / progress.line_steps
    if mean - progress.lowest_line <= options.divergence_margin:
        return
    first = progress.step - progress.line_steps + 1
    raise GateFailed(
        f"train: the run diverges. Steps {first:,} to {progress.step:,} have a mean loss of {mean:.4g}; the lowest "
        f"before was {progress.lowest_line:.4g}, and divergence_margin={options.divergence_margin:g} is the most it "
        "may rise. Checkpoints from before the rise are kept. "
        f"Lower learning_rate ({options.learning_rate:g}) or raise warmup_share ({options.warmup_share:g})."
    )
