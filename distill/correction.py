"""Teacher correction: a short fine-tune of the teacher on the text it is about to teach.

    minimise     mean of -log p(token t+1 | tokens up to t)      over the distillation data

A teacher that was trained on other text than the student will see teaches what it believes of that text, and believes
wrongly. Minitron in practice (arXiv 2408.11796, section 3.1) corrects it first where the original data are not at hand:
0.1 % of the teacher's own tokens lower the distillation loss for the whole run. The corrected model then both teaches
and is what the student is cut from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.clock import StepClock
from dwindle.distill.loss_spec import LossSpec
from dwindle.distill.objective import DistillObjective
from dwindle.distill.teacher_signal import TeacherTargets
from dwindle.errors import RecipeError
from dwindle.report import StepRecord
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import TrainLine, train
from dwindle.train_options import TrainOptions

if TYPE_CHECKING:
    from torch import Tensor

    from dwindle.bundle import ModelBundle

__all__ = ["CorrectTeacherOptions", "correct_teacher"]


@dataclass(frozen=True)
class CorrectTeacherOptions(TrainOptions):
    """How to correct a teacher: everything the training loop takes."""

    learning_rate: float = 1e-4
    """Peak rate: low, since the teacher knows nearly all of it already."""
    schedule: str = "cosine"  # type: ignore[assignment]
    """`wsd` or `cosine`."""

    @property
    def training(self) -> TrainOptions:
        """Return the options of the training loop alone."""
        return TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions)})


class _NoTeacher:
    """The signal of losses that read labels only."""

    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return nothing."""
        return TeacherTargets()


def correct_teacher(
    bundle: ModelBundle,
    options: CorrectTeacherOptions,
    *,
    train_tokens: TokenSet,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return the corrected model as a new bundle, and its record (sizes and losses; a `Meter` fills in quality).

    With a `folder` the run logs and checkpoints there and goes on from where it stopped. Raises RecipeError for a
    quantized model, or data of another tokenizer or longer than the context.
    """
    _check(bundle, train_tokens)
    with StepClock() as clock:
        before = bundle.size()
        model: Any = copy.deepcopy(bundle.model).requires_grad_(True)
        objective = DistillObjective((LossSpec("label_cross_entropy"),), _NoTeacher())
        identity = {"step": "correct_teacher", "model": bundle.content_sha256}
        result = train(model, objective, train_tokens, options.training, folder=folder, on_step=on_step,
                       identity=identity)  # fmt: skip
        recorded = {**asdict(options), "betas": list(options.betas), "trackers": list(options.trackers)}
        inputs = {"train": train_tokens.sha256}
        corrected = bundle.derive(model, "correct_teacher", recorded, inputs).stored_dtype_rounded()
    details = {"steps": result.steps, "tokens": result.tokens, "first_loss": result.first_loss,
               "last_loss": result.last_loss,
               "history": [{"step": line.step, "loss": line.loss} for line in result.history]}  # fmt: skip
    return corrected, StepRecord("correct_teacher", before, corrected.size(), seconds=clock.seconds,
                                 peak_rss_bytes=clock.peak_rss_bytes, details=details)  # fmt: skip


def _check(bundle: ModelBundle, tokens: TokenSet) -> None:
    tokens.require("train")
    wrong = []
    if bundle.quantized:
        wrong.append("the teacher is quantized (its codes cannot be trained)")
    if encoding_sha256(bundle.tokenizer) != tokens.tokenizer_sha256:
        wrong.append("the data were tokenised for another tokenizer")
    if (window := tokens.ids.shape[1] - 1) > bundle.anatomy.context:
        wrong.append(f"windows predict {window:,} tokens, the context is {bundle.anatomy.context:,}")
    if wrong:
        raise RecipeError(f"correct_teacher: {'; '.join(wrong)}.")
