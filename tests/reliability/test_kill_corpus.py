"""SIGKILL while a corpus is built: what is there is the old corpus or the new one, and building again ends with the same bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dwindle.data.corpus_folder import read_manifest
from dwindle.data.curation.build import build_corpus
from dwindle.pipeline.corpus_recipe import load_corpus_recipe
from dwindle.storage import hash_folder

sys.path.insert(0, str(Path(__file__).parent))
from test_kill_points import dies


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [
        {"text": f"Story {n} of a fox, {n * n} birds and {n**3 % 71} hills, told {n % 7} times."} for n in range(60)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "corpus.yaml"
    place.write_text(
        f"version: 1\nname: c\nsources: [{{name: a, place: {tmp_path / 'a.jsonl'}}}]\n"
        "steps: [normalization, exact_duplicates, near_duplicates]\nsplits: {calibration: 0.1, evaluation: 0.1}\n"
    )
    return place


def test_a_corpus_is_whole_or_not_there_at_every_point(recipe: Path, tmp_path: Path) -> None:
    options, place = load_corpus_recipe(recipe), tmp_path / "out" / "corpus"
    build_corpus(options, tmp_path / "undisturbed")
    expected = hash_folder(tmp_path / "undisturbed")
    for at in range(1, 400, 5):
        killed = dies(lambda: build_corpus(options, place), at, tmp_path / "out")
        if place.exists():
            assert read_manifest(place) is not None
            assert hash_folder(place) == expected, f"half a corpus after a kill at operation {at}"
        if not killed:
            break
        assert not [p for p in place.parent.glob("[!.]*") if p != place], "a half corpus under a name that is seen"
    assert at > 20
    build_corpus(options, place)
    assert hash_folder(place) == expected
    assert [p.name for p in place.parent.iterdir()] == ["corpus"], "something was left over"
