"""`dwindle data`: corpora made, shown and written anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dwindle.errors import RecipeError
from dwindle.pipeline.commands.corpora import build, show
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    memory_option,
    seed_option,
    split_settings,
)
from dwindle.storage import beside

__all__ = ["data"]


@click.group()
def data() -> None:
    """Make corpora and show them."""


data.add_command(build)
data.add_command(show)


@data.command()
@click.option("-t", "--teacher", required=True, help="Model that writes: folder or Hugging Face id.")
@data_option("Text to start from and to be new against: files, folders or data set ids.", required=False)
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write.")
@click.option("--kind", "kinds", multiple=True, required=True, metavar="KIND",
              help="rephrase:easy|medium|hard|dialogue, questions, instructions, continue, free, free:seeded, "
              "template:FILE; several share the pieces.")  # fmt: skip
@click.option("--pieces", help="Pieces to write.  [default: 1000]")
@click.option("--check", "checks", multiple=True, metavar="CHECKER",
              help="arithmetic, python, json:SCHEMA.json, regex:PATTERN, script:FILE ...; all must pass.")  # fmt: skip
@click.option("--verifier", help="Second model, whose opinion counts.")
@click.option("--most-share", help="Largest share of synthetic text in the whole; 1 without -d.  [default: 0.5]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Any other option, as in temperature=0.8, or verifier.asks=yes_no.")  # fmt: skip
@seed_option
@device_option
@memory_option
@json_option
def synthesize(
    teacher: str, data: tuple[str, ...], output: str, verifier: str | None, settings: tuple[str, ...],
    torch_device: str, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Let a model write text, keep what passes. Cut off, it goes on behind the last batch.

    \b
    dwindle data synthesize -t TEACHER -d TEXT -o OUT --kind continue --kind rephrase:easy
    dwindle data synthesize -t TEACHER -d TEXT -o OUT --kind questions --check arithmetic --verifier MODEL
    dwindle data synthesize -t TEACHER -o OUT --kind free --most-share 1
    """
    from dwindle.data.curation.stage_count import StageCount
    from dwindle.data.sources import check_sources
    from dwindle.data.synthesis import SynthesisOptions
    from dwindle.data.synthesis.output import require_place, synthesis_summary, write_synthesis
    from dwindle.data.synthesis.step import synthesized

    own, of_data = split_settings(settings, values)
    given = {key: value for key, value in values.items() if value is not None}
    second = own.pop("verifier", {})
    if not isinstance(second, dict):
        raise RecipeError(f"--set verifier: found {second!r}, needed its keys, as in verifier.asks=yes_no.")
    if verifier is not None or second:
        given["verifier"] = {**({} if verifier is None else {"model": verifier}), **second}
    if unknown := [key for key in of_data if key != "text_column"]:
        raise RecipeError(f"--set data.{unknown[0]}: of data only data.text_column can be set here.")
    options = made_options(SynthesisOptions, {**given, **own}, "synthesis")
    column = str(of_data.get("text_column", "text"))
    check_sources(data, column)
    place = Path(output)
    require_place(place)
    writer = load(teacher, torch_device)
    judge = None if options.verifier is None else load(options.verifier.model, torch_device)
    count = StageCount("synthesize", options.seed)
    work = beside(place, "work")
    pieces = synthesized(writer, options, _Documents(data, column), folder=work, count=count, verifier=judge)
    card = write_synthesis(place, pieces, count, writer, options)
    shutil.rmtree(work, ignore_errors=True)
    emit(card, f"{synthesis_summary(card)}\nWritten: {output}", as_json)


class _Documents:
    """The documents of places, as often as they are asked for."""

    def __init__(self, places: tuple[str, ...], column: str) -> None:
        self._places, self._column = places, column

    def __iter__(self) -> Iterator[Any]:
        from dwindle.data.sources import read_documents

        for place in self._places:
            yield from read_documents(place, self._column)
