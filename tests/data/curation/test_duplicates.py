from __future__ import annotations

import difflib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dwindle.data.curation.bands import adjacent_pairs, banded_pairs
from dwindle.data.curation.clusters import NearDuplicateOptions, edited_share
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.minhash import agreement, signatures
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.stage import run_chain
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.curation.word_order import common_in_order
from dwindle.data.curation.words import hashed_words
from dwindle.data.document import Document
from dwindle.errors import RecipeError

VOCABULARY = [f"w{i}" for i in range(5000)]


def text(seed: int, words: int = 300) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choices(VOCABULARY, k=words))


def edited(original: str, share: float, seed: int) -> str:
    words, dice = original.split(), random.Random(seed)
    for place in dice.sample(range(len(words)), round(share * len(words))):
        words[place] = dice.choice(VOCABULARY)
    return " ".join(words)


def kept(
    texts: list[str], folder: Path, options: NearDuplicateOptions | None = None, workers: int = 1
) -> tuple[list[int], StageCount]:
    documents = (Document(t, f"source {i % 2}", id=str(i)) for i, t in enumerate(texts))
    out, counts = run_chain(
        [NearDuplicates(options or NearDuplicateOptions())], documents, folder=folder, workers=workers
    )
    return [int(d.id) for d in out], counts[0]


def test_signatures_estimate_jaccard() -> None:
    base = text(0, 2000).split()
    for shared in (0, 500, 1500, 2000):
        other = base[:shared] + text(1, 2000 - shared).split()
        a, b = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (base, other))
        signed = signatures(hashed_words([" ".join(base), " ".join(other)]), ngram=5, hashes=4000)
        assert agreement(signed, np.array([[0, 1]]))[0] == pytest.approx(len(a & b) / len(a | b), abs=0.03)


def test_common_words_in_order() -> None:
    dice = random.Random(3)
    for _ in range(300):
        one, other = ([dice.randint(0, 5) for _ in range(dice.randint(0, 40))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, x in enumerate(one):
            for j, y in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert common_in_order(one, other) == table[-1][-1]


def test_bands_pair_what_agrees() -> None:
    signed = np.arange(60, dtype=np.uint32).reshape(5, 12)
    signed[3, 4:8] = signed[1, 4:8]
    signed[4, [0, 11]] = signed[2, [0, 11]]
    assert banded_pairs(signed, 3, 4).tolist() == [[1, 3]]
    assert adjacent_pairs(signed).tolist() == [[1, 3], [2, 4]]


def test_edited_copies_are_found_and_halves_are_not(tmp_path: Path) -> None:
    originals = [text(i) for i in range(100)]
    copies = [edited(t, 0.1, i) for i, t in enumerate(originals[:60])]
    halves = [t[: len(t) // 2] + " " + text(1000 + i, 150) for i, t in enumerate(originals[60:])]
    found, count = kept([*originals, *halves, *copies], tmp_path)
    assert found == list(range(140))
    assert count.reasons == {"a near-duplicate of an earlier document": 60}
    assert count.details["clusters"] == 60
    assert count.details["dropped_for_a_document_of_another_source"] == 0
    strict, _ = kept([*originals, *copies], tmp_path, NearDuplicateOptions(edited=None))
    assert len(strict) == 160, "a 10 % edit leaves a similarity of 0.42"
    same, _ = kept(
        [*originals, *(t.replace("w77 ", "w78 ") + " more" for t in originals[:50])],
        tmp_path,
        NearDuplicateOptions(edited=None),
    )
    assert same == list(range(100))


def test_clusters_are_transitive_and_the_first_stays(tmp_path: Path) -> None:
    chain = [text(0, 400)]
    for step in range(4):
        chain.append(edited(chain[-1], 0.1, step))
    assert edited_share(chain[0], chain[-1]) < 0.75
    found, count = kept([text(9), *chain, text(10)], tmp_path)
    assert found == [0, 1, 6]
    assert count.details["largest_cluster"] == 5
    assert all(e["why"].endswith(": 1") for e in count.dropped.to_json())


def test_short_and_empty_texts(tmp_path: Path) -> None:
    found, _ = kept(["a b", "a b", "b a", "...", "!", "a b c d e f g", "", "A, B."], tmp_path)
    assert found == [0, 2, 3, 4, 5, 6]


def test_a_phrase_that_all_share_is_no_duplicate_and_costs_little(tmp_path: Path) -> None:
    common = "once upon a time there lived a king who had three sons "
    texts = [common + text(i, 40) for i in range(600)]
    found, count = kept(texts, tmp_path)
    assert found == list(range(600))
    assert count.details["pairs_compared_word_by_word"] <= 600 * 112 * 6


def test_two_processes_find_the_same(tmp_path: Path) -> None:
    originals = [text(i) for i in range(30)]
    texts = [*originals, *(edited(t, 0.12, i) for i, t in enumerate(originals))]
    one, two = kept(texts, tmp_path), kept(texts, tmp_path, workers=2)
    assert one[0] == two[0] == list(range(30))
    assert one[1].to_json() == two[1].to_json()


def test_exact_duplicates(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        for i, t in enumerate(["a\n", "b", " a", "A", "b"]):
            yield Document(t, "s", id=str(i))

    out, counts = run_chain([ExactDuplicates()], documents(), folder=tmp_path)
    assert [d.id for d in out] == ["0", "1", "3"]
    assert counts[0].documents_in - counts[0].documents_out == 2


@pytest.mark.parametrize(
    "values", [{"ngram": 0}, {"bands": 0}, {"rows": 0}, {"similarity": 0}, {"edited": 1.5}, {"bands": 1, "rows": 1}]
)
def test_options_that_cannot_be_meant(values: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"near_duplicates: .*{next(iter(values))}"):
        NearDuplicateOptions(**values)  # type: ignore[arg-type]


def test_the_share_of_words_agrees_with_another_measure() -> None:
    one = text(5, 200)
    other = edited(one, 0.1, 6)
    blocks = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False).get_matching_blocks()
    assert edited_share(one, other) == pytest.approx(sum(b.size for b in blocks) / 200, abs=0.02)


@pytest.mark.slow
def test_memory_is_what_the_stage_states(tmp_path: Path) -> None:
    """600 bytes a document; measured between 5,000 and 55,000 short documents, in fresh processes."""
    code = (
        "import random, resource, sys\nfrom pathlib import Path\n"
        "from dwindle.data.curation.near_duplicates import NearDuplicates\n"
        "from dwindle.data.curation.stage import run_chain\nfrom dwindle.data.document import Document\n"
        "def documents(n):\n"
        "    for i in range(n):\n"
        "        dice = random.Random(i)\n"
        "        yield Document(' '.join(str(dice.randrange(10**6)) for _ in range(8)), 's', id=str(i))\n"
        "out, _ = run_chain([NearDuplicates()], documents(int(sys.argv[1])), folder=Path(sys.argv[2]))\n"
        "print(sum(1 for _ in out), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    peaks = []
    for number in (5_000, 55_000):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(number), str(tmp_path)], check=True, capture_output=True, text=True
        )
        kept, peak = map(int, done.stdout.split())
        assert kept == number
        peaks.append(peak)
    assert (peaks[1] - peaks[0]) / 50_000 < 650
