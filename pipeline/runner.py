"""Run a recipe: every step from its cached or fresh input, measured as it was stored, told in one report.

Each step's model is saved first, loaded back and then measured, so a number in the report is a number of the
checkpoint on disk and `dwindle evaluate` gives it again. After `quantize` with variants, the line has several ends;
an export takes the first variant that its runtime can carry.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwindle import devices, distill, export, prune, quantize
from dwindle.bundle import ModelBundle
from dwindle.clock import StepClock
from dwindle.model_source import find_folder
from dwindle.pipeline.adapter_steps import ADAPTER_STEPS, AdapterSteps, require_trainable
from dwindle.pipeline.environment import environment
from dwindle.pipeline.export_plan import ExportPlan, planned_exports
from dwindle.pipeline.plan import require_carried, require_stages, require_targets
from dwindle.pipeline.recipe import Recipe, StepSpec
from dwindle.pipeline.run_folder import RunFolder
from dwindle.pipeline.run_texts import RunTexts
from dwindle.pipeline.samples import collect_samples, prompts_of
from dwindle.pipeline.stage import Stage
from dwindle.pipeline.step_keys import code_sha256, plain, profile_sha256
from dwindle.pipeline.summary import artifact_line, step_line
from dwindle.pipeline.write_reports import write_reports
from dwindle.report import Artifact, Measurement, Report, Sample, Skipped, StepRecord, TargetVerdict
from dwindle.storage import hash_folder, hash_json, require_space

__all__ = ["run"]

_LOG = logging.getLogger("dwindle")
Notify = Callable[[str], None]


_ROOMS = {"correct_teacher": "distill"}
"""Where the code of a step lies, if not in the room of its name."""


def run(recipe: Recipe, output: Path | str, *, torch_device: str = "cpu", notify: Notify | None = None) -> Report:
    """Run `recipe` into the folder `output` and return its report (also written there).

    Finished steps whose key is unchanged are taken over; a training that was cut off goes on from its last
    checkpoint. Gates that fail stand in the report (`exit_code` 1), errors of the user raise DwindleError.
    """
    folder = RunFolder(Path(output))
    with folder.locked({"teacher": recipe.teacher}):
        line = _Line(recipe, folder, torch_device, notify or (lambda message: None))
        return line.run()


class _Line:
    """The state of one run: the teacher, the data, the ends of the line, the report so far."""

    def __init__(self, recipe: Recipe, folder: RunFolder, torch_device: str, notify: Notify) -> None:
        self.recipe, self.folder, self.device, self.notify = recipe, folder, torch_device, notify
        self.exports = planned_exports(recipe)
        require_targets(recipe)
        notify(f"teacher: {recipe.teacher}")
        self.teacher = ModelBundle.load(
            recipe.teacher, trust_remote_code=recipe.trust_remote_code, torch_device=torch_device
        )
        self.teacher_sha256 = self.teacher.content_sha256  # of all its weights: taken once
        require_carried(recipe, self.teacher.anatomy)
        require_stages(recipe, self.teacher.anatomy)
        self._check_space()
        self.texts = RunTexts(recipe.data, self.teacher, notify)
        self.texts.write_held_out(self.folder.path / "data" / "evaluation.txt")
        require_trainable(recipe, self.teacher)
        self.adapter_steps = AdapterSteps(folder, self.texts, torch_device, self._key, self.notify)
        self.report = Report(
            environment=environment(torch_device),
            inputs={
                "teacher": {"model": recipe.teacher, "sha256": self.teacher_sha256},
                "data": self.texts.card(),
                "seed": recipe.seed,
                "recipe": recipe.name,
            },
        )

    def _check_space(self) -> None:
        size = self.teacher.size().bytes
        require_space(self.folder.path, 4 * size * (len(self.recipe.steps) + 2))

    def run(self) -> Report:
        self.folder.log("start", recipe=self.recipe.name, data=self.texts.sha256)
        ends = [self._measured_teacher()]
        self.guide = float_end = ends[0]
        artifacts: list[tuple[Artifact, Path]] = []
        for index, step in enumerate(self.recipe.steps):
            if step.name == "export":
                artifacts = self._export(index, ends, float_end)
            elif step.name == "validate":
                self._validate(index, artifacts)
            elif step.name in ADAPTER_STEPS:
                options = self.recipe.options[index, None]
                for end in ends:
                    records = self.adapter_steps.run(index, step, options, end, float_end)
                    self.report = self.report.adding(steps=tuple(records))
            elif step.name == "correct_teacher":
                corrected = self._transform(index, step, None, self.guide)
                if ends[0].sha256 == self.guide.sha256:  # nothing was cut yet: the line goes on from it
                    ends, float_end = [corrected], corrected
                self.guide = corrected
            else:
                ends = [self._transform(index, step, variant, end) for end in ends for variant in step.variants]
                if step.name != "quantize":
                    float_end = ends[0]
        self._add_samples(ends)
        self._forget_stale_steps(ends)
        self.folder.forget_work()
        write_reports(self.report, self.recipe, self.folder.path)
        self.folder.log("end", exit_code=self.report.exit_code)
        return self.report

    # -- steps that give a model ---------------------------------------------------------------------------------

    def _key(self, name: str, variant: str | None, options: Any, inputs: Mapping[str, Any], *rooms: str) -> str:
        return hash_json(
            {
                "step": name,
                "variant": variant,
                "options": plain(options),
                "inputs": dict(inputs),
                "data": self.texts.sha256,
                "teacher": self.teacher_sha256,
                "seed": self.recipe.seed,
                "device": self.device.split(":")[0],
                "code": code_sha256("data", *rooms),
            }
        )

    def _measured_teacher(self) -> Stage:
        place = self.folder.step_folder(0, "teacher", None)
        key = self._key("teacher", None, {}, {})
        entry = self.folder.cached(place, key)
        if entry is None:
            self.notify("teacher: measuring")
            measured = self.texts.of(self.teacher)[1].measure(self.teacher)
            entry = self.folder.store(place, key, lambda _: {"measurement": measured.to_json()})
        return Stage(None, self.teacher_sha256, Measurement(**entry["measurement"]), bundle=self.teacher)

    def _transform(self, index: int, step: StepSpec, variant: str | None, source: Stage) -> Stage:
        options = self.recipe.options[index, variant]
        label = step.name + (f" ({variant})" if variant else "")
        place = self.folder.step_folder(index + 1, step.name, variant)
        inputs = {"model": source.sha256}
        if step.name == "distill":
            inputs["guide"] = self.guide.sha256
            for other in options.other_teachers:
                inputs[f"teacher {other.model}"] = str(distill.model_files_sha256(find_folder(other.model)[0]))
            if options.data is not None:
                inputs["train"] = self.texts.of_step(options.data, self.teacher).sha256
        key = self._key(step.name, variant, options, inputs, _ROOMS.get(step.name, step.name))
        entry = self.folder.cached(place, key)
        if entry is not None:
            self.notify(f"{label}: unchanged, taken over")
        else:
            self.notify(f"{label}: running")
            entry = self._fresh(step, variant, options, source, place, key)
        record = StepRecord.from_json(entry["record"])
        self.report = self.report.adding(steps=(record,))
        self.notify(f"{label}: {step_line(record)}")
        return Stage(place / "model", entry["sha256"], record.after, variant or source.variant)

    def _fresh(
        self, step: StepSpec, variant: str | None, options: Any, source: Stage, place: Path, key: str
    ) -> dict[str, Any]:
        work = self.folder.work_folder(key)
        with StepClock() as clock:
            bundle, record = self._call(step.name, source.loaded(self.device), options, work)

        def fill(partial: Path) -> dict[str, Any]:
            bundle.save(partial / "model")
            stored = ModelBundle.load(partial / "model", torch_device=self.device)
            after = self.texts.of(stored)[1].measure(stored)
            whole = replace(
                record,
                skipped=record.skipped + _regression(step.name, source.measurement, after) + _other_tokens(record),
                variant=variant,
                before=source.measurement,
                after=after,
                seconds=clock.seconds,
                peak_rss_bytes=clock.peak_rss_bytes,
            )
            return {"sha256": stored.content_sha256, "record": whole.to_json()}

        entry = self.folder.store(place, key, fill)
        shutil.rmtree(work, ignore_errors=True)
        self.folder.log(
            "step",
            name=step.name,
            variant=variant,
            key=key,
            seconds=round(clock.seconds, 3),
            after=entry["record"]["after"],
        )
        return entry

    def _call(self, name: str, bundle: ModelBundle, options: Any, work: Path) -> tuple[ModelBundle, StepRecord]:
        data = self.texts.of(bundle)[0]
        if name == "prune":
            return prune.run(bundle, options, data.calibration, train=data.train, folder=work)
        if name == "correct_teacher":
            return distill.correct_teacher(bundle, options, train_tokens=data.train, folder=work)
        if name == "distill":
            train = data.train if options.data is None else self.texts.of_step(options.data, bundle)
            watched = None if options.evaluate_every is None else data.evaluation
            guide = self.guide.loaded(self.device)
            return distill.run(bundle, options, teacher=guide, train=train, folder=work, evaluation=watched)
        return quantize.run(bundle, options, data.calibration, train=data.train, folder=work)

    def _add_samples(self, ends: list[Stage]) -> None:
        """Add what the teacher and every end of the line write after the same beginnings."""
        stages = {end.variant or "student": end for end in ends if end.sha256 != self.teacher_sha256}
        if not stages:
            return
        place = self.folder.step_folder(0, "samples", None)
        shown = {name: [stage.sha256, stage.recovery and stage.recovery.sha256] for name, stage in stages.items()}
        key = self._key("samples", None, {}, shown)
        entry = self.folder.cached(place, key)
        if entry is None:
            self.notify("samples: teacher and students continue the same beginnings")
            models = {"teacher": self.teacher, **{name: stage.recovered(self.device) for name, stage in stages.items()}}
            try:
                made = collect_samples(models, prompts_of(self.texts.teachers.evaluation, self.teacher))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                self.report = self.report.adding(skipped=(Skipped("samples", f"a model cannot be continued: {error}"),))
                return
            entry = self.folder.store(place, key, lambda _: {"samples": [dataclasses.asdict(one) for one in made]})
        self.report = replace(self.report, samples=tuple(Sample(**one) for one in entry["samples"]))

    # -- export and validate -------------------------------------------------------------------------------------

    def _export(self, index: int, ends: list[Stage], float_end: Stage) -> list[tuple[Artifact, Path]]:
        by_variant = {end.variant: end for end in ends}
        found: list[tuple[Artifact, Path]] = []
        for plan in self.exports:
            source = float_end if plan.is_float else by_variant[plan.variant]
            place = self.folder.path / "export" / plan.folder
            record = self.folder.step_folder(index + 1, "export", plan.folder.replace("/", "-"))
            carried = source.adapters if plan.carries_adapters else {}
            inputs = {"model": source.sha256, **{f"adapter {name}": one.sha256 for name, one in carried.items()}}
            key = self._key("export", plan.folder, plan.options, inputs, "export")
            entry = self.folder.cached(record, key)
            if entry is not None and place.exists() and hash_folder(place) == entry["artifact"]["sha256"]:
                self.notify(f"export {plan.folder}: unchanged, taken over")
            else:
                self.notify(f"export {plan.folder}: running")
                folders = [one.path for one in carried.values()]
                entry = self._fresh_export(plan, source, folders, place, record, key)
            artifact = Artifact.from_json(entry["artifact"])
            missing = tuple(Skipped(f"{artifact.format}: {one['what']}", one["why"])
                            for one in artifact.details.get("not_executed", ()))  # fmt: skip
            if source.adapters and not (carried or plan.is_float):
                missing += (Skipped(f"{artifact.format}: {', '.join(source.adapters)}", "it carries no adapters"),)
            self.report = self.report.adding(artifacts=(artifact,), skipped=missing)
            self.notify(f"export {plan.folder}: {artifact_line(artifact)}")
            found.append((artifact, place))
        return found

    def _fresh_export(
        self, plan: ExportPlan, source: Stage, adapters: list[Path], place: Path, record: Path, key: str
    ) -> dict[str, Any]:
        with StepClock() as clock:
            bundle = source.loaded(self.device)
            evaluation = self.texts.of(bundle)[0].evaluation
            made = export.run(bundle, plan.options, place.parent, evaluation=evaluation, adapters=adapters)[0]
        artifact = replace(
            made,
            path=place.relative_to(self.folder.path).as_posix(),
            variant="float" if plan.is_float else plan.variant,
        )
        body = {
            "artifact": dataclasses.asdict(artifact),
            "seconds": clock.seconds,
            "peak_rss_bytes": clock.peak_rss_bytes,
        }
        self.folder.log("export", format=made.format, variant=artifact.variant, seconds=round(clock.seconds, 3))
        return self.folder.store(record, key, lambda _: body)

    def _validate(self, index: int, artifacts: list[tuple[Artifact, Path]]) -> None:
        options = self.recipe.options[index, None]
        profiles = {name: profile_sha256(name) for name in options.targets}
        kept = [m.to_json() for m in devices.read_measurements(self.folder.path) if m.profile != "host"]
        quality = [step.after.to_json() for step in self.report.steps]
        inputs = {"artifacts": {a.path: a.sha256 for a, _ in artifacts}, "profiles": profiles,
                  "measurements": hash_json(kept), "quality": hash_json(quality)}  # fmt: skip
        key = self._key("validate", None, options, inputs, "devices")
        place = self.folder.step_folder(index + 1, "validate", None)
        entry = self.folder.cached(place, key)
        if entry is None:
            self.notify("validate: estimating for the targets, measuring on this host")
            verdicts, skipped = devices.run(options, artifacts, steps=self.report.steps, folder=self.folder.path)
            entry = self.folder.store(
                place,
                key,
                lambda _: {
                    "targets": [dataclasses.asdict(v) for v in verdicts],
                    "skipped": [dataclasses.asdict(s) for s in skipped],
                },
            )
        self.report = self.report.adding(
            targets=tuple(TargetVerdict.from_json(t) for t in entry["targets"]),
            skipped=tuple(Skipped(**s) for s in entry["skipped"]),
        )

    def _forget_stale_steps(self, ends: list[Stage]) -> None:
        """Remove step folders of an earlier recipe that this run did not use: the folder tells one story."""
        steps = self.folder.path / "steps"
        used = {self.folder.step_folder(0, name, None).name for name in ("teacher", "samples")}
        used |= {adapter.path.parent.name for end in ends for adapter in end.adapters.values()}
        for index, step in enumerate(self.recipe.steps, 1):
            exported = [plan.folder.replace("/", "-") for plan in self.exports] if step.name == "export" else []
            of_step = () if step.name in ADAPTER_STEPS else exported or step.variants
            used |= {self.folder.step_folder(index, step.name, part).name for part in of_step}
        for child in steps.iterdir() if steps.exists() else ():
            if child.is_dir() and child.name not in used:
                shutil.rmtree(child)


def _other_tokens(record: StepRecord) -> tuple[Skipped, ...]:
    """Return a line for the report if a step cut the vocabulary: what is counted per token is then another thing."""
    before, after = record.details.get("vocabulary") or (0, 0)
    why = f"the vocabulary was cut from {before:,} to {after:,}, so they count other tokens; bits/byte compare"
    return (Skipped("a comparison of nats/token across prune", why),) if before != after else ()


def _regression(name: str, before: Measurement, after: Measurement) -> tuple[Skipped, ...]:
    """Return a line for the report if a training step left the model further from the teacher than it found it."""
    if name != "distill" or before.kl_nats_per_token is None or after.kl_nats_per_token is None:
        return ()
    if after.kl_nats_per_token <= before.kl_nats_per_token:
        return ()
    told = (
        f"KL to the teacher rose from {before.kl_nats_per_token:.4f} to {after.kl_nats_per_token:.4f} "
        "on the evaluation text; train on more tokens, with a lower rate, or with forward_kl"
    )
    _LOG.warning("%s made the model worse: %s", name, told)
    return (Skipped(f"an improvement by {name}", told),)
