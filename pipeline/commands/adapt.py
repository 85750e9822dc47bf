"""`dwindle adapt`: one adapter for one task, on a base that stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    memory_option,
    model_option,
    notify,
    output_option,
    seed_option,
    split_settings,
    writes,
)
from dwindle.storage import beside

__all__ = ["adapt", "task_lines"]


@click.command()
@model_option
@data_option(
    "Records of the task: .jsonl, .json, .csv, .parquet, a data set's folder or id; PLACE::KEY takes one split."
)
@output_option
@click.option("--from", "start", type=click.Path(), help="Adapter to start from: the recovery adapter of this base.")
@click.option("--objective", type=click.Choice(["sft", "dpo"]), help="sft learns answers, dpo preferences.  [default: "
              "dpo where --chosen is given, else sft]")  # fmt: skip
@click.option("--prompt", help="Column of the prompt, or a template: '{instruction} {input}'.  [default: prompt]")
@click.option("--completion", help="Column or template of the answer.  [default: completion]")
@click.option("--label", help="Column of a label, in the place of an answer.")
@click.option("--chosen", help="Column or template of the better answer.")
@click.option("--rejected", help="Column or template of the worse answer.")
@click.option("--held-out", multiple=True, help="Held-out records.  [default: a tenth of the prompts]")
@click.option("--general", help="General text, replayed among the records against forgetting.")
@click.option("--text", type=click.Path(), help="General text to measure on what the base lost; not part of --general.")
@click.option("--rank", help="Rank of the change of each linear.  [default: 16]")
@click.option("--epochs", help="How often the records are gone through.  [default: 3]")
@click.option("--learning-rate", help="Peak learning rate.  [default: sft 2e-4, dpo 5e-6; small models take more]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key of a recipe's adapt step, "
              "as in kind=dora, or of its task, as in task.template=plain.")  # fmt: skip
@seed_option
@device_option
@memory_option
@json_option
def adapt(model: str, output: str, start: str | None, general: str | None, text: str | None, settings: tuple[str, ...],
          torch_device: str, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Train an adapter that teaches a model one task. The model stays as it is, codes and all.

    Bad records are errors, all told at once. Cut off, it goes on from its last checkpoint; the state with the lowest
    held-out loss is what is written.

    \b
    dwindle adapt -m MODEL -d qa.jsonl -o ADAPTER --prompt question --completion answer --from RECOVERY
    dwindle adapt -m MODEL -d intents.csv -o ADAPTER --prompt text --label category
    dwindle adapt -m MODEL -d pairs.json -o ADAPTER --prompt '{instruction} {input}' --chosen chosen --rejected rejected
    """
    from dwindle import adapters as room
    from dwindle.adapter_card import require_adapter_place
    from dwindle.data import DataOptions, evaluation_set, training_set
    from dwindle.token_set import require_disjoint

    options, task = _options(output, settings, values)
    place = Path(output)
    require_adapter_place(place)
    records = room.read_task(task, options.seed)
    base = load(model, torch_device)
    begun = None if start is None else room.Adapter.load(start)
    replayed = measured = None
    if general is not None:
        replayed = training_set(DataOptions(train=(general,), seed=options.seed), base.tokenizer, base.anatomy.context)
    if text is not None:
        measured = evaluation_set(text, base.tokenizer)
    require_disjoint(*(one for one in (replayed, measured) if one is not None))
    work = beside(place, "work")
    adapter, record = room.adapt(base, options, records=records, start=begun, general=replayed, folder=work)
    if measured is not None:
        notify("measuring what the base lost")
        adapter, record = room.with_forgetting(adapter, record, base, measured, begun)
    if not writes():
        return
    adapter.save(place)
    shutil.rmtree(work, ignore_errors=True)
    skipped = [f"Not done: {s.what}: {s.why}" for s in record.skipped]
    emit(record.to_json(), "\n".join([*task_lines(record.details), *skipped, f"Written: {output}"]), as_json)


def task_lines(details: Mapping[str, Any]) -> list[str]:
    """Return what a task adapter's record tells a person."""
    best = details["best_step"]
    lines = [
        f"adapt: {details['task']}, {details['objective']}, {details['records']:,} records, rank {details['rank']}, "
        f"{details['adapter_bytes']:,} bytes, held-out loss {details['held_out_losses'][str(best)]:.4f} at step {best}"
    ]
    before, after = details["metrics_before"], details["metrics_after"]
    for name, value in after.items():
        was = f"{before[name]:.4f} -> " if name in before else ""
        lines.append(f"  {name:24} {was}{value:.4f}")
    return lines


def _options(output: str, settings: tuple[str, ...], values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the options of training and of the task that flags and settings give."""
    from dwindle import adapters as room

    parts = ("data", "prompt", "completion", "label", "chosen", "rejected", "held_out")
    of_task = {name: values[name] for name in parts}
    of_training = {name: value for name, value in values.items() if name not in parts}
    given = {**of_training, **{f"task.{name}": value for name, value in of_task.items()}}
    own, task = split_settings(settings, given, "task")
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(output).name).lstrip("._-")
    schema = made_options(room.TaskOptions, {"name": name or "task", **of_task, **task}, "task")
    options = made_options(room.AdaptOptions, {**of_training, **own}, "adapt")
    if values["learning_rate"] is not None and options.objective_of(schema) == "dpo":
        of_training["dpo_learning_rate"] = of_training.pop("learning_rate")
        options = made_options(room.AdaptOptions, {**of_training, **own}, "adapt")
    return options, schema
