"""Commands on one model: prune, distill, evaluate. Each is a thin door to one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dwindle.errors import DataError, RecipeError
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    model_option,
    notify,
    output_option,
    save,
    seed_option,
    teacher_option,
)

__all__ = ["distill", "evaluate", "prune"]


@click.command()
@model_option
@output_option
@click.option("--keep", multiple=True, metavar="PART=SHARE", help="Share to keep, as in ffn=0.5.")
@click.option("--plan", "plan_file", type=click.Path(), help="Apply this plan instead of making one.")
@click.option("--method", help="activation (needs -d) or magnitude.  [default: activation]")
@data_option("Text the importance is measured on.", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan as JSON; write nothing.")
@seed_option
@device_option
@json_option
def prune(model: str, output: str, keep: tuple[str, ...], plan_file: str | None, method: str | None,
          data: tuple[str, ...], dry_run: bool, seed: int, torch_device: str, as_json: bool) -> None:  # fmt: skip
    """Cut FFN units out of a model by their importance and write a smaller, stock checkpoint."""
    from dwindle import prune as room
    from dwindle.data import DataOptions, calibration_set

    if bool(keep) == bool(plan_file):
        raise RecipeError("prune: give either --keep ffn=SHARE or --plan FILE.")
    values: dict[str, Any] = {"method": method}
    for item in keep:
        part, _, share = item.partition("=")
        if part != "ffn" or not share:
            raise RecipeError(f"--keep {item}: found no ffn=SHARE. Example: --keep ffn=0.5")
        values["ffn_keep"] = share
    options = made_options(room.PruneOptions, values, "prune")
    given = room.KeepPlan.from_json(_read_json(plan_file)) if plan_file else None
    bundle = load(model, torch_device)
    calibration = None
    if data:
        calibration = calibration_set(DataOptions(train=data, seed=seed), bundle.tokenizer, bundle.anatomy.context)
    made = given or room.plan(bundle, options, calibration)
    if dry_run:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    pruned, record = room.run(bundle, options, keep_plan=made)
    save(pruned, record, output, as_json)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error


@click.command()
@teacher_option
@model_option
@data_option("Training text: files, folders or data set ids.")
@output_option
@click.option("--loss", "losses", multiple=True, metavar="NAME[=WEIGHT]", help="forward_kl, top1_blend=0.9, ...")
@click.option("--tokens", help="Tokens to train on, as in 20M.")
@click.option("--learning-rate", help="Peak learning rate.")
@click.option("--batch-size", help="Windows per step.")
@seed_option
@device_option
@json_option
def distill(
    teacher: str, model: str, data: tuple[str, ...], output: str, torch_device: str, as_json: bool, **values: Any
) -> None:  # fmt: skip
    """Train a student to follow its teacher. Cut off, it goes on from its last checkpoint."""
    import shutil

    from dwindle import distill as room
    from dwindle.data import DataOptions, training_set

    options = made_options(room.DistillOptions, values, "distill")
    guide, student = load(teacher, torch_device), load(model, torch_device)
    train = training_set(DataOptions(train=data, seed=options.seed), student.tokenizer, student.anatomy.context)
    place = Path(output)
    work = place.with_name(f".{place.name}.work")
    trained, record = room.run(student, options, teacher=guide, train=train, folder=work)
    save(trained, record, output, as_json)
    shutil.rmtree(work, ignore_errors=True)


@click.command()
@model_option
@click.option("--text", required=True, type=click.Path(), help="Text to measure on.")
@click.option("--reference", "-t", help="Teacher for KL and agreement: folder or id.")
@click.option("--tokens", help="Measure the first so many tokens only.")
@click.option("--context", help="Window length.  [default: the model's context]")
@device_option
@json_option
def evaluate(model: str, text: str, reference: str | None, tokens: str | None, context: str | None, torch_device: str,
             as_json: bool) -> None:  # fmt: skip
    """Measure a model folder or an exported artifact: nats/token, bits/byte, KL and agreement with a reference.

    Prints the keys of `after` in report.json; the same text gives the same numbers as the run's report.
    """
    from dwindle.pipeline.evaluate import evaluate as measured
    from dwindle.pipeline.option_values import parse_count

    try:
        limit = None if tokens is None else int(parse_count(tokens))
        window = None if context is None else int(parse_count(context))
    except ValueError as error:
        raise RecipeError(f"evaluate: {error}") from error
    notify(f"measuring {model} on {text}")
    result = measured(model, text, reference=reference, max_tokens=limit, context=window, torch_device=torch_device)
    lines = [f"{key:24} {value}" for key, value in result.to_json().items() if value is not None]
    emit(result.to_json(), "\n".join(lines), as_json)
