"""The distillation step: check that teacher and student speak alike, train, round to the stored type, record."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.clock import StepClock
from dwindle.data.learned_mixture import LearnedOrder
from dwindle.distill.cached_teacher import CachedTeacher, prepared_cache
from dwindle.distill.layer_match import PROJECTIONS, attach_projections, layer_pairs
from dwindle.distill.learned_weights import learned_order
from dwindle.distill.objective import DistillObjective
from dwindle.distill.on_policy import OnPolicyObjective
from dwindle.distill.options import DistillOptions, TeacherSpec
from dwindle.distill.probe import Probe
from dwindle.distill.teacher_model import Teacher
from dwindle.distill.teacher_signal import LiveTeacher, SeveralTeachers, TeacherSignal
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.report import Skipped, StepRecord
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import Objective, TrainLine, TrainResult, train
from dwindle.vocabulary_map import VocabularyMap, map_between

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["run"]

_LOG = logging.getLogger("dwindle")


def run(
    student: ModelBundle,
    options: DistillOptions,
    *,
    teacher: ModelBundle | Teacher | None = None,
    train: TokenSet,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
    evaluation: TokenSet | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return the distilled student as a new bundle, and its record (sizes and losses; a `Meter` fills in quality).

    The teacher is a bundle, or any causal language model as a `Teacher`. With a `folder` the run logs and checkpoints
    there and goes on from where it stopped. With `options.cache` targets are read from disk, windows that are missing
    there are written first, and without any the teacher may be None. With an `evaluation` set the student is measured
    on it every `options.evaluate_every` steps and after the last (`probe`).
    Raises RecipeError, naming all reasons, when teacher, student and data do not go together.
    """
    teacher = None if teacher is None else Teacher.of(teacher)
    mapped = _check(student, teacher, train, options)
    with StepClock() as clock:
        before = student.size()
        model: Any = copy.deepcopy(student.model).requires_grad_(True)
        pairs = _layer_pairs(student, teacher, options)
        signal, taught = _signal(student, teacher, train, options, mapped, [other for _, other in pairs])
        inputs = {"train": train.sha256, "teacher": str(taught["teacher"])}
        losses = [asdict(loss) for loss in options.losses]
        written = None if options.on_policy is None else asdict(options.on_policy)
        identity = {"losses": losses, **taught, **({} if written is None else {"on_policy": written})}
        if pairs and teacher is not None:
            attach_projections(model, pairs, student.anatomy.width, teacher.anatomy.width)
        plain = DistillObjective(options.losses, signal, pairs)
        objective: Objective = plain
        if options.on_policy is not None and teacher is not None:
            objective = OnPolicyObjective(plain, options.on_policy, teacher.model)
        probe = None
        if evaluation is not None:
            live = None if teacher is None else LiveTeacher(teacher, mapped=mapped)
            probe = Probe(evaluation, live, train.ids.shape[1] - 1, student.tokenizer, folder)
        order = learned_order(train, options.seed, teacher, mapped)
        result = _train(model, objective, train, options, folder, on_step, identity, probe, order)
        if hasattr(model, PROJECTIONS):
            delattr(model, PROJECTIONS)
        recorded = {**asdict(options), "betas": list(options.betas), "losses": losses, "cache": taught["cache"],
                    "other_teachers": taught.get("others", []), "data": None}  # fmt: skip
        distilled = student.derive(model, "distill", recorded, inputs).stored_dtype_rounded()
        after = distilled.size()
    details, skipped = _tell(result, options)
    if order is not None:
        details["mixture"] = order.to_json()
    return distilled, StepRecord("distill", before, after, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                                 details=details, skipped=skipped)  # fmt: skip


def _signal(
    student: ModelBundle, teacher: Teacher | None, tokens: TokenSet, options: DistillOptions,
    mapped: VocabularyMap | None, layers: Sequence[int],
) -> tuple[TeacherSignal, dict[str, Any]]:  # fmt: skip
    """Return where targets come from, and what tells it from others."""
    if options.cache is not None:
        cache = prepared_cache(student, tokens, options.cache, teacher, mapped=mapped)
        return CachedTeacher(cache), {"teacher": cache.manifest.teacher, "cache": cache.identity}
    assert teacher is not None
    live: TeacherSignal = LiveTeacher(teacher, mapped=mapped, layers=layers)
    told: dict[str, Any] = {"teacher": teacher.content_sha256, "cache": None}
    if options.other_teachers:
        others = [_other(spec, student, tokens) for spec in options.other_teachers]
        shares = [spec.share for spec in options.other_teachers]
        signals = [live, *(LiveTeacher(other, mapped=own) for other, own in others)]
        live = SeveralTeachers(signals, [1 - sum(shares), *shares])
        told["others"] = [[other.content_sha256, share] for (other, _), share in zip(others, shares, strict=True)]
    return live, told


def _other(spec: TeacherSpec, student: ModelBundle, tokens: TokenSet) -> tuple[Teacher, VocabularyMap | None]:
    """Return a further teacher and its map; raise RecipeError if it does not speak the student's tokens."""
    teacher = Teacher.load(spec.model, torch_device=student.model.device, offload=spec.offload, alone=False)
    try:
        mapped = map_between(teacher, student)
    except UnsupportedModel as error:
        raise RecipeError(f"distill: teacher {spec.model}: {error}") from error
    if mapped is None and encoding_sha256(teacher.tokenizer) != tokens.tokenizer_sha256:
        raise RecipeError(f"distill: teacher {spec.model}: its tokenizer is another one (ids must mean the same).")
    if teacher.anatomy.context < (window := tokens.ids.shape[1] - 1):
        raise RecipeError(f"distill: teacher {spec.model}: windows predict {window:,} tokens, its context is "
                          f"{teacher.anatomy.context:,}.")  # fmt: skip
    return teacher, mapped


def _layer_pairs(student: ModelBundle, teacher: Teacher | None, options: DistillOptions) -> tuple[tuple[int, int], ...]:
    """Return the layers that `hidden_states` matches, none if it is not in the mix."""
    matched = [loss for loss in options.losses if loss.name == "hidden_states"]
    if not matched or teacher is None:
        return ()
    return matched[0].layers or layer_pairs(student.anatomy.layers, teacher.anatomy.layers)


def _train(
    model: Any,
    objective: Objective,
    tokens: TokenSet,
    options: DistillOptions,
    folder: Path | None,
    on_step: Callable[[TrainLine], None] | None,
    identity: dict[str, Any],
    probe: Probe | None,
    order: LearnedOrder | None,
) -> TrainResult:
    return train(model, objective, tokens, options.training, folder=folder, on_step=on_step, identity=identity,
                 evaluate=probe, order=order)  # fmt: skip


def _check(
    student: ModelBundle, teacher: Teacher | None, tokens: TokenSet, options: DistillOptions
) -> VocabularyMap | None:
    """Return the map to the teacher's vocabulary, None where there is one vocabulary.

    Raises RecipeError with every reason why this student cannot learn from this teacher on these tokens.
    """
    tokens.require("train")
    wrong, mapped = [], None
    if student.quantized:
        wrong.append("the student is quantized (distill first, then quantize)")
    if teacher is None and options.cache is None:
        wrong.append("there is no teacher (give one, or a logit cache)")
    if tokens.mixture is not None and options.cache is not None:
        wrong.append("data.learn_weights_every with a logit cache (needed: a live teacher; what is read next is not "
                     "known when a cache is written)")  # fmt: skip
    try:
        mapped = None if teacher is None else map_between(teacher, student)
    except UnsupportedModel as error:
        wrong.append(str(error).removesuffix("."))
    names = {"student": student.tokenizer}
    if teacher is not None and mapped is None:
        names["teacher"] = teacher.tokenizer
    hashes = {name: encoding_sha256(tokenizer) for name, tokenizer in names.items()} | {"data": tokens.tokenizer_sha256}
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} {sha[:12]}" for name, sha in hashes.items())
        wrong.append(f"the tokenizers differ: {told} (token ids must mean the same to all of them)")
    for name, model, side in (("student", student, 0), ("teacher", teacher, 1)):
        layers = 0 if model is None else model.anatomy.layers
        past = [pair[side] for pair in _layer_pairs(student, teacher, options) if pair[side] > layers]
        if past:
            wrong.append(f"hidden_states matches the {name}'s layers {past}, it has {layers}")
    if options.on_policy is not None and options.on_policy.writer == "teacher":
        if mapped is not None:
            wrong.append("on_policy: the teacher writes tokens that the student lacks (let the student write)")
        if teacher is not None and teacher.offloaded:
            wrong.append("on_policy: an offloaded teacher would read all of its weights for every token it writes "
                         "(let the student write, or load the teacher whole)")  # fmt: skip
    window = tokens.ids.shape[1] - 1
    contexts = {"student": student.anatomy.context}
    if teacher is not None:
        contexts["teacher"] = teacher.anatomy.context
    wrong += [f"windows predict {window:,} tokens, the {name}'s context is {context:,} (set data.context={context})"
              for name, context in contexts.items() if context < window]  # fmt: skip
    if wrong:
        raise RecipeError(f"distill: {'; '.join(wrong)}.")
    return mapped


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
