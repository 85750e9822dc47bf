"""The distillation step: check that teacher and student speak alike, train, round to the stored type, record."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.clock import StepClock
from dwindle.distill.objective import DistillObjective
from dwindle.distill.options import DistillOptions
from dwindle.distill.teacher_signal import LiveTeacher
from dwindle.errors import RecipeError
from dwindle.report import Skipped, StepRecord
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import TrainLine, TrainResult, train

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["run"]

_LOG = logging.getLogger("dwindle")


def run(
    student: ModelBundle,
    options: DistillOptions,
    *,
    teacher: ModelBundle,
    train: TokenSet,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return the distilled student as a new bundle, and its record (sizes and losses; a `Meter` fills in quality).

    With a `folder` the run logs and checkpoints there and goes on from where it stopped. Raises RecipeError, naming all
    reasons, when teacher, student and data do not go together.
    """
    _check(student, teacher, train)
    with StepClock() as clock:
        before = student.size()
        model: Any = copy.deepcopy(student.model).requires_grad_(True)
        signal = LiveTeacher(teacher, wants_logits=DistillObjective.wants_logits(options.losses))
        inputs = {"train": train.sha256, "teacher": teacher.content_sha256}
        losses = [asdict(loss) for loss in options.losses]
        identity = {"losses": losses, "teacher": teacher.content_sha256}
        result = _train(model, DistillObjective(options.losses, signal), train, options, folder, on_step, identity)
        recorded = {**asdict(options), "betas": list(options.betas), "losses": losses}
        distilled = student.derive(model, "distill", recorded, inputs).stored_dtype_rounded()
        after = distilled.size()
    details, skipped = _tell(result, options)
    return distilled, StepRecord("distill", before, after, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                                 details=details, skipped=skipped)  # fmt: skip


def _train(
    model: Any,
    objective: DistillObjective,
    tokens: TokenSet,
    options: DistillOptions,
    folder: Path | None,
    on_step: Callable[[TrainLine], None] | None,
    identity: dict[str, Any],
) -> TrainResult:
    return train(model, objective, tokens, options.training, folder=folder, on_step=on_step, identity=identity)


def _check(student: ModelBundle, teacher: ModelBundle, tokens: TokenSet) -> None:
    """Raise RecipeError with every reason why this student cannot learn from this teacher on these tokens."""
    tokens.require("train")
    wrong = []
    if student.quantized:
        wrong.append("the student is quantized (distill first, then quantize)")
    if student.anatomy.vocab != teacher.anatomy.vocab:
        wrong.append(
            f"the teacher's vocabulary has {teacher.anatomy.vocab:,} entries, the student's "
            f"{student.anatomy.vocab:,} (choose a teacher of the same family)"
        )
    names = {"student": student.tokenizer, "teacher": teacher.tokenizer}
    hashes = {name: encoding_sha256(tokenizer) for name, tokenizer in names.items()} | {"data": tokens.tokenizer_sha256}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} {sha[:12]}" for name, sha in hashes.items())
        wrong.append(f"the tokenizers differ: {told} (token ids must mean the same to all of them)")
    window = tokens.ids.shape[1] - 1
    for name, bundle in (("student", student), ("teacher", teacher)):
        if bundle.anatomy.context < window:
            wrong.append(f"windows predict {window:,} tokens, the {name}'s context is {bundle.anatomy.context:,} "
                         f"(set data.context={bundle.anatomy.context})")  # fmt: skip
    if wrong:
        raise RecipeError(f"distill: {'; '.join(wrong)}.")


def _tell(result: TrainResult, options: DistillOptions) -> tuple[dict[str, Any], tuple[Skipped, ...]]:
    """Return the record's details; a loss that ended no better than it began is said aloud."""
    details: dict[str, Any] = {
        "losses": [asdict(loss) for loss in options.losses],
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "history": [{"step": line.step, "loss": line.loss, **line.parts} for line in result.history],
    }
    if result.last_loss < result.first_loss:
        return details, ()
    warning = (
        f"the loss ended at {result.last_loss:.4f}, no better than the {result.first_loss:.4f} it began with; "
        "lower learning_rate, or train longer"
    )
    _LOG.warning("distill: %s", warning)
    return {**details, "warning": warning}, (Skipped("distill: improvement", warning),)
