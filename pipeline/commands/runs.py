"""Commands on whole runs: run, demo, report, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dwindle.pipeline.commands.shared import device_option, emit, json_option, memory_option, notify, output_option

__all__ = ["compare", "demo", "report", "run"]


def _finish(report: Any, folder: Path, as_json: bool) -> int:
    from dwindle.pipeline.summary import summary

    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        click.echo(summary(report))
        click.echo(f"\nReport: {folder / 'report.html'}")
    for line in report.failures:
        click.echo(f"FAILED {line}", err=True)
    return int(report.exit_code)


@click.command()
@click.argument("recipe", type=click.Path())
@output_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key; dotted, YAML values.")
@click.option("--seed", type=int, help="Seed of every random choice.  [default: the recipe's]")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan; run nothing.")
@device_option
@memory_option
@json_option
def run(
    recipe: str,
    output: str,
    settings: tuple[str, ...],
    seed: int | None,
    dry_run: bool,
    torch_device: str,
    as_json: bool,
) -> int:
    """Run RECIPE into a folder: every step cached, resumable, measured and reported.

    \b
    dwindle run recipes/stories260k.yaml -o out --set teacher.model=FOLDER --set 'data.train=[a.txt]'

    A second run re-does only what changed; a killed run goes on where it stopped. Exit code 1 means that a gate
    failed (parity, budget): the report says which.
    """
    from dwindle.pipeline.recipe import Recipe

    parsed = Recipe.load(recipe, settings if seed is None else (*settings, f"seed={seed}"))
    if dry_run:
        from dwindle.pipeline.plan import plan

        shown = plan(parsed)
        emit(shown, "\n".join(shown["lines"]), as_json)
        return 0
    from dwindle.pipeline.runner import run as run_recipe

    return _finish(run_recipe(parsed, Path(output), torch_device=torch_device, notify=notify), Path(output), as_json)


@click.command()
@click.option("-o", "--output", default="dwindle-demo", show_default=True, type=click.Path(), help="Run folder.")
@memory_option
@json_option
def demo(output: str, as_json: bool) -> int:
    """Run the whole line on the embedded teacher: prune, distill, quantize, export, check, report.

    Takes a few minutes on two processor cores and downloads nothing.
    """
    from dwindle.pipeline.demo import run_demo

    return _finish(run_demo(Path(output), notify=notify), Path(output), as_json)


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path())
@click.option("--html", is_flag=True, help="Write report.html again from report.json.")
@click.option("--markdown", is_flag=True, help="Print Markdown for a pull request.")
@click.option("--plots", type=click.Path(), metavar="DIR", help="Write every chart as SVG, and as PNG with the extra "
              "plots.")  # fmt: skip
@json_option
def report(folder: str, html: bool, markdown: bool, plots: str | None, as_json: bool) -> int:
    """Show the report of RUN, with what was measured since (bench --profile); the exit code is that of its verdicts.

    A run made by an older version opens too; what it did not record is left out. report.html is written again where
    measurements changed a verdict; report.json stays the record of the run.
    """
    from dwindle.errors import OutputError
    from dwindle.pipeline.measured_report import measured_report
    from dwindle.pipeline.write_reports import read_report, rewrite_html

    recorded = read_report(Path(folder))
    found = measured_report(recorded, Path(folder))
    try:
        if html or found is not recorded:
            rewrite_html(found, Path(folder))
    except OutputError as error:
        if html:
            raise
        notify(f"report.html stays as it was: {error}")
    if plots is not None:
        from dwindle.pipeline.plot_files import write_plots

        written, missing = write_plots(found, Path(plots))
        for line in [str(path) for path in written] + ([missing] if missing else []):
            notify(line)
    if markdown and not as_json:
        from dwindle.pipeline.run_markdown import report_markdown

        click.echo(report_markdown(found, str(found.inputs.get("recipe") or Path(folder).name)), nl=False)
        return int(found.exit_code)
    return _finish(found, Path(folder), as_json)


@click.command()
@click.argument("folders", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path())
@click.option("--max-regression", metavar="PERCENT", help="Fail if a result is worse than the first run's by more, as "
              "in 2%.")  # fmt: skip
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Judge this one, as in tokens_per_second; "
              "repeat.  [default: sizes, quality and every metric of a target]")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Show what is the same in all, too.")
@click.option("--markdown", is_flag=True, help="Markdown for a pull request: what changed, and what regressed.")
@click.option("--html", type=click.Path(), metavar="FILE", help="Also write the comparison as a page.")
@json_option
def compare(folders: tuple[str, ...], max_regression: str | None, metrics: tuple[str, ...], everything: bool,
            markdown: bool, html: str | None, as_json: bool) -> int:  # fmt: skip
    """Set two or more runs side by side: what was asked for, and what came of it.

    With --max-regression, exit 1 if a run is worse than the first by more than that.
    """
    from dwindle.pipeline.compare import compare_runs, parse_percent
    from dwindle.pipeline.comparison_text import comparison_markdown, comparison_text
    from dwindle.pipeline.write_reports import read_runs

    share = None if max_regression is None else parse_percent(max_regression)
    runs = read_runs([Path(folder) for folder in folders])
    result = compare_runs(runs, share, metrics)
    if html is not None:
        from dwindle.pipeline.comparison_page import comparison_page
        from dwindle.storage import write_text

        write_text(Path(html), comparison_page(result, runs))
        notify(f"written: {html}")
    text = comparison_markdown(result) if markdown else comparison_text(result, everything=everything)
    emit(result.to_json(), text, as_json)
    for line in result.failures:
        click.echo(f"FAILED {line}", err=True)
    return result.exit_code
