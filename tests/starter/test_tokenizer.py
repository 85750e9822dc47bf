"""The tokenizer: any text comes back as it went in; the chat template writes the plain format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.starter import corpus
from dwindle.starter.build_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(corpus(0, 400), vocabulary=1024)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=80))
def test_any_text_round_trips(text: str) -> None:
    if any(special in text for special in ("<s>", "</s>", "<pad>")):
        return
    ids = TOKENIZER(text)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:]) == text


@pytest.mark.parametrize("text", ["Grüße, 世界!", "🦊\u200d🌲", "\x00\t\r\n", "  two  spaces ", "e\u0301", "عربى"])
def test_text_of_other_worlds_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_the_size_is_exact_and_special_tokens_come_first() -> None:
    assert len(TOKENIZER) == 1024
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]


def test_stories_take_few_tokens() -> None:
    texts = list(corpus(1, 50))
    tokens = sum(len(ids) for ids in TOKENIZER(texts)["input_ids"])
    assert sum(len(text.encode()) for text in texts) / tokens > 3


def test_the_chat_template_writes_the_plain_format() -> None:
    messages = [
        {"role": "system", "content": "Mia lost a kite."},
        {"role": "user", "content": "Who lost the kite?"},
        {"role": "assistant", "content": "Mia"},
        {"role": "user", "content": "What did Mia lose?"},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s>Mia lost a kite.\n\nQuestion: Who lost the kite?\nAnswer: Mia\nQuestion: What did Mia lose?\nAnswer:"
    )
