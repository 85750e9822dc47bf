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


_PARTS = {"ffn": "ffn_keep", "heads": "heads_keep", "width": "width_keep", "layers": "layers_keep"}


@click.command()
@model_option
@output_option
@click.option("--keep", multiple=True, metavar="PART=SHARE", help="Share to keep of ffn, heads, width or layers, as "
              "in ffn=0.5; may be given several times.")  # fmt: skip
@click.option("--parameters", help="Cut FFN units, heads and layers down to so many parameters, as in 3B.")
@click.option("--bytes", "byte_limit", help="The same in bytes of weights as stored, as in 1.5GB.")
@click.option("--plan", "plan_file", type=click.Path(), help="Apply this plan instead of making one.")
@click.option("--method", help="activation, taylor, fisher (these need -d) or magnitude.  [default: activation]")
@click.option("--depth-method", help="block_influence or leave_one_out.  [default: block_influence]")
@click.option("--rotate/--no-rotate", default=None, help="Cut the width along its principal axes.  [default: where the "
              "family allows it]")  # fmt: skip
@click.option("--no-compensate", is_flag=True, help="Do not refit what reads the cut to what stays.")
@data_option("Text the importance is measured on, and what is left refitted on.", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan as JSON; write nothing.")
@seed_option
@device_option
@json_option
def prune(model: str, output: str, keep: tuple[str, ...], byte_limit: str | None, plan_file: str | None,
          no_compensate: bool, data: tuple[str, ...], dry_run: bool, seed: int, torch_device: str, as_json: bool,
          **values: Any) -> None:  # fmt: skip
    """Cut FFN units, heads, width or layers out of a model and write a smaller, stock checkpoint.

    The plan is shown per layer: what it had, what it keeps, and how much of the score that is.
    """
    from dwindle import prune as room
    from dwindle.data import DataOptions, calibration_set
    from dwindle.prune.plan_table import plan_table

    budgeted = byte_limit is not None or values["parameters"] is not None
    if (bool(keep) or budgeted) == bool(plan_file):
        raise RecipeError("prune: give either --keep ffn=SHARE (or --parameters, --bytes) or --plan FILE.")
    values.update(_shares(keep), bytes=byte_limit, compensate=False if no_compensate else None)
    options = made_options(room.PruneOptions, values, "prune")
    given = room.KeepPlan.from_json(_read_json(plan_file)) if plan_file else None
    bundle = load(model, torch_device)
    calibration = None
    if data:
        calibration = calibration_set(DataOptions(train=data, seed=seed), bundle.tokenizer, bundle.anatomy.context)
    made = given or room.plan(bundle, options, calibration)
    click.echo(plan_table(made), err=True)
    if dry_run:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    pruned, record = room.run(bundle, options, calibration, keep_plan=made)
    save(pruned, record, output, as_json)


def _shares(keep: tuple[str, ...]) -> dict[str, str]:
    """Return the options that --keep names; raise RecipeError for anything but PART=SHARE."""
    values = {}
    for item in keep:
        part, _, share = item.partition("=")
        if part not in _PARTS or not share or _PARTS[part] in values:
            raise RecipeError(
                f"--keep {item}: needed, each once, ffn=SHARE, heads=SHARE, width=SHARE or layers=SHARE. "
                "Example: --keep ffn=0.5"
            )
        values[_PARTS[part]] = share
    return values


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
