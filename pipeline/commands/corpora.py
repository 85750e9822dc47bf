"""`dwindle data build` and `dwindle data show`: a corpus from a recipe, and its card."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dwindle.pipeline.commands.shared import emit, json_option, memory_option, notify, output_option

__all__ = ["build", "show"]


@click.command()
@click.argument("recipe", type=click.Path())
@output_option
@click.option("-m", "--model", help="Student whose tokenizer counts tokens for the card: folder or Hugging Face id.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe, as in "
              "folders.assets=DIR, sources.NAME.weight=2 or quality.least_words=20.")  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes; the result is the "
              "same for any number.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check the recipe and say what would be done.")
@memory_option
@json_option
def build(recipe: str, output: str, model: str | None, settings: tuple[str, ...], workers: int, dry_run: bool,
          as_json: bool) -> None:  # fmt: skip
    """Read the sources of RECIPE, curate them, and write a corpus with splits and a data card.

    RECIPE is a YAML file such as this one; recipes/corpus.yaml and docs/data.md have all keys.

    \b
    version: 1
    sources:
      - {name: mine, place: texts/, licence: MIT}
      - {name: rows, place: faq.jsonl, text: "{question} {answer}"}
    steps: [normalization, exact_duplicates, quality, code_quality, near_duplicates, personal_data]
    """
    from dwindle.data.curation.build import build_corpus
    from dwindle.data.curation.card_text import card_summary
    from dwindle.pipeline.corpus_recipe import load_corpus_recipe

    options = load_corpus_recipe(recipe, settings)
    if dry_run:
        plan = {"sources": [one.name for one in options.sources], "steps": [stage.name for stage in options.stages],
                "format": options.format, "output": output}  # fmt: skip
        text = f"sources: {', '.join(plan['sources'])}\nsteps: {', '.join(plan['steps'])}\nwould write: {output}"
        emit(plan, text, as_json)
        return
    tokenizer = None
    if model is not None:
        from dwindle.model_source import find_folder, load_config
        from dwindle.tokenizer_files import load_tokenizer

        notify(f"loading the tokenizer of {model}")
        place = find_folder(model)[0]
        tokenizer = load_tokenizer(place, trust_remote_code=False, vocab=load_config(place).vocab_size)
    card = build_corpus(options, Path(output), workers=workers, tokenizer=tokenizer, notify=notify)
    emit(card, f"{card_summary(card)}\nWritten: {output}", as_json)


@click.command()
@click.argument("corpus", type=click.Path())
@json_option
def show(corpus: str, as_json: bool) -> None:
    """Show the data card of CORPUS: a folder that `data build` or `data synthesize` wrote."""
    from dwindle.data.corpus_folder import read_manifest
    from dwindle.data.curation.card_text import card_summary
    from dwindle.data.synthesis.output import synthesis_summary
    from dwindle.errors import DataError

    folder = Path(corpus)
    synthetic = (folder / "synthetic.jsonl").is_file()
    if not synthetic and read_manifest(folder) is None:
        raise DataError(f"{corpus}: no corpus (corpus.json or synthetic.jsonl was looked for). Build one with dwindle "
                        "data build.")  # fmt: skip
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'card.json'}: the card cannot be read ({error}). Make the folder again.") from error
    emit(card, synthesis_summary(card) if synthetic else card_summary(card), as_json)
