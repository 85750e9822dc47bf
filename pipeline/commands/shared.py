"""Flags that mean the same everywhere, and how a command speaks: results on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from dwindle.errors import RecipeError
from dwindle.pipeline.option_values import fill

__all__ = [
    "data_option",
    "device_option",
    "emit",
    "json_option",
    "made_options",
    "model_option",
    "notify",
    "output_option",
    "seed_option",
    "teacher_option",
]

F = TypeVar("F", bound=Callable[..., Any])

model_option = click.option("-m", "--model", required=True, help="Model folder or Hugging Face id.")
teacher_option = click.option("-t", "--teacher", required=True, help="Teacher: folder or Hugging Face id.")
output_option = click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write.")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
device_option = click.option("--torch-device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")


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
