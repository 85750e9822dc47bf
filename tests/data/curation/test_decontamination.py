from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dwindle.data.curation.decontamination import Decontamination, EvaluationText
from dwindle.data.curation.evaluation_ngrams import EvaluationNgrams
from dwindle.data.curation.stage import run_chain
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import DataError, RecipeError

VOCABULARY = [f"w{i}" for i in range(3000)]


def text(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def evaluation(folder: Path, items: list[str], name: str = "quiz") -> EvaluationText:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": item}) for item in items))
    return EvaluationText(name, str(path))


def kept(texts: list[str], folder: Path, workers: int = 1, **options: Any) -> tuple[list[str], StageCount]:
    documents = (Document(t, f"source {i % 2}", id=str(i)) for i, t in enumerate(texts))
    out, counts = run_chain([Decontamination(**options)], documents, folder=folder, workers=workers)
    return [d.id for d in out], counts[0]


@pytest.mark.parametrize("length", [4, 5, 8, 13])
def test_every_planted_ngram_is_found(tmp_path: Path, length: int) -> None:
    dice = random.Random(length)
    items = [text(10_000 + i, 30) for i in range(60)]
    clean = [text(i, 100) for i in range(60)]
    planted = []
    for document, item in zip(clean, items, strict=True):
        words, source, at = document.split(), item.split(), dice.randrange(18)
        place = dice.randrange(len(words))
        planted.append(" ".join([*words[:place], *source[at : at + length], *words[place:]]).upper().replace(" ", ", "))
    found, count = kept([*clean, *planted], tmp_path, sets=(evaluation(tmp_path, items),), shortest=4)
    assert found == [str(i) for i in range(60)]
    assert count.details["evaluation_sets"][0]["documents_hit"] == 60
    assert count.dropped.to_json()[0]["why"].startswith(f"a piece of quiz: {length} words of item ")


def test_ngrams_met_are_those_of_a_plain_search() -> None:
    items = [text(1, 20), "a b c", "x y z v"]
    ngrams = EvaluationNgrams.of(items, 4, 6)
    assert ngrams.too_short == 1
    texts = [text(2, 5) + " " + " ".join(items[0].split()[3:9]) + " q x y z v", "a b c", ""]
    expected = {tuple(i.split()[k : k + n]) for n in (4, 5, 6) for i in items for k in range(len(i.split()) - n + 1)}
    assert len(ngrams) == len(expected)
    words = texts[0].split()
    met = {tuple(words[k : k + n]) for n in (4, 5, 6) for k in range(len(words) - n + 1)} & expected
    assert [len(m) for m in ngrams.met(texts)] == [len(met), 0, 0]
    assert len(met) == 3 + 2 + 1 + 1
    assert ngrams.length_and_item(int(ngrams.met(texts)[0][-1])) == (6, 0)


def test_common_ngrams_are_exempt_and_longer_ones_are_not(tmp_path: Path) -> None:
    item = "once upon a time there lived " + text(7, 10)
    common = [f"once upon a time {text(100 + i, 20)}" for i in range(50)]
    planted = [f"once upon a time there {text(300, 20)}"]
    options = {"sets": (evaluation(tmp_path, [item]),), "shortest": 4}
    assert kept([*common, *planted], tmp_path, common=1000, **options)[0] == []
    found, count = kept([*common, *planted], tmp_path, common=51, **options)
    assert found == [str(i) for i in range(50)]
    assert count.details["ngrams_exempt_as_common"] == 1
    assert len(kept([*common, *planted], tmp_path, common=52, **options)[0]) == 0
    assert len(kept([*common, *planted], tmp_path, sets=options["sets"], shortest=6)[0]) == 51


def test_two_processes_and_two_sets(tmp_path: Path) -> None:
    one, other = [text(i, 20) for i in range(5)], [text(50 + i, 20) for i in range(5)]
    sets = (evaluation(tmp_path, one, "one"), evaluation(tmp_path, other, "other"))
    texts = [text(900 + i, 60) for i in range(40)] + [
        text(990, 30) + " " + one[2][10:60],
        other[3][:50] + " " + text(991, 30),
    ]
    results = [kept(texts, tmp_path, workers=w, sets=sets, shortest=4) for w in (1, 2)]
    assert results[0][0] == results[1][0] == [str(i) for i in range(40)]
    assert results[0][1].to_json() == results[1][1].to_json()
    assert results[0][1].reasons == {"a piece of one": 1, "a piece of other": 1}


def test_evaluation_text_as_training_text_is_an_error(tmp_path: Path) -> None:
    items = [text(i, 20) for i in range(30)]
    texts = [t for i in range(30) for t in (items[i].upper(), text(500 + i, 50))]
    with pytest.raises(
        DataError, match=r"source 0: 30 of 30 documents are items of quiz word for word \(0, 2, 4 and 27 more\)"
    ):
        kept(texts, tmp_path, sets=(evaluation(tmp_path, items),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ()}, "at least one evaluation set"),
        ({"sets": (EvaluationText("a", "b"), EvaluationText("a", "c"))}, "a more than once"),
        ({"sets": (EvaluationText("a", "b"),), "shortest": 14}, "shortest <= longest"),
        ({"sets": (EvaluationText("a", "b"),), "common": 0}, "common=0"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Decontamination(**options)


def test_an_evaluation_set_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.jsonl: no such file"):
        kept(["a"], tmp_path, sets=(EvaluationText("a", str(tmp_path / "missing.jsonl")),))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"a .*blank.jsonl\) holds no text"):
        kept(["a"], tmp_path, sets=(EvaluationText("a", str(tmp_path / "blank.jsonl")),))
