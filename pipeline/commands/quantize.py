"""`dwindle quantize`: bits to a target, the plan shown before it is applied, large checkpoints block by block."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dwindle.errors import RecipeError
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
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
    tell_written,
)

__all__ = ["quantize"]


@click.command()
@model_option
@output_option
@click.option("--scheme", required=True, help="palettize (Core ML, Core AI) or integer (ONNX Runtime and both).")
@click.option("--bits", help="Bits of every weight in the linears.  [default: 4]")
@click.option("--target-bits-per-weight", help="Mixed bits instead: at most so many on average, tables included.")
@click.option("--target-bytes", help="Mixed bits instead: at most so many for the whole model, as in 1.2GB.")
@click.option("--target", metavar="DEVICE", help="Mixed bits instead: what an app may use on this device.")
@data_option("Calibration text. Without any, the weights alone decide.", required=False)
@click.option("--method", help="kmeans, lnq, learned, qat; rtn, hqq, gptq, awq, learned, qat.  [default: lnq or gptq "
              "with -d, kmeans or rtn without]")  # fmt: skip
@click.option("--group-size", help="Rows that share a palette, or inputs that share a scale.  [default: 16 or 32]")
@click.option("--keep-float", multiple=True, metavar="PATTERN", help="Layers left in float, as in '*.down_proj'.")
@click.option("--for", "runtimes", multiple=True, metavar="RUNTIME",
              help="coreml, coreai, coreai-engine or onnx must be able to carry it; refused early if not.")  # fmt: skip
@click.option("--plan", "plan_file", type=click.Path(), help="Apply this plan (from --dry-run, edited or not).")
@click.option("--dry-run", is_flag=True, help="Show the plan on stderr, print it as JSON; write nothing.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Any other key of a recipe's quantize step, as in embedding_bits=4, or of its data, as in "
              "data.calibration_windows=32.")  # fmt: skip
@seed_option
@device_option
@memory_option
@json_option
def quantize(model: str, output: str, data: tuple[str, ...], target: str | None, plan_file: str | None,
             dry_run: bool, settings: tuple[str, ...], seed: int, torch_device: str, as_json: bool,
             **values: Any) -> None:  # fmt: skip
    """Quantize a model's weights; the packed result loads through transformers after `import dwindle`.

    \b
    3.5 bits per weight on average, the best bits for every layer, calibrated on a text:
      dwindle quantize -m MODEL -o OUT --scheme palettize --target-bits-per-weight 3.5 -d TEXT
    4-bit integers for ONNX Runtime:
      dwindle quantize -m MODEL -o OUT --scheme integer --bits 4 -d TEXT --for onnx
    See the plan, edit it, apply it:
      dwindle quantize ... --dry-run > bits.json
      dwindle quantize ... --plan bits.json

    The plan (bits of every layer) is shown before it is applied. docs/quantization.md says which scheme and method to
    choose. Checkpoints of 500M parameters and more are worked on block by block.
    """
    from dwindle import quantize as room
    from dwindle.quantize.folder_step import needs_whole_model
    from dwindle.quantize.methods import require_calibration, require_effect
    from dwindle.weight_source import STREAMED_PARAMETERS, WeightSource

    own, of_data = split_settings(settings, values)
    options = made_options(room.QuantizeOptions, {**values, "seed": seed, **own}, "quantize")
    if values["bits"] is not None and (options.mixed or target is not None):
        raise RecipeError(
            "quantize: --bits is for all layers alike, a target chooses each layer's. Give one of the two."
        )
    if not dry_run:
        model_place(output, model, plan_file)
    method = options.method_used(bool(data))
    require_calibration(options, method, bool(data))
    require_effect(options, method)
    source = WeightSource(_folder(model))
    if target is not None:
        options = _for_device(options, target, source.anatomy)
    parameters = source.parameters
    texts = _Texts(data, {"seed": seed, **of_data}, source) if data else None
    calibration = None if texts is None else texts.calibration()
    if parameters >= STREAMED_PARAMETERS and not needs_whole_model(options):
        notify(f"{parameters:,} parameters: working block by block")
        plan = _plan(plan_file, source, options) or room.plan_folder(model, options, calibration, torch_device)
        if _shown(plan, dry_run):
            return
        record = room.run_folder(model, output, options, calibration, plan=plan, device=torch_device)
        tell_written(record, output, as_json)
        return
    bundle = load(model, torch_device)
    plan = _plan(plan_file, source, options) or room.plan(bundle, options, calibration)
    if _shown(plan, dry_run):
        return
    train = None if texts is None or options.method != "qat" else texts.training()
    quantized, record = room.run(bundle, options, calibration, train=train, plan=plan)
    save(quantized, record, output, as_json)


def _folder(model: str) -> Path:
    from dwindle.model_source import find_folder

    return find_folder(model)[0]


class _Texts:
    """The token sets of the data given."""

    def __init__(self, data: tuple[str, ...], values: Mapping[str, Any], source: Any) -> None:
        from dwindle.data import DataOptions

        self._options = made_options(DataOptions, {"train": data, **values}, "data")
        self._tokenizer, self._context = source.tokenizer(), source.anatomy.context

    def calibration(self) -> Any:
        from dwindle.data import calibration_set

        return calibration_set(self._options, self._tokenizer, self._context)

    def training(self) -> Any:
        from dwindle.data import training_set

        return training_set(self._options, self._tokenizer, self._context)


def _for_device(options: Any, target: str, anatomy: Any) -> Any:
    """Return the options with the device's budget, runtimes and bits."""
    from dwindle.devices import load_profile
    from dwindle.quantize.device_target import device_target

    if options.mixed:
        raise RecipeError("quantize: --target sets a size itself. Give it, or a number of bits or bytes, not both.")
    found = device_target(load_profile(target), anatomy, options)
    for line in found.explanation:
        notify(line)
    return dataclasses.replace(
        options, target_bytes=found.target_bytes, runtimes=found.runtimes, allowed_bits=found.allowed_bits
    )


def _plan(plan_file: str | None, source: Any, options: Any) -> Any:
    """Return the plan in a file, held to this model, or None."""
    if plan_file is None:
        return None
    from dwindle.quantize.bit_plan import BitPlan
    from dwindle.quantize.layer_plan import ModelShapes, plan_layers

    known = ModelShapes.stored(source)
    base = plan_layers(known, options)
    return BitPlan.read(Path(plan_file), base, known.shapes, set(known.anatomy.linear_names()))


def _shown(plan: Any, dry_run: bool) -> bool:
    """Show the plan; return True if that is all that was asked for."""
    click.echo(plan.table(), err=True)
    if dry_run:
        click.echo(json.dumps(plan.to_json(), indent=2, allow_nan=False))
    return dry_run
