from __future__ import annotations

import time
from pathlib import Path

import pytest

from dwindle.data.synthesis.kinds import KINDS, kind_of
from dwindle.data.synthesis.options import SynthesisOptions, VerifierOptions
from dwindle.errors import RecipeError


@pytest.mark.parametrize("said", [
    "Question: Who sat?\nAnswer: The cat.",
    "**Question:** Who sat?\n\n**Answer:** The cat.\n",
    " Who sat?\nAnswer: The cat.",
    "Sure!\nQuestion: Who sat?\nAnswer: The cat.",
])  # fmt: skip
def test_a_question_and_its_answer_are_read(said: str) -> None:
    found = kind_of("questions").read(said)
    assert found is not None
    assert (found.prompt, found.answer) == ("Who sat?", "The cat.")
    assert found.text == "Who sat?\n\nThe cat."


@pytest.mark.parametrize(
    "said", ["The cat sat.", "Question: Who?", "Question: a?\nAnswer: b\nQuestion: c?\nAnswer: d", "Answer: b"]
)
def test_another_form_is_none(said: str) -> None:
    assert kind_of("questions").read(said) is None


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Say it in verse: {text}")
    kind = kind_of(f"template:{tmp_path}/t.txt")
    assert (kind.name, kind.start, kind.uses_text) == ("template:t.txt", "template", True)
    assert kind.sha256 != KINDS["rephrase:easy"].sha256
    (tmp_path / "t.txt").write_text("Say it in verse")
    with pytest.raises(RecipeError, match=r"no \{text\} in it"):
        kind_of(f"template:{tmp_path}/t.txt")
    with pytest.raises(RecipeError, match="cannot be read"):
        kind_of("template:/no/such/file")
    (tmp_path / "t.txt").write_bytes(b"\xff{text}")
    with pytest.raises(RecipeError, match="no UTF-8"):
        kind_of(f"template:{tmp_path}/t.txt")


def test_mistakes_are_named_together() -> None:
    with pytest.raises(RecipeError) as found:
        SynthesisOptions(
            ("rephrase:esay", "free"),
            checks=("aritmetic",),
            pieces=0,
            top_p=1.5,
            most_share=1.2,
            most_overlap=1.0,
            temperature=-1,
        )
    for said in (
        "did you mean 'rephrase:easy'",
        "did you mean 'arithmetic'",
        "pieces=0",
        "top_p=1.5",
        "most_share=1.2",
        "most_overlap=1.0",
        "temperature=-1",
    ):
        assert said in str(found.value)
    with pytest.raises(RecipeError, match="each once"):
        SynthesisOptions(("free", "free"))
    with pytest.raises(RecipeError, match="a probability"):
        VerifierOptions("m", "yes_no", 2.0)


def test_questions_without_an_answer_cost_no_minutes() -> None:
    began = time.process_time()
    assert kind_of("questions").read("Question: a\n" * 1500) is None
    assert time.process_time() - began < 1
