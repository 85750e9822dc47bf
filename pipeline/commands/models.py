"""Commands on one model: prune, evaluate. Each is a thin door to one function."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    memory_option,
    model_option,
    model_place,
    notify,
    output_option,
    save,
    seed_option,
    tell_written,
)
from dwindle.storage import beside, read_json

__all__ = ["evaluate", "prune"]


_PARTS = {"ffn": "ffn_keep", "heads": "heads_keep", "width": "width_keep", "layers": "layers_keep",
          "experts": "experts_keep", "expert_width": "expert_width_keep", "vocabulary": "vocabulary_keep"}  # fmt: skip


@click.command()
@model_option
@output_option
@click.option("--keep", multiple=True, metavar="PART=SHARE", help="Share to keep of ffn, heads, width, layers, "
              "experts, expert_width or vocabulary, as in ffn=0.5; may be given several times.")  # fmt: skip
@click.option("--vocabulary-size", help="Keep at most so many tokens, those that the text of -d holds most often.")
@click.option("--parameters", help="Cut FFN units, heads, layers and experts down to so many parameters, as in 3B.")
@click.option("--bytes", "byte_limit", help="The same in bytes of weights as stored, as in 1.5GB.")
@click.option("--plan", "plan_file", type=click.Path(), help="Apply this plan instead of making one.")
@click.option("--method", help="activation, taylor, fisher (these need -d), magnitude, or soft_top_k: masks of units "
              "and heads, trained on the text of -d.  [default: fisher for FFN units, else activation]")  # fmt: skip
@click.option("--masks", multiple=True, metavar="KEY=VALUE", help="How soft_top_k trains its masks, as in tokens=2M or "
              "weight_rate=3e-4; may be given several times.")  # fmt: skip
@click.option("--depth-method", help="block_influence or leave_one_out.  [default: block_influence]")
@click.option("--rotate/--no-rotate", default=None, help="Cut the width along its principal axes.  [default: where the "
              "family allows it]")  # fmt: skip
@click.option("--no-compensate", is_flag=True, help="Do not refit what reads the cut to what stays.")
@data_option("Text the importance is measured on, what is left refitted on, and tokens counted in.", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan as JSON; write nothing.")
@seed_option
@device_option
@memory_option
@json_option
def prune(model: str, output: str, keep: tuple[str, ...], byte_limit: str | None, plan_file: str | None,
          masks: tuple[str, ...], no_compensate: bool, data: tuple[str, ...], dry_run: bool, seed: int,
          torch_device: str, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Cut FFN units, heads, width, layers or tokens out of a model and write a smaller, stock checkpoint.

    The plan is shown per layer: what it had, what it keeps, and how much of the score that is. Checkpoints of 500M
    parameters and more are worked on layer by layer, unless the method needs the whole model in memory.
    """
    from dwindle import prune as room
    from dwindle.data import DataOptions, calibration_set, training_set, training_texts
    from dwindle.prune.folder_bundle import FolderBundle
    from dwindle.prune.plan_table import plan_table

    sized = byte_limit is not None or values["parameters"] is not None or values["vocabulary_size"] is not None
    if (bool(keep) or sized) == bool(plan_file):
        raise RecipeError("prune: give either --keep ffn=SHARE (or --parameters, --bytes) or --plan FILE.")
    if plan_file:
        _refuse_choices(masks, values)
    values.update(_shares(keep), bytes=byte_limit, compensate=False if no_compensate else None)
    values["masks"] = {"seed": seed} | _mask_settings(masks)
    options = made_options(room.PruneOptions, values, "prune")
    given = room.KeepPlan.from_json(_read_json(plan_file)) if plan_file else None
    if not dry_run:
        model_place(output, model, plan_file)
    bundle = _to_prune(model, options, torch_device)
    calibration = None
    if data:
        calibration = calibration_set(DataOptions(train=data, seed=seed), bundle.tokenizer, bundle.anatomy.context)
    corpora = training_texts(DataOptions(train=data)) if data else None
    train = None
    if data and options.method == "soft_top_k" and given is None:
        train = training_set(DataOptions(train=data, seed=seed), bundle.tokenizer, bundle.anatomy.context)
        if not dry_run:
            _prune_by_masks(bundle, options, calibration, train, corpora, output, as_json)
            return
    made = given or room.plan(bundle, options, calibration, train, corpora=corpora)
    click.echo(plan_table(made), err=True)
    if dry_run:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    if isinstance(bundle, FolderBundle):
        tell_written(room.run_folder(bundle, output, options, calibration, keep_plan=made), output, as_json)
        return
    pruned, record = room.run(bundle, options, calibration, keep_plan=made)
    save(pruned, record, output, as_json)


def _prune_by_masks(bundle: Any, options: Any, calibration: Any, train: Any, corpora: Any, output: str,
                    as_json: bool) -> None:  # fmt: skip
    """Train masks, cut, show the plan and write. Cut off, the training goes on from its last checkpoint."""
    import shutil

    from dwindle import prune as room
    from dwindle.prune.plan_table import plan_table

    place = Path(output)
    work = beside(place, "work")
    pruned, record = room.run(bundle, options, calibration, train=train, corpora=corpora, folder=work)
    click.echo(plan_table(room.KeepPlan.from_json(record.details["plan"])), err=True)
    save(pruned, record, output, as_json)
    shutil.rmtree(work, ignore_errors=True)


def _refuse_choices(masks: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Raise RecipeError, naming all, for flags by which a plan is made: with --plan they would say nothing."""
    chosen = {"--method": values["method"], "--masks": masks, "--depth-method": values["depth_method"],
              "--rotate/--no-rotate": values["rotate"]}  # fmt: skip
    if said := [flag for flag, value in chosen.items() if value not in (None, ())]:
        raise RecipeError(f"prune: {', '.join(said)} beside --plan, which says what stays. Leave one of them out.")


def _mask_settings(masks: tuple[str, ...]) -> dict[str, Any]:
    """Return the options that --masks names; raise RecipeError for anything but KEY=VALUE."""
    values = {}
    for item in masks:
        key, _, value = item.partition("=")
        if not key or not value or key in values:
            raise RecipeError(f"--masks {item}: needed KEY=VALUE, each key once. Example: --masks tokens=2M")
        values[key] = value
    return values


def _to_prune(model: str, options: Any, torch_device: str) -> Any:
    """Return the bundle of a folder or id, in memory or, from `STREAMED_PARAMETERS` on, to be read layer by layer."""
    import math

    from dwindle.anatomy import anatomy_of
    from dwindle.checkpoint_files import inspect_checkpoint
    from dwindle.model_source import find_folder, load_config
    from dwindle.prune.folder_bundle import FolderBundle
    from dwindle.prune.folder_step import needs_whole_model
    from dwindle.weight_source import STREAMED_PARAMETERS

    folder = find_folder(model)[0]
    config = load_config(folder)
    weights = sum(math.prod(tensor.shape) for tensor in inspect_checkpoint(folder).tensors.values())
    if weights < STREAMED_PARAMETERS:
        return load(model, torch_device)
    if whole := needs_whole_model(options, anatomy_of(config)):
        notify(f"{weights:,} weights, all of them in memory: {' and '.join(whole)} needs the whole model")
        return load(model, torch_device)
    notify(f"{weights:,} weights: working layer by layer")
    return FolderBundle.open(model, torch_device)


def _shares(keep: tuple[str, ...]) -> dict[str, str]:
    """Return the options that --keep names; raise RecipeError for anything but PART=SHARE."""
    values = {}
    for item in keep:
        part, _, share = item.partition("=")
        if part not in _PARTS or not share or _PARTS[part] in values:
            raise RecipeError(
                f"--keep {item}: needed, each once, {', '.join(f'{name}=SHARE' for name in _PARTS)}. "
                "Example: --keep ffn=0.5"
            )
        values[_PARTS[part]] = share
    return values


def _read_json(path: str) -> Any:
    try:
        return read_json(Path(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error


@click.command()
@model_option
@click.option("--text", required=True, type=click.Path(), help="Text to measure on.")
@click.option("--reference", "-t", help="Teacher for KL and agreement: folder or id.")
@click.option("--tokens", help="Measure the first so many tokens only.")
@click.option("--context", help="Window length.  [default: the model's context]")
@device_option
@memory_option
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
