"""Tokenizers of checkpoint folders: what loads in either transformers, what is refused, and the hash."""

from __future__ import annotations

import json
import logging

import pytest

from dwindle.bundle import ModelBundle
from dwindle.errors import UnsupportedModel
from dwindle.tokenizer_files import tokenizer_sha256


@pytest.fixture
def saved(tiny_bundle, tmp_path):
    tiny_bundle().save(tmp_path / "m")
    return tmp_path / "m"


def test_a_missing_damaged_or_too_large_tokenizer_is_refused(saved):
    rules = (saved / "tokenizer.json").read_text()
    (saved / "tokenizer.json").write_text(rules[: len(rules) // 2])
    with pytest.raises(UnsupportedModel, match="the tokenizer cannot be read"):
        ModelBundle.load(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="has no tokenizer"):
        ModelBundle.load(saved)
    larger = json.loads(rules)
    larger["model"]["vocab"] = {chr(0x4E00 + i): i for i in range(300)}
    larger["added_tokens"] = []
    larger["post_processor"] = None
    (saved / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(UnsupportedModel, match=r"the tokenizer has ids up to \d+, the model embeds 272"):
        ModelBundle.load(saved)


def test_added_tokens_without_an_embedding_are_announced(saved, caplog):
    rules = json.loads((saved / "tokenizer.json").read_text())
    rules["added_tokens"] += [{**rules["added_tokens"][0], "id": 259 + i, "content": f"<{i}>"} for i in range(14)]
    (saved / "tokenizer.json").write_text(json.dumps(rules))
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        ModelBundle.load(saved)
    assert "no embedding for added tokens <13>" in caplog.text


def test_a_tokenizer_class_of_transformers_5_loads_in_both(saved):
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "TokenizersBackend"}))
    assert ModelBundle.load(saved).tokenizer("a").input_ids == [256, 64]


def test_special_tokens_that_transformers_5_lists_load_in_both(saved):
    path = saved / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    for name in ("additional_special_tokens", "extra_special_tokens"):
        plain.pop(name, None)
    path.write_text(json.dumps({**plain, "extra_special_tokens": ["<pad>"]}))
    bundle = ModelBundle.load(saved)
    assert "<pad>" in bundle.tokenizer.all_special_tokens
    bundle.save(saved.parent / "again")
    written = json.loads((saved.parent / "again" / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<pad>"]
    assert not isinstance(written.get("extra_special_tokens"), list)
    assert ModelBundle.load(saved.parent / "again").content_sha256 == bundle.content_sha256


def test_the_tokenizer_hash_ignores_what_a_call_leaves_behind(tiny_tokenizer):
    before = tokenizer_sha256(tiny_tokenizer)
    tiny_tokenizer("abc", truncation=True, padding="max_length", max_length=8)
    assert tokenizer_sha256(tiny_tokenizer) == before
