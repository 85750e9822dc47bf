"""`dwindle reproduce RUN`: the same recipe once more, and what differs."""

from __future__ import annotations

from pathlib import Path

import click

from dwindle.pipeline.commands.shared import emit, json_option, memory_option, notify

__all__ = ["reproduce"]


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Folder for the second run.  [default: RUN-reproduced]")
@memory_option
@json_option
def reproduce(folder: str, output: str | None, as_json: bool) -> int:
    """Run RUN's recipe again into a fresh folder and compare; exit 1 with a list if anything differs.

    Compares the hashes of inputs, of every step's model and of every artifact, and every number of the report but
    times and measurements. Run it from the folder that the run was started from: paths in a recipe are as written.
    """
    from dwindle.pipeline.reproduce import reproduce as run_again

    run = Path(folder)
    again = Path(output) if output else run.absolute().with_name(f"{run.absolute().name}-reproduced")
    found = run_again(run, again, notify=notify)
    emit(found.to_json(), found.text(), as_json)
    return 0 if found.equal else 1
