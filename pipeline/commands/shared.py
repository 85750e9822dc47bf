"""Flags that mean the same everywhere, and how a command speaks: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dwindle.errors import OutputError, RecipeError
from dwindle.pipeline.option_values import fill, parse_count

__all__ = [
    "data_option",
    "device_option",
    "emit",
    "json_option",
    "load",
    "made_options",
    "memory_option",
    "model_option",
    "model_place",
    "notify",
    "output_option",
    "put_setting",
    "save",
    "seed_option",
    "split_settings",
    "step_line",
    "tell_written",
    "writes",
]

F = TypeVar("F", bound=Callable[..., Any])

model_option = click.option("-m", "--model", required=True, help="Model folder or Hugging Face id.")
output_option = click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write.")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
device_option = click.option("--torch-device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")


def _hold_memory(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Hold the command to `--max-memory` until it ends."""
    if value is None or context.resilient_parsing:
        return
    from dwindle.memory_limit import memory_held_to

    try:
        most = parse_count(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None
    if most < 1:
        raise click.BadParameter(f"{value} is no amount of memory; give one as in 8GB.", context, parameter)
    context.with_resource(memory_held_to(int(most)))


memory_option = click.option("--max-memory", metavar="SIZE", expose_value=False, callback=_hold_memory, help="Most "
                             "memory to hold, as in 8GB: what needs more is refused, or ended.")  # fmt: skip


def data_option(help_text: str, *, required: bool = True, multiple: bool = True) -> Callable[[F], F]:
    """Return the `-d/--data` flag with a help text that says what the data is for."""
    return click.option("-d", "--data", required=required, multiple=multiple, help=help_text)


def notify(message: str) -> None:
    """Say what is being done, on stderr."""
    click.echo(click.style("> ", fg="cyan") + message, err=True)


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print one JSON object, or the text for a person."""
    click.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else text)


def made_options(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Return the option dataclass for the flags that were given; None means not given."""
    problems: list[str] = []
    made = fill(kind, {k: v for k, v in values.items() if v is not None and v != ()}, where, problems)
    if problems:
        raise RecipeError("\n".join(problems))
    return made


def load(name: str, torch_device: str = "cpu") -> Any:
    """Return the bundle of a folder or id."""
    from dwindle.bundle import ModelBundle

    notify(f"loading {name}")
    return ModelBundle.load(name, torch_device=torch_device)


def step_line(record: Any) -> str:
    """Return one line on a step: sizes before and after, and its time."""
    before, after = record.before, record.after
    linears = ""
    if after.bits_per_weight_linear not in (None, after.bits_per_weight, before.bits_per_weight_linear):
        linears = f" (the linears {after.bits_per_weight_linear:.2f})"
    return (
        f"{record.name}: {before.parameters:,} -> {after.parameters:,} parameters, "
        f"{before.bytes:,} -> {after.bytes:,} bytes, "
        f"{before.bits_per_weight:.2f} -> {after.bits_per_weight:.2f} bits per weight{linears}, {record.seconds:.1f} s"
    )


def model_place(output: str, *sources: str | None) -> Path:
    """Return the folder to write a model to.

    Raises OutputError where it holds something else than a model, or a model that is read: it would be lost.
    """
    from dwindle.bundle import require_model_place

    place = Path(output)
    read = [source for source in sources if source and Path(source).exists()]
    if lost := [source for source in read if Path(source).resolve().is_relative_to(place.resolve())]:
        raise OutputError(
            f"-o {output} would replace what is read: {', '.join(lost)}. Choose another output; nothing was written."
        )
    require_model_place(place)
    return place


def writes() -> bool:
    """Return whether this process writes: under torchrun every process has the result, and the first one writes it."""
    return int(os.environ.get("RANK", "0")) == 0


def save(bundle: Any, record: Any, output: str, as_json: bool) -> None:
    """Write the bundle and say what the step did."""
    if not writes():
        return
    bundle.save(Path(output))
    tell_written(record, output, as_json)


def tell_written(record: Any, output: str, as_json: bool) -> None:
    """Say what a step did, what it did not, and where the result is."""
    skipped = "".join(f"\nNot done: {s.what}: {s.why}" for s in record.skipped)
    emit(record.to_json(), f"{step_line(record)}{skipped}\nWritten: {output}", as_json)


def split_settings(
    settings: tuple[str, ...], values: Mapping[str, Any], part: str = "data"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `--set` gives to the step and to a part of it (`data.KEY`); what a flag gives is not given twice."""
    from dwindle.pipeline.recipe import parse_overrides

    own: dict[str, Any] = {}
    of_part: dict[str, Any] = {}
    for keys, value in parse_overrides(settings):
        name = ".".join(keys)
        for given in {name} if keys[0] == part else dict.fromkeys((name, keys[0])):
            if values.get(given) not in (None, ()):
                flag = _flag(given.removeprefix(f"{part}."))
                raise RecipeError(f"--set {name}: {flag} gives {'it' if given == name else given} already. Give one of "
                                  "the two.")  # fmt: skip
        if keys[0] == part and len(keys) > 1:
            put_setting(of_part, keys[1:], value)
        else:
            put_setting(own, keys, value)
    return own, of_part


def put_setting(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set a dotted key; raise RecipeError where another setting gave a plain value to what it is a part of.

    >>> values = {}
    >>> put_setting(values, ["cache", "folder"], "C")
    >>> put_setting(values, ["cache", "draws"], 16)
    >>> values
    {'cache': {'folder': 'C', 'draws': 16}}
    """
    node = values
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {'.'.join(keys)}: {key} is {node!r} already. Give {key} whole or by its keys.")
    node[keys[-1]] = value


def _flag(name: str) -> str:
    """Return the flag that gives an option of the command that is running."""
    context = click.get_current_context(silent=True)
    flags = [] if context is None else [one.opts[-1] for one in context.command.params if one.name == name]
    return flags[0] if flags else f"--{name.replace('_', '-')}"
