from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwindle.data import DataOptions, build_token_sets, evaluation_set
from dwindle.data.corpus_folder import of_corpus, read_manifest
from dwindle.data.curation.build import build_corpus
from dwindle.data.curation.corpus_options import CorpusOptions, SourceOptions, SplitOptions
from dwindle.data.curation.decontamination import Decontamination, EvaluationText
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.normalization import Normalization
from dwindle.data.curation.personal_data import PersonalData
from dwindle.data.curation.quality import Quality
from dwindle.data.sources import read_documents
from dwindle.errors import DataError, OutputError, RecipeError
from dwindle.storage import hash_folder

WORDS = [
    f"{a}{b}"
    for a in ("ba", "ko", "mi", "tu", "re", "lo", "sa")
    for b in ("lan", "der", "fin", "gor", "mus", "pel", "rat")
]


def story(seed: int, words: int = 120) -> str:
    dice = random.Random(seed)
    return " ".join([*dice.choices(WORDS, k=words), f"number {seed}."])


def edited(text: str, share: float, seed: int) -> str:
    words, dice = text.split(), random.Random(seed)
    for place in dice.sample(range(len(words)), round(share * len(words))):
        words[place] = dice.choice(WORDS)
    return " ".join(words)


@pytest.fixture
def options(tmp_path: Path) -> CorpusOptions:
    stories = [story(i) for i in range(60)]
    rows = [
        *stories,
        *(edited(t, 0.08, i) for i, t in enumerate(stories[:20])),
        stories[3],
        "short",
        f"{story(90)} ada@lovelace.org",
    ]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps({"story": t}) for t in rows))
    (tmp_path / "code").mkdir()
    for i in range(12):
        (tmp_path / "code" / f"m{i}.py").write_text(
            f"def f{i}(x):\n    return x + {i}\n\n\n" + "\n".join(f"# {story(500 + 20 * i + k, 8)}" for k in range(9))
        )
    (tmp_path / "code" / "broken.py").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"text": " ".join(stories[30].split()[:15])}))
    return CorpusOptions(
        sources=(SourceOptions("stories", str(tmp_path / "stories.jsonl"), "MIT", text="story"),
                 SourceOptions("code", str(tmp_path / "code"), "Apache-2.0")),
        stages=(Normalization(), ExactDuplicates(), Quality(least_common_words=None, least_sentence_ends=None), NearDuplicates(),
                Decontamination((EvaluationText("quiz", str(tmp_path / "quiz.jsonl")),), shortest=8), PersonalData()),
        splits=SplitOptions(calibration=0.1, evaluation=0.2), name="small", seed=7,
    )  # fmt: skip


def test_only_a_corpus_is_replaced(options: CorpusOptions, tmp_path: Path) -> None:
    options = replace(options, stages=())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"something else than a corpus \(letter\.txt\)"):
        build_corpus(options, tmp_path / "mine")
    with pytest.raises(OutputError, match="is a file"):
        build_corpus(options, tmp_path / "mine" / "letter.txt")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    first = build_corpus(options, tmp_path / "C")
    assert build_corpus(options, tmp_path / "C") == first


def test_a_corpus_and_its_card(options: CorpusOptions, tmp_path: Path) -> None:
    card = build_corpus(options, tmp_path / "C")
    assert not (tmp_path / "C" / "scratch").exists()
    stages = {stage["stage"]: stage for stage in card["stages"]}
    assert stages["exact_duplicates"]["dropped"] == {"the same text as an earlier document": 1}
    assert stages["quality"]["dropped"] == {"too few words": 1}
    assert stages["near_duplicates"]["dropped"] == {"a near-duplicate of an earlier document": 20}
    assert stages["decontamination"]["dropped"] == {"a piece of quiz": 1}
    assert stages["personal_data"]["changed"] == {"documents changed": 1, "email replaced": 1}
    for before, after in zip(card["stages"], card["stages"][1:], strict=False):
        assert before["documents_out"] == after["documents_in"]
        assert before["bytes_out"] == after["bytes_in"]
        assert before["documents_in"] - before["documents_out"] == sum(before["dropped"].values())
    assert card["sources"][1]["files_left_out"] == 1
    assert {s["name"]: s["documents"] for s in card["sources"]} == {"stories": 83, "code": 12}
    sizes = {name: split["bytes"] for name, split in card["splits"].items()}
    assert 0.2 <= sizes["evaluation"] / sum(sizes.values()) < 0.25
    assert 0.1 <= sizes["calibration"] / sum(sizes.values()) < 0.15
    records = [json.loads(row) for path in sorted((tmp_path / "C").glob("*/stories.*")) for row in lines_of(path)]
    assert {r["licence"] for r in records} == {"MIT"}
    assert len({r["id"] for r in records}) == len(records) == 60
    assert [r["how"] for r in records if r["how"]] == [{"scrubbed": {"email": 1}}]
    page = (tmp_path / "C" / "README.md").read_text()
    for part in ("| stories | MIT | 83 |", "| near_duplicates | 93 | 73 |", "No two splits share a near-duplicate", "| quiz | 1 | 1 |",
                 "stories/stories.jsonl#"):  # fmt: skip
        assert part in page, part
    assert (tmp_path / "C" / "plots" / "stages.svg").read_text().startswith("<svg")


def lines_of(path: Path) -> list[str]:
    from dwindle.data.byte_stream import open_text

    with open_text(path) as handle:
        return handle.read().splitlines()


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "parquet"])
def test_same_input_and_seed_give_the_same_bytes(options: CorpusOptions, tmp_path: Path, form: Any) -> None:
    one = replace(options, format=form)
    build_corpus(one, tmp_path / "A")
    build_corpus(one, tmp_path / "B", workers=2 if form == "jsonl.zst" else 1)
    assert hash_folder(tmp_path / "A") == hash_folder(tmp_path / "B")
    build_corpus(replace(one, seed=8), tmp_path / "D")
    assert hash_folder(tmp_path / "A") != hash_folder(tmp_path / "D")
    assert (
        len(list(read_documents(str(tmp_path / "A"), "text")))
        == read_manifest(tmp_path / "A")["splits"]["train"]["documents"]
    )  # type: ignore[index]


def test_near_duplicates_stay_in_one_split(options: CorpusOptions, tmp_path: Path) -> None:
    """Without the stage that drops them, families of copies are divided whole."""
    rows = [edited(story(i), 0.1, k) for i in range(40) for k in range(3)]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps({"story": t}) for t in rows))
    card = build_corpus(replace(options, sources=options.sources[:1], stages=()), tmp_path / "C")
    split_of: dict[int, set[str]] = {}
    for name in ("train", "calibration", "evaluation"):
        for row in lines_of(tmp_path / "C" / name / "stories.jsonl.zst"):
            split_of.setdefault(int(json.loads(row)["id"].partition("#")[2]) // 3, set()).add(name)
    assert len(split_of) == 40
    assert all(len(names) == 1 for names in split_of.values())
    assert set.union(*split_of.values()) == {"train", "calibration", "evaluation"}
    assert card["stages"][-1]["details"]["near_duplicates_across_splits_left"] == 0


def test_what_minhash_missed_is_caught_when_splits_are_compared(
    options: CorpusOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dwindle.data.curation import build
    from dwindle.data.curation.clusters import Clusters

    def blind(documents: Any, near: Any, run: Any, spool: Any) -> Clusters:
        import numpy as np

        for document in documents:
            spool.add(document)
        spool.end()
        return Clusters(np.arange(len(spool)), 0, 0)

    monkeypatch.setattr(build, "clustered", blind)
    rows = [edited(story(i), 0.05, k) for i in range(30) for k in range(2)]
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps({"story": t}) for t in rows))
    card = build_corpus(replace(options, sources=options.sources[:1], stages=()), tmp_path / "C")
    details = card["stages"][-1]["details"]
    assert details["near_duplicates_across_splits_found_and_dropped"] > 3
    held = [
        json.loads(r)["text"].split()[-1]
        for n in ("calibration", "evaluation")
        for r in lines_of(tmp_path / "C" / n / "stories.jsonl.zst")
    ]
    trained = [json.loads(r)["text"].split()[-1] for r in lines_of(tmp_path / "C" / "train" / "stories.jsonl.zst")]
    assert not set(held) & set(trained)


def test_token_sets_of_a_corpus(options: CorpusOptions, tmp_path: Path, tiny_tokenizer: Any) -> None:
    card = build_corpus(options, tmp_path / "C", tokenizer=tiny_tokenizer)
    assert card["tokens"]["train"]["tokens"] > 0
    assert "bytes per token" in (tmp_path / "C" / "README.md").read_text()
    sets = build_token_sets(
        DataOptions(train=(str(tmp_path / "C"),), context=32, calibration_windows=4), tiny_tokenizer, 32
    )
    assert sets.held_out_text is None
    assert sets.train.licence == "Apache-2.0, MIT"
    assert len(sets.evaluation.document_sha256) == card["splits"]["evaluation"]["documents"]
    assert evaluation_set(tmp_path / "C", tiny_tokenizer).sha256 == sets.evaluation.sha256
    weighted = replace(
        options, sources=tuple(replace(s, weight=w) for s, w in zip(options.sources, (3.0, 1.0), strict=True))
    )
    build_corpus(weighted, tmp_path / "W")
    found = of_corpus(DataOptions(train=(str(tmp_path / "W"),)))
    assert found.weights == (1.0, 3.0)
    assert [Path(p).name for p in found.train] == ["code.jsonl.zst", "stories.jsonl.zst"]
    assert found.evaluation == str(tmp_path / "W" / "evaluation")
    mixed = of_corpus(
        DataOptions(train=(str(tmp_path / "W"), str(tmp_path / "quiz.jsonl")), calibration=str(tmp_path / "C"))
    )
    assert mixed.train == (str(tmp_path / "W" / "train"), str(tmp_path / "quiz.jsonl"))
    assert mixed.calibration == str(tmp_path / "C" / "calibration")
    (tmp_path / "C" / "corpus.json").write_text("{")
    with pytest.raises(DataError, match="a damaged manifest"):
        read_manifest(tmp_path / "C")


def test_nothing_left_says_which_filter_took_what(options: CorpusOptions, tmp_path: Path) -> None:
    strict = replace(options, sources=options.sources[:1], stages=(Normalization(), Quality(least_words=10_000)))
    with pytest.raises(
        DataError,
        match=r"nothing is left.*quality took 83 of 83 \(too few words 83; for example stories/stories.jsonl#\d+: too few words: \d+\)",
    ):
        build_corpus(strict, tmp_path / "C")
    assert not (tmp_path / "C").exists()
    with pytest.raises(DataError, match="too few to hold some out"):
        build_corpus(replace(options, sources=options.sources[:1], stages=(Quality(least_words=122, least_common_words=None), ExactDuplicates(), NearDuplicates()),
                             splits=SplitOptions(0.0, 0.99)), tmp_path / "C")  # fmt: skip


def test_a_source_that_cannot_be_read_leaves_no_corpus(options: CorpusOptions, tmp_path: Path) -> None:
    with (tmp_path / "stories.jsonl").open("ab") as handle:
        handle.write(b'\n{"story": "caf\xe9"}')
    with pytest.raises(DataError, match=r"stories.jsonl: no UTF-8 text"):
        build_corpus(options, tmp_path / "C")
    (tmp_path / "stories.jsonl").write_text('{"story": "a \\ud800 b"}\n')
    with pytest.raises(DataError, match="text that is no Unicode"):
        build_corpus(options, tmp_path / "C")
    assert [p.name for p in tmp_path.iterdir() if "C" in p.name] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "at least one"),
        ({"sources": (SourceOptions("a", "x"), SourceOptions("A", "y"))}, "more than once: a"),
        ({"sources": (SourceOptions("a", "x", weight=1), SourceOptions("b", "y"))}, "not for b"),
        ({"forbidden_licences": ("apache-*",)}, "source code has the licence Apache-2.0, which the recipe forbids"),
        ({"allowed_licences": ("MIT",)}, "source code has the licence Apache-2.0; allowed are MIT"),
        ({"sources": (SourceOptions("a", "x"),), "allowed_licences": ("MIT",)}, "source a names no licence"),
    ],
)
def test_recipes_that_cannot_be_meant(options: CorpusOptions, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replace(options, **change)


def test_evaluation_text_among_the_sources(options: CorpusOptions, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="source quiz and evaluation set quiz are the same text"):
        replace(options, sources=(SourceOptions("quiz", str(tmp_path / "quiz.jsonl")),))
    with pytest.raises(RecipeError, match="are the same text"):
        replace(options, sources=(SourceOptions("all", str(tmp_path)),))


@pytest.mark.parametrize("make", [lambda: SourceOptions("a b", "x"), lambda: SourceOptions("a", ""), lambda: SourceOptions("a", "x", weight=0),
                                  lambda: SourceOptions("a", "x", most_bytes=0), lambda: SplitOptions(0.5, 0.5)])  # fmt: skip
def test_values_that_cannot_be_meant(make: Any) -> None:
    with pytest.raises(RecipeError, match="needed"):
        make()


def test_a_source_can_be_cut_and_files_left_out(options: CorpusOptions, tmp_path: Path) -> None:
    source = replace(options.sources[1], most_bytes=1000, exclude=("m1*.py", "broken.py"))
    card = build_corpus(replace(options, sources=(source,), stages=(), splits=SplitOptions(0, 0)), tmp_path / "C")
    (read,) = card["sources"]
    assert read["files_left_out"] == 0
    assert 1000 <= read["bytes"] < 2200
    ids = [json.loads(r)["id"] for r in lines_of(tmp_path / "C" / "train" / "code.jsonl.zst")]
    assert ids[0] == "code/m0.py#0"
    assert not any("m1" in one for one in ids)
