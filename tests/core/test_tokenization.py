from __future__ import annotations

from typing import Any

import pytest

from dwindle.errors import DataError
from dwindle.tokenization import adds_bos, encode, encode_prefix, encoding_sha256

TEXT = "Größe – 好! ok"


def test_bos_once_and_the_whole_text(tiny_tokenizer: Any) -> None:
    assert adds_bos(tiny_tokenizer)
    ids = encode(tiny_tokenizer, TEXT * 100)
    assert ids[0] == 256
    assert 256 not in ids[1:]
    assert 257 not in ids
    assert len(ids) == 1 + len((TEXT * 100).encode())


def test_no_bos_where_the_tokenizer_adds_none(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.bos_token = None
    assert not adds_bos(tiny_tokenizer)


@pytest.mark.parametrize("tokens", range(2, 24))
def test_a_prefix_never_splits_a_character_and_its_bytes_are_exact(tiny_tokenizer: Any, tokens: int) -> None:
    ids, text_bytes = encode_prefix(tiny_tokenizer, TEXT, tokens)
    assert len(ids) <= tokens
    decoded = tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert TEXT.startswith(decoded)
    assert len(decoded.encode()) == text_bytes == len(ids) - 1


def test_real_byte_fallback_prefixes(assets: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories260K")
    whole = encode(tokenizer, TEXT)
    for tokens in range(2, len(whole) + 2):
        ids, text_bytes = encode_prefix(tokenizer, TEXT, tokens)
        assert ids == whole[: len(ids)]
        assert TEXT.encode()[:text_bytes].decode() in TEXT
    assert text_bytes == len(TEXT.encode())


def test_a_slow_tokenizer_cannot_cut_a_prefix() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="fast"):
        encode_prefix(Slow(), TEXT, 5)  # type: ignore[arg-type]


def test_the_hash_follows_meaning_and_not_the_chat_template(tiny_tokenizer: Any) -> None:
    before = encoding_sha256(tiny_tokenizer)
    tiny_tokenizer.chat_template = "{{ messages }}"
    assert encoding_sha256(tiny_tokenizer) == before
    tiny_tokenizer.add_tokens(["<new>"])
    assert encoding_sha256(tiny_tokenizer) != before
