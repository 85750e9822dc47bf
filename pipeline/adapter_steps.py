"""The steps of a recipe that leave the model as it is and train adapters on it: recover, and adapt for each task.

An adapter belongs to the exact base it was trained on, so both run for every variant. `recover` follows the model as it
was before it was quantized; every task adapter starts from what it gives, unless the recipe says otherwise. Each result
is read back from its folder and measured as it is stored, by the run's own meter: `before` is the base (for a task,
with the recovery adapter if it starts there), `after` the base with the adapter, whose bytes count.

    steps/NN-recover[-VARIANT]/recovery/       steps/NN-adapt[-VARIANT]-TASK/TASK/
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dwindle import adapters
from dwindle.adapters import Adapter, AdaptStepOptions, RecoverOptions, TaskRecords
from dwindle.bundle import ModelBundle
from dwindle.measure import Meter
from dwindle.pipeline.recipe import Recipe, StepSpec
from dwindle.pipeline.run_folder import RunFolder
from dwindle.pipeline.run_texts import RunTexts
from dwindle.pipeline.stage import RECOVERY, Stage, StoredAdapter
from dwindle.pipeline.summary import step_line
from dwindle.report import Measurement, Skipped, StepRecord
from dwindle.storage import hash_folder

__all__ = ["ADAPTER_STEPS", "AdapterSteps", "require_trainable"]

ADAPTER_STEPS = ("recover", "adapt")
_LOG = logging.getLogger("dwindle")

Make = Callable[[Path, Path], StepRecord]
"""(folder for checkpoints, folder to write the adapter to) -> its record."""


@dataclass
class AdapterSteps:
    """Trains the adapters of a run, or takes over those that are unchanged."""

    folder: RunFolder
    texts: RunTexts
    torch_device: str
    key: Callable[..., str]
    """(step, variant, options, inputs, rooms ...) -> the key that a result is stored under."""
    notify: Callable[[str], None]
    _known: dict[tuple[str, str], Measurement] = field(default_factory=dict, init=False)
    """What was measured in this run, by the hashes of base and adapter: each task begins where recovery ended."""

    def run(self, index: int, step: StepSpec, options: Any, end: Stage, unquantized: Stage) -> list[StepRecord]:
        """Give `end` the adapters of one step; return a record for each."""
        number = index + 1
        if step.name == "recover":
            inputs = {"model": end.sha256, "unquantized": unquantized.sha256}
            place = self.folder.step_folder(number, step.name, end.variant)
            return [self._stored("recover", RECOVERY, end, place, options, inputs,
                                 lambda work, to: self._recover(options, end, unquantized, work, to))]  # fmt: skip
        start = end.adapters.get(RECOVERY) if options.from_recovery else None
        return [self._task(number, options, adapters.read_task(task, options.seed), end, start)
                for task in options.tasks]  # fmt: skip

    def _task(
        self, number: int, options: AdaptStepOptions, records: TaskRecords, end: Stage, start: StoredAdapter | None
    ) -> StepRecord:
        name = records.options.name
        inputs = {"model": end.sha256, "start": None if start is None else start.sha256, "records": records.sha256}
        place = self.folder.step_folder(number, "adapt", f"{end.variant}-{name}" if end.variant else name)
        return self._stored("adapt", name, end, place, (options.each, records.options), inputs,
                            lambda work, to: self._adapt(options, records, end, start, work, to))  # fmt: skip

    def _stored(
        self, step: str, name: str, end: Stage, place: Path, options: Any, inputs: Mapping[str, Any], make: Make
    ) -> StepRecord:
        label = (step if step == "recover" else f"{step} {name}") + (f" ({end.variant})" if end.variant else "")
        key = self.key(step, end.variant, options, inputs, "adapters")
        entry = self.folder.cached(place, key)
        self.notify(f"{label}: {'running' if entry is None else 'unchanged, taken over'}")
        if entry is None:
            work = self.folder.work_folder(key)

            def fill(partial: Path) -> dict[str, Any]:
                record = make(work, partial / name)
                whole = replace(record, variant=end.variant, skipped=record.skipped + _regression(record))
                return {"record": whole.to_json(), "sha256": hash_folder(partial / name)}

            entry = self.folder.store(place, key, fill)
            shutil.rmtree(work, ignore_errors=True)
            self.folder.log("adapter", name=name, step=step, variant=end.variant, key=key)
        record = StepRecord.from_json(entry["record"])
        self.notify(f"{label}: {step_line(record)}")
        end.adapters[name] = StoredAdapter(place / name, entry["sha256"])
        return record

    def _recover(self, options: RecoverOptions, end: Stage, unquantized: Stage, work: Path, place: Path) -> StepRecord:
        base, teacher = end.loaded(self.torch_device), unquantized.loaded(self.torch_device)
        data = self.texts.of(base)[0]
        made, record = adapters.recover(base, options, teacher=teacher, train_tokens=data.train, folder=work)
        made, _, _ = adapters.measured(made, record, base, Meter(data.evaluation, teacher))
        made.save(place)
        details = {**record.details, "unquantized": unquantized.measurement.to_json(), "gap": dict(made.card.metrics)}
        return replace(record, before=end.measurement, after=self._measured(end, Adapter.load(place)), details=details)

    def _adapt(self, options: AdaptStepOptions, records: TaskRecords, end: Stage, start: StoredAdapter | None,
               work: Path, place: Path) -> StepRecord:  # fmt: skip
        base = end.loaded(self.torch_device)
        data = self.texts.of(base)[0]
        begun = None if start is None else Adapter.load(start.path)
        made, record = adapters.adapt(base, options.each, records=records, start=begun, general=data.train, folder=work)
        metrics = {**made.card.metrics, "general_kl": adapters.general_kl(made, base, data.evaluation, begun)}
        replace(made, card=replace(made.card, metrics=metrics)).save(place)
        before = end.measurement if begun is None else self._measured(end, begun)
        details = {**record.details, "metrics_after": metrics}
        return replace(record, before=before, after=self._measured(end, Adapter.load(place)), details=details)

    def _measured(self, end: Stage, adapter: Adapter) -> Measurement:
        """Return size and quality of a model with an adapter on it; the same pair is measured once."""
        if (known := self._known.get((end.sha256, adapter.sha256))) is not None:
            return known
        base = end.loaded(self.torch_device)
        quality, size = self.texts.of(base)[1].measure(adapter.on(base)), adapters.adapted_size(base, adapter)
        whole = replace(quality, parameters=size.parameters, bytes=size.bytes, bits_per_weight=size.bits_per_weight,
                        bits_per_weight_linear=size.bits_per_weight_linear)  # fmt: skip
        return self._known.setdefault((end.sha256, adapter.sha256), whole)


def require_trainable(recipe: Recipe, teacher: ModelBundle) -> None:
    """Raise, before anything is trained, for targets that the model lacks and for tasks with bad records."""
    for index, step in enumerate(recipe.steps):
        if step.name in ADAPTER_STEPS:
            options = recipe.options[index, None]
            adapters.target_names(teacher, options.targets, options.rank)
            for task in getattr(options, "tasks", ()):
                adapters.tokenised(teacher, adapters.read_task(task, options.seed))


def _regression(record: StepRecord) -> tuple[Skipped, ...]:
    """Return a line for the report if recovery left the model further from the teacher than it found it."""
    before, after = record.before.kl_nats_per_token, record.after.kl_nats_per_token
    if record.name != "recover" or before is None or after is None or after <= before:
        return ()
    told = f"KL to the teacher rose from {before:.4f} to {after:.4f}; train on more tokens, or with another rate"
    _LOG.warning("recover made the model worse: %s", told)
    return (Skipped("an improvement by recover", told),)
