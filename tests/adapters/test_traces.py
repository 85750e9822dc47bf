"""Traces: wrong attempts before the first right one, drawn alike for a seed, held to a checker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import Record
from dwindle.adapters.traces import RETRY, TraceOptions, solved
from dwindle.errors import RecipeError

TASK = TaskOptions("letters", ("a.jsonl",))
RECORDS = [Record(f"letter {n}", "x", f"a.jsonl:{n}") for n in range(6)]


def test_a_trace_is_every_attempt_up_to_the_first_right_one(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    options = TraceOptions(checker=r"regex:[aeiou]", samples=6, answer_tokens=3, temperature=1.0)
    found = list(solved(bundle, RECORDS, TASK, options))
    assert found == list(solved(bundle, RECORDS, TASK, options))
    rows = [row for row in found if row is not None]
    assert rows
    for row in rows:
        attempts = row["trace"].split(RETRY)
        assert attempts[-1] == row["completion"]
        assert any(c in "aeiou" for c in row["completion"])
        assert not any(c in "aeiou" for attempt in attempts[:-1] for c in attempt)
        assert row["attempts"] == len(attempts) <= 6
    assert any(row["attempts"] > 1 for row in rows)


def test_an_attempt_ends_where_the_chat_template_ends_an_answer(
    worded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<pad>{% endfor %}" \
        "{% if add_generation_prompt %}[assistant]{% endif %}"  # fmt: skip
    bundle = worded("llama", template)
    said = torch.tensor([bundle.tokenizer("sat<pad>on the mat", add_special_tokens=False).input_ids])
    monkeypatch.setattr("dwindle.adapters.traces.continued", lambda _, prompt, *__: torch.cat([prompt, said], dim=1))
    found = list(solved(bundle, [Record("the cat", "sat", "a:1")], TASK, TraceOptions(checker="exact", samples=1)))
    assert [row and row["completion"] for row in found] == ["sat"]


def test_records_without_a_right_attempt_give_nothing(tiny_bundle: Callable[..., Any]) -> None:
    options = TraceOptions(checker="exact", samples=2, answer_tokens=2)
    assert list(solved(tiny_bundle("llama"), RECORDS[:2], TASK, options)) == [None, None]


@pytest.mark.parametrize(("values", "words"), [
    ({"samples": 0}, "samples=0"), ({"temperature": 0}, "attempts must differ"), ({"answer_tokens": 0}, "answer_tokens"),
    ({"checker": "arithmetik"}, r"did you mean 'arithmetic'"),
])  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        TraceOptions(**values)
