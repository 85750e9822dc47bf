from __future__ import annotations

import random

import numpy as np
import pytest

from dwindle.data.curation.words import hashed_words


def named(texts: list[str]) -> list[list[int]]:
    words = hashed_words(texts)
    return [words.of(i).tolist() for i in range(len(texts))]


def test_words_are_lower_case_runs_between_punctuation() -> None:
    one, other = named(["Hello, World_2 — it's “fine”…", "  hello\nworld_2 it s fine"])
    assert one == other
    assert len(one) == 5
    assert named(["über straße"])[0] != named(["uber strasse"])[0]


def test_every_ideograph_is_a_word() -> None:
    (han, mixed) = named(["昨天晚上", "昨天 and 晚上。"])
    assert len(han) == 4
    assert [w for w in mixed if w in han] == han
    assert len(mixed) == 5


def test_a_text_has_the_same_words_in_any_batch() -> None:
    dice = random.Random(0)
    texts = [
        "",
        " ",
        "…",
        "a",
        *("".join(dice.choice("ab c.é") for _ in range(dice.randint(0, 600))) for _ in range(50)),
        "x" * 2000,
    ]
    together = named(texts)
    assert together == [named([text])[0] for text in texts]
    assert together[:4] == [[], [], [], named(["a"])[0]]
    assert len({tuple(named([w])[0]) for w in ("ab", "ba", "a b", "b a", "x" * 256 + "ab", "x" * 256 + "ba")}) == 6


@pytest.mark.parametrize("length", [1, 2, 5])
def test_ngrams_stay_inside_their_text(length: int) -> None:
    texts = ["a b c d e f", "", "a b", "c d e f a b c", "z"]
    words = hashed_words(texts)
    grams = words.ngrams(length)
    for i, text in enumerate(texts):
        parts = text.split()
        expected = [tuple(parts[k : k + length]) for k in range(len(parts) - length + 1)] or (
            [tuple(parts)] if parts else []
        )
        assert grams.counts[i] == len(expected)
        for k, gram in enumerate(expected):
            alone = hashed_words([" ".join(gram)]).ngrams(length).hashes
            assert grams.of(i)[k] == alone[0]
    assert len(np.unique(grams.hashes)) == len({g for t in texts for g in _grams(t.split(), length)})


def _grams(parts: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(parts[k : k + length]) for k in range(len(parts) - length + 1)] or ([tuple(parts)] if parts else [])
