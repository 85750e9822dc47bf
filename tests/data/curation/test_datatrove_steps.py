"""Curation by datatrove's executors: the same records as on one machine, and what they cannot do is refused.

datatrove asks for another huggingface-hub than dwindle's other parts: it is run in the peers' environment, if there is
one (`.venv-peers-3`, or the Python that DWINDLE_DATATROVE_PYTHON names), or in this one where it can be imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dwindle
from dwindle.data.curation.build import build_corpus
from dwindle.data.curation.corpus_options import CorpusOptions, SourceOptions, SplitOptions
from dwindle.data.curation.datatrove_steps import executor_plan
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.normalization import Normalization
from dwindle.data.curation.rebalance import Rebalance
from dwindle.data.sources import read_documents
from dwindle.errors import DataError, RecipeError
from dwindle.pipeline.corpus_recipe import load_corpus_recipe

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "recipes" / "corpus_on_datatrove.py"
STEPS = """
steps:
  - normalization
  - quality: {least_words: 5, least_common_words: 0}
  - code_quality
  - personal_data
"""
LINE = "The {} cat of the {} house wrote to cat{}@cats.org and then it went home to the {} dog."


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    for part in range(3):
        rows = [{"text": LINE.format(part, i, i, i * 7)} for i in range(20)] + [{"text": "too short"}]
        (tmp_path / "parts" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.txt").write_text("\n<|endoftext|>\n".join(LINE.format("old", i, "x", "big") for i in range(5)))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("import os\n\ndef area(side):\n    return side * side\n")
    sources = "".join(f"\n  - {{name: {name}, place: {tmp_path / place}, licence: MIT}}"
                      for name, place in (("rows", "parts"), ("notes", "notes.txt"), ("code", "code")))  # fmt: skip
    place = tmp_path / "recipe.yaml"
    place.write_text(f"version: 1\nsources:{sources}{STEPS}splits: {{calibration: 0, evaluation: 0}}\n")
    return place


@pytest.fixture
def datatrove(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Give a Python with datatrove and an environment in which it imports this dwindle."""
    peers = ROOT / ".venv-peers-3" / "bin" / "python"
    if importlib.util.find_spec("datatrove") is not None:
        yield sys.executable, dict(os.environ)
    elif (python := os.environ.get("DWINDLE_DATATROVE_PYTHON", str(peers))) and Path(python).exists():
        package = tmp_path / "packages" / "dwindle"
        package.mkdir(parents=True)
        for place in Path(dwindle.__file__).parent.iterdir():
            (package / place.name).symlink_to(place)
        for room in ("data", "pipeline"):
            spec = importlib.util.find_spec(f"dwindle.{room}")
            assert spec is not None
            assert spec.origin is not None
            if not (package / room).exists():
                (package / room).symlink_to(Path(spec.origin).parent)
        yield python, os.environ | {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    else:
        pytest.skip("no Python with datatrove: make .venv-peers-3/.ready")


def records(files: Iterator[Path]) -> dict[str, Any]:
    found = {}
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
            found |= {row["id"]: row for row in map(json.loads, stream)}
    return found


def test_executors_give_the_records_of_one_machine(
    recipe: Path, datatrove: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    python, environment = datatrove
    command = [python, "-P", str(SCRIPT), str(recipe), "-o", str(tmp_path / "out"), "--tasks", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = load_corpus_recipe(recipe, ["format=jsonl"])
    card = build_corpus(options, tmp_path / "corpus")
    expected = records((tmp_path / "corpus" / "train").iterdir())
    assert len(expected) == 3 * 20 + 5 + 1
    assert records((tmp_path / "out" / "text").iterdir()) == expected
    counts = [json.loads(place.read_text()) for place in sorted((tmp_path / "out" / "counts" / "text").iterdir())]
    assert len(counts) == 3
    for stage, *parts in zip(card["stages"], *counts, strict=False):
        for key in ("documents_in", "documents_out", "bytes_in", "bytes_out"):
            assert stage[key] == sum(part[key] for part in parts)


def test_near_duplicates_are_found_across_tasks(
    recipe: Path, datatrove: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    words = " ".join(f"word{i}" for i in range(60))
    for part in range(3):
        with (tmp_path / "parts" / f"{part}.jsonl").open("a") as stream:
            stream.write("\n" + json.dumps({"text": f"The copy is {words}."}))
    recipe.write_text(recipe.read_text().replace("  - personal_data", "  - near_duplicates\n  - personal_data"))
    python, environment = datatrove
    command = [python, "-P", str(SCRIPT), str(recipe), "-o", str(tmp_path / "out"), "--tasks", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = records((tmp_path / "out" / "text").iterdir()).values()
    assert sum("The copy is" in row["text"] for row in kept) == 1
    assert all("@cats.org" not in row["text"] for row in kept)


def test_parts_of_a_folder_are_all_of_it_and_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    whole = [document.text for document in read_documents(str(tmp_path / "parts"), "text")]
    parts = [[d.text for d in read_documents(str(tmp_path / "parts"), "text", part=(i, 5))] for i in range(5)]
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert [len(part) for part in parts] == [21, 21, 21, 0, 0]
    alone = [list(read_documents(str(tmp_path / "notes.txt"), "text", part=(i, 2))) for i in range(2)]
    assert [len(part) for part in alone] == [5, 0]


def test_what_needs_the_whole_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    sources = (SourceOptions("a", str(tmp_path / "a.txt"), most_bytes=9),)
    options = CorpusOptions(sources, (Normalization(), ExactDuplicates(), Rebalance()), SplitOptions(0, 0))
    with pytest.raises(RecipeError, match=r"exact_duplicates without.*rebalance.*most_bytes of a "):
        executor_plan(options, tmp_path / "out", 2)
    with pytest.raises(DataError, match="nowhere"):
        executor_plan(CorpusOptions((SourceOptions("a", str(tmp_path / "nowhere")),)), tmp_path / "out", 2)


def test_the_script_answers_a_mistake_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), str(tmp_path / "none.yaml"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("One to start from is recipes/corpus.yaml.")
