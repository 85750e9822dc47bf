"""Commands on adapters: recover what quantization lost; look at the folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dwindle.errors import GateFailed, OutputError
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    memory_option,
    model_option,
    model_place,
    notify,
    output_option,
    save,
    seed_option,
    split_settings,
    writes,
)
from dwindle.storage import beside

__all__ = ["adapters", "recover"]


@click.command()
@click.option("-t", "--teacher", required=True, help="The model before it was quantized: folder or Hugging Face id.")
@model_option
@data_option("Text to recover on: files, folders or data set ids. No labels are needed.")
@output_option
@click.option("--rank", help="Rank of the change of each linear.  [default: 16]")
@click.option("--kind", help="lora, rslora or dora.  [default: lora]")
@click.option("--start", help="zero, or the largest part of what quantization changed; error: in the weights; "
              "outputs: in what they give out on the text; fisher: in the predictions.  [default: fisher]")  # fmt: skip
@click.option("--target", "targets", multiple=True, metavar="PART", help="q, k, v, o, gate, up, down or a module's "
              "name; may be given several times.  [default: all]")  # fmt: skip
@click.option("--tokens", help="Tokens to train on, as in 2M.  [default: the text once]")
@click.option("--learning-rate", help="Peak learning rate.  [default: 2e-4; small models take more]")
@click.option("--batch-size", help="Windows per step.  [default: 32]")
@click.option("--text", type=click.Path(), help="Text to measure before and after on; not part of -d.")
@seed_option
@device_option
@memory_option
@json_option
def recover(teacher: str, model: str, data: tuple[str, ...], output: str, text: str | None, torch_device: str,
            as_json: bool, **values: Any) -> None:  # fmt: skip
    """Train an adapter on a quantized model that gives back what quantization lost.

    The codes stay as they are. TEACHER is the model before it was quantized. Cut off, it goes on from its last
    checkpoint.
    """
    from dwindle import adapters as room
    from dwindle.adapter_card import require_adapter_place
    from dwindle.data import DataOptions, evaluation_set, training_set
    from dwindle.measure import Meter
    from dwindle.token_set import require_disjoint

    options = made_options(room.RecoverOptions, values, "recover")
    place = Path(output)
    require_adapter_place(place)
    guide, base = load(teacher, torch_device), load(model, torch_device)
    train = training_set(DataOptions(train=data, seed=options.seed), base.tokenizer, base.anatomy.context)
    evaluation = None if text is None else evaluation_set(text, base.tokenizer)
    meter = None if evaluation is None else Meter(evaluation, guide)
    require_disjoint(*(one for one in (train, evaluation) if one is not None))
    work = beside(place, "work")
    adapter, record = room.recover(base, options, teacher=guide, train_tokens=train, folder=work)
    lines = [f"recover: {record.details['linears']} linears, rank {options.rank}, {adapter.bytes:,} bytes, "
             f"{record.before.bits_per_weight:.2f} -> {record.after.bits_per_weight:.2f} bits per weight"]  # fmt: skip
    if meter is not None:
        notify("measuring before and after")
        adapter, record, told = room.measured(adapter, record, base, meter)
        lines += told
    if not writes():
        return
    adapter.save(place)
    shutil.rmtree(work, ignore_errors=True)
    emit(record.to_json(), "\n".join([*lines, f"Written: {output}"]), as_json)


@click.group()
def adapters() -> None:
    """List, show and compare adapter folders, merge one into its base, package one, make traces to train on."""


@adapters.command("list")
@click.argument("folder", type=click.Path())
@click.option("-m", "--model", help="Say which of them fit this base.")
@json_option
def list_(folder: str, model: str | None, as_json: bool) -> None:
    """Show the adapters in FOLDER: task, size, rank, base, metrics."""
    from dwindle.adapters.catalogue import catalogue, catalogue_table

    base = None if model is None else load(model).content_sha256
    found = catalogue(Path(folder), base)
    emit({"adapters": found}, catalogue_table(found), as_json)


@adapters.command()
@click.argument("folder", type=click.Path())
@click.option("--for", "artefacts", multiple=True, required=True, type=click.Path(), metavar="ARTEFACT",
              help="Exported folder that the adapter is to run in; repeat for one of another format.")  # fmt: skip
@click.option("-m", "--model", help="The base: executes the adapter and compares it. A DoRA adapter needs it.")
@output_option
@json_option
def package(folder: str, artefacts: tuple[str, ...], model: str | None, output: str, as_json: bool) -> None:
    """Write what a runtime needs of one adapter, for a base that was exported earlier and stays as it is.

    ARTEFACT has to be ready for adapters: exported with --adapter, or with --set adapter_inputs=lora.
    """
    from dwindle.export import package_adapter

    base = None if model is None else load(model)
    found = package_adapter(Path(folder), [Path(place) for place in artefacts], Path(output), base)
    lines, missed = [], False
    for kind, row in found["runtimes"].items():
        parity = row.get("parity")
        verdict = "loaded, not compared (give -m)" if parity is None else "passed" if parity["passed"] else "FAILED"
        detail = "" if parity is None else f" (max |logit error| {parity['max_abs_logit_error']:.1e})"
        lines.append(f"{kind}: {row['file']}, {row['bytes']:,} bytes, parity {verdict}{detail}")
        missed |= parity is not None and not parity["passed"]
    emit(found, "\n".join([*lines, f"Written: {output}"]), as_json)
    if missed:
        raise GateFailed("adapters package: the adapter does not compute what it was trained to; do not ship it.")


@adapters.command()
@click.argument("folder", type=click.Path())
@json_option
def show(folder: str, as_json: bool) -> None:
    """Show one adapter: what it was trained on, for what, and how well it does."""
    from dwindle.adapters.catalogue import described

    found = described(Path(folder))
    lines = [f"{key:16} {value}" for key, value in found.items() if value not in (None, {}, "")]
    emit(found, "\n".join(lines), as_json)


@adapters.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@click.option("-m", "--model", help="Say which of them fit this base.")
@json_option
def compare(folders: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Set adapters side by side: task, base, rank, bytes, metrics. FOLDERS hold one or many each."""
    from dwindle.adapters.catalogue import comparison, comparison_table

    base = None if model is None else load(model).content_sha256
    found = comparison([Path(folder) for folder in folders], base)
    emit({"adapters": found}, comparison_table(found), as_json)


@adapters.command()
@click.argument("folder", type=click.Path())
@model_option
@output_option
@click.option("--requantize", is_flag=True, help="The base is quantized: round the changed linears again, each to the "
              "format that it had. That loses a part of what the adapter was trained for.")  # fmt: skip
@click.option("--keep-dtype", is_flag=True, help="Store in the base's own type, which rounds once more.  "
              "[default: float32, exact]")  # fmt: skip
@click.option(
    "--text", type=click.Path(), help="Text to measure on how far the merged model is from base plus adapter."
)
@memory_option
@json_option
def merge(folder: str, model: str, output: str, requantize: bool, keep_dtype: bool, text: str | None,
          as_json: bool) -> None:  # fmt: skip
    """Fold the adapter in FOLDER into its base: exactly into a float model, by rounding again into a quantized one."""
    from dwindle import adapters as room
    from dwindle.data import evaluation_set
    from dwindle.low_rank import changed
    from dwindle.measure import Meter
    from dwindle.quantize.recode import recoded

    model_place(output, model, folder)
    base = load(model)
    merged, record = room.merge(base, folder, exact=not keep_dtype, recode=recoded if requantize else None)
    if text is not None:
        notify("measuring base plus adapter, and the merged model")
        meter = Meter(evaluation_set(text, base.tokenizer), base)
        with changed(base, room.read_adapter(Path(folder))):
            record = replace(record, before=meter.measure(base), after=meter.measure(merged))
    save(merged, record, output, as_json)
    if text is not None and not as_json:
        click.echo(f"  KL(base plus adapter || merged) {record.after.kl_nats_per_token:.3g} nats/token")


@adapters.command()
@click.option("-t", "--teacher", required=True, help="The model that makes the attempts: folder or Hugging Face id.")
@data_option("Records with right answers: as for `dwindle adapt`.")
@click.option("-o", "--output", required=True, type=click.Path(), help="File to write (.jsonl).")
@click.option("--prompt", help="Column of the prompt, or a template.  [default: prompt]")
@click.option("--completion", help="Column or template of the right answer.  [default: completion]")
@click.option("--checker", help="What an attempt must pass: arithmetic, contains, python, regex:PATTERN, script:FILE "
              "...  [default: arithmetic]")  # fmt: skip
@click.option("--samples", help="Attempts at each record, at most.  [default: 4]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="temperature, answer_tokens; or a key of "
              "the task, as in task.template=plain.")  # fmt: skip
@seed_option
@device_option
@memory_option
@json_option
def traces(teacher: str, output: str, data: tuple[str, ...], prompt: str | None, completion: str | None,
           settings: tuple[str, ...], torch_device: str, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Let a model try records until a checker passes, and write its short and its whole solutions.

    The file is data for `dwindle adapt`, which trains on both: --set task.traces=trace.
    """
    from dwindle import adapters as room
    from dwindle.adapters.traces import TraceOptions, solved
    from dwindle.storage import write_text

    if Path(output).is_dir():
        raise OutputError(f"{output} is a folder; traces are one file. Name a .jsonl file.")
    of_task = {"data": data, "prompt": prompt, "completion": completion}
    given = {**values, **{f"task.{name}": value for name, value in of_task.items()}}
    own, task = split_settings(settings, given, "task")
    options = made_options(TraceOptions, {**values, **own}, "traces")
    schema = made_options(room.TaskOptions, {"name": "traces", **of_task, **task}, "task")
    whole = room.read_task(schema, options.seed)
    records = [*whole.train, *whole.held_out]
    found = list(solved(load(teacher, torch_device), records, schema, options))
    rows = [row for row in found if row is not None]
    if not rows:
        raise GateFailed(f"traces: no attempt at {len(records):,} records passed {options.checker}; nothing was "
                         "written. Take a better teacher, more samples, or another checker.")  # fmt: skip
    write_text(Path(output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first = sum(row["attempts"] == 1 for row in rows)
    result = {"records": len(records), "solved": len(rows), "at_the_first_attempt": first, "output": output}
    emit(result, f"traces: {len(rows):,} of {len(records):,} records solved, {first:,} at the first attempt\n"
         f"Written: {output}", as_json)  # fmt: skip
