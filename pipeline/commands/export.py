"""`dwindle export`: decoders to ONNX, Core ML, Core AI, encoders to ONNX; executed and compared before it is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from dwindle.errors import DataError, GateFailed, RecipeError
from dwindle.pipeline.commands.shared import (
    data_option,
    emit,
    json_option,
    load,
    made_options,
    memory_option,
    model_option,
    notify,
    output_option,
)

__all__ = ["export"]


@click.command()
@model_option
@output_option
@click.option("--format", "formats", multiple=True, required=True, help="onnx, coreml or coreai; repeat for several.")
@click.option("--context-length", help="Longest sequence the artifact takes.  [default: the model's]")
@click.option("--shapes", help="Core ML, Core AI: dynamic (any length) or static (for the Neural Engine).  [default: "
              "dynamic]")  # fmt: skip
@click.option("--kv-cache", help="ONNX: float32, float16 or int8 between steps.  [default: float32]")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(), metavar="DIR",
              help="Adapter of this very model, to be swapped in at run time; repeat for several.")  # fmt: skip
@click.option("--bits", help="Encoders only: 8 or 4 bits.  [default: float]")
@data_option("Text the check's prompts come from.  [default: a built-in one]", required=False, multiple=False)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Any other key of a recipe's export step, as in decode_steps=128.")  # fmt: skip
@memory_option
@json_option
def export(model: str, output: str, data: str | None, adapters: tuple[str, ...], bits: str | None,
           settings: tuple[str, ...], as_json: bool, **values: Any) -> None:  # fmt: skip
    """Export a float or quantized model, execute the result and compare it with the model: exit 1 on a miss.

    \b
    4-bit integers for ONNX Runtime, palettes for Core ML and Core AI (quantize first):
      dwindle export -m INTEGERS -o OUT --format onnx
      dwindle export -m PALETTES -o OUT --format coreml --format coreai
    For the Neural Engine, prefill and decode as functions of fixed shape:
      dwindle export -m PALETTES -o OUT --format coreml --shapes static --context-length 2048
    A sentence encoder or classifier, by optimum:
      dwindle export -m ENCODER -o OUT --format onnx --bits 8

    Each OUT/FORMAT is complete for an app: model, tokenizer, manifest, and a README with the lines that run it.
    """
    from dwindle.export.encoder_source import is_decoder
    from dwindle.model_source import find_folder
    from dwindle.pipeline.recipe import parse_overrides

    own = {".".join(keys): value for keys, value in parse_overrides(settings)}
    given = {key: value for key, value in values.items() if value not in (None, ())}
    twice = [f"--set {key}" for key in own if key in given]
    if twice:
        raise RecipeError(f"{', '.join(twice)}: a flag gives it already. Give one of the two.")
    folder = find_folder(model)[0]
    if is_decoder(folder):
        artifacts = _decoder(model, output, data, bits, adapters, {**given, **own})
    elif adapters:
        raise RecipeError(f"--adapter {', '.join(adapters)}: {folder} is no decoder; adapters go with decoders only.")
    else:
        artifacts = [_encoder(folder, output, data, {**given, **own} | ({} if bits is None else {"bits": bits}))]
    emit({"artifacts": [dataclasses.asdict(a) for a in artifacts]}, "\n".join(map(_told, artifacts)), as_json)
    if any(a.parity is not None and not a.parity.passed for a in artifacts):
        raise GateFailed("export: the artifact does not equal the model it was made from; do not ship it.")


def _decoder(model: str, output: str, data: str | None, bits: str | None, adapters: tuple[str, ...],
             values: dict[str, Any]) -> list[Any]:  # fmt: skip
    from dwindle import export as room
    from dwindle.data import evaluation_set
    from dwindle.export.options import FORMATS_OF

    if bits is not None:
        raise RecipeError(f"--bits {bits}: {model} is a decoder; run `dwindle quantize` on it first, then export that.")
    options = made_options(room.ExportOptions, values, "export")
    idle = [f"{key}={values[key]} is of {' and '.join(FORMATS_OF[key])}"
            for key in values if key in FORMATS_OF and not set(FORMATS_OF[key]) & set(options.formats)]  # fmt: skip
    if idle:
        raise RecipeError(f"export: {'; '.join(idle)}, not of {' or '.join(options.formats)}. Leave it out, or name "
                          "another --format.")  # fmt: skip
    bundle = load(model)
    evaluation = None if data is None else evaluation_set(data, bundle.tokenizer)
    return room.run(bundle, options, Path(output), evaluation=evaluation, adapters=list(map(Path, adapters)))


def _encoder(folder: Path, output: str, data: str | None, values: dict[str, Any]) -> Any:
    from dwindle.export.encoders import EncoderOptions, export_encoder

    formats = values.pop("formats", ())
    if tuple(formats) != ("onnx",):
        raise RecipeError(f"--format {', '.join(formats)}: {folder} is no decoder; such models are exported to onnx.")
    if data is not None:
        try:
            lines = Path(data).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{data}: no text can be read from it ({error}). Name a file of one text a line."
            ) from error
        values["texts"] = tuple(line for line in lines if line.strip())[:16]
    notify(f"tracing {folder}")
    return export_encoder(folder, Path(output), made_options(EncoderOptions, values, "export"))


def _told(artifact: Any) -> str:
    parity = artifact.parity
    verdict = "not checked" if parity is None else "passed" if parity.passed else "FAILED"
    detail = "" if parity is None else f" (max |logit error| {parity.max_abs_logit_error:.1e}, " \
        f"{parity.tokens_checked} tokens, by {parity.executed_by})"  # fmt: skip
    missing = "".join(f"\n  not executed: {one['what']}: {one['why']}."
                      for one in artifact.details.get("not_executed", ()))  # fmt: skip
    return f"{artifact.format}: {artifact.path}, {artifact.bytes:,} bytes, parity {verdict}{detail}{missing}"
