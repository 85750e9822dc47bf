"""Stories: the same for the same seed everywhere, with facts that the text bears out."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest

from dwindle.errors import DataError
from dwindle.starter import SPLITS, corpus, story
from dwindle.starter.lexicon import ENDINGS, MOODS
from dwindle.starter.more_plots import PLOTS

SAMPLE = [story(seed) for seed in range(400)]


def test_a_seed_tells_the_same_story_in_a_process_with_another_hash_seed() -> None:
    code = "from dwindle.starter import corpus; print('\\n'.join(corpus(3, 20)))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert texts == {"\n".join(corpus(3, 20)) + "\n"}


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, dwindle.starter; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_golden_story() -> None:
    assert story(0).text.startswith(
        "There once was a boy called Harry, who lived by the farm. His best friend was Olive."
    )


def test_splits_do_not_overlap_and_corpora_stay_inside_them() -> None:
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))
    documents = [set(corpus(0, 300, split)) for split in SPLITS]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]


def test_corpora_of_different_seeds_and_skips_fit_together() -> None:
    assert list(corpus(1, 10))[4:] == list(corpus(1, 6, skip=4))
    assert not set(corpus(1, 200)) & set(corpus(2, 200))


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1000}, {"documents": 500_001}, {"seed": 100, "split": "test"}])
def test_a_corpus_outside_its_split_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(DataError, match="needs 0 <= seed"):
        next(corpus(**{"seed": 0, "documents": 1, **bad}))  # type: ignore[arg-type]


def test_every_plot_and_mood_occurs_and_no_plot_gives_its_mood_away() -> None:
    moods: dict[str, set[str]] = {}
    for told in SAMPLE:
        moods.setdefault(told.plot, set()).add(told.mood)
    assert set(moods) == {plot.__name__ for plot in PLOTS}
    assert set().union(*moods.values()) == set(MOODS)
    assert min(map(len, moods.values())) >= 2


def test_the_words_vary() -> None:
    words = Counter(word.strip('.,?!"') for told in SAMPLE for word in told.text.split())
    assert len(words) > 900
    assert len({told.text for told in SAMPLE}) == len(SAMPLE)
    assert len({name for told in SAMPLE for name in [told.characters[0].name]}) >= 60


def test_every_fact_stands_in_the_sentence_it_names() -> None:
    for told in SAMPLE:
        assert told.text == " ".join(told.sentences)
        for event in told.facts:
            sentence = told.sentences[event.sentence]
            subject = event.actor.name if event.actor.name in sentence else event.actor.he
            assert event.clause(subject=subject).lower() in sentence.lower(), (sentence, event)


def test_a_pronoun_stands_for_the_person_last_named() -> None:
    for told in SAMPLE:
        for event in told.facts:
            sentence = told.sentences[event.sentence]
            if event.clause() not in sentence:
                before = told.sentences[event.sentence - 1]
                assert event.actor.name in before or any(
                    fact.sentence == event.sentence - 1 and fact.actor == event.actor for fact in told.facts
                )


def test_reasons_and_moods_stand_in_the_text() -> None:
    for told in SAMPLE:
        for reason in told.reasons:
            assert f" {reason.feeling} because {reason.cause}." in told.text
        ends = [half.split("{")[0].strip() for half in ENDINGS[told.mood][0]]
        assert any(half in told.text for half in ends), (told.mood, told.text)


def test_text_is_tidy() -> None:
    for told in SAMPLE:
        assert "  " not in told.text
        assert "{" not in told.text
        assert "None" not in told.text
        assert all(sentence[-1] in '.!?"' and not sentence[0].islower() for sentence in told.sentences)
        for vowel in "aeio":
            assert f" a {vowel}" not in told.text
