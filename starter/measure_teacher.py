"""Measures a teacher on the test split, as JSON: the numbers in README.md come from here and nowhere else.

    python -m dwindle.starter.measure_teacher -m starter/teacher

Text quality is the product's own `Meter` on test documents; task accuracy is greedy decoding on test stories.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dwindle.bundle import ModelBundle
from dwindle.data.document import Document
from dwindle.data.packing import joined_text, pack_evaluation
from dwindle.measure import Meter
from dwindle.starter import TEACHER
from dwindle.starter.evaluate_tasks import held_out_tasks, task_accuracy
from dwindle.starter.story_world import SPLITS
from dwindle.starter.tasks import KINDS, corpus

__all__ = ["OPENINGS", "measure_teacher"]

OPENINGS = ("Once there was a brave fox named", "One day Tom lost his", "There was a race on the beach.")
_SAMPLE_TOKENS = 150


def measure_teacher(folder: Path, documents: int = 500, stories: int = 300) -> dict[str, Any]:
    """Return size, text quality, task accuracy by kind with the number of tasks, and greedy samples.

    Args:
        folder: A model folder with its tokenizer.
        documents: Test documents for nats/token and bits/byte.
        stories: Test stories asked one task of each kind.
    """
    bundle = ModelBundle.load(folder)
    texts = [Document(text, "story world, test split") for text in corpus(0, documents, "test")]
    measured = Meter(pack_evaluation(joined_text(texts), texts, bundle.tokenizer)).measure(bundle)
    seeds = SPLITS["test"][:stories]
    asked = held_out_tasks(seeds)
    accuracy = task_accuracy(bundle.model, bundle.tokenizer, seeds)
    return {
        "parameters": measured.parameters,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "nats_per_token": measured.nats_per_token,
        "bits_per_byte": measured.bits_per_byte,
        "task_accuracy": {kind: round(value, 4) for kind, value in accuracy.items()},
        "tasks": {kind: sum(task.kind == kind for task in asked) for kind in KINDS},
        "samples": [_continued(bundle, opening) for opening in OPENINGS],
    }


def _continued(bundle: ModelBundle, opening: str) -> str:
    """Return the opening with its greedy continuation."""
    ids = bundle.tokenizer(opening, return_tensors="pt")
    out = bundle.model.generate(
        **{name: ids[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=_SAMPLE_TOKENS, do_sample=False
    )
    return str(bundle.tokenizer.decode(out[0], skip_special_tokens=True))


@click.command(context_settings={"show_default": True})
@click.option("-m", "--model", type=click.Path(exists=True, path_type=Path), default=TEACHER, help="Model folder.")
@click.option("--documents", type=click.IntRange(1), default=500, help="Test documents for nats/token.")
@click.option("--stories", type=click.IntRange(1), default=300, help="Test stories for task accuracy.")
def main(model: Path, documents: int, stories: int) -> None:
    """Print the measurements of a teacher as JSON."""
    click.echo(json.dumps(measure_teacher(model, documents, stories), indent=2))


if __name__ == "__main__":
    main()
