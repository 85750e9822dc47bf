"""Rebuild a tokenizer with fewer tokens and new ids, by its own files.

tokenizer.json holds the vocabulary and the merges, and repeats ids in the added tokens, the post-processor and the
padding; tokenizer_config.json repeats those of the added tokens. The tokenizer is saved, these places are rewritten,
and it is loaded again as the generic class that takes tokenizer.json as it stands: so the result is, on transformers
4.57 and 5, what its saved folder will load as. Files that other classes rebuild a tokenizer from (tokenizer.model,
vocab.json, merges.txt) hold the old vocabulary and are left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import UnsupportedModel, offenders
from dwindle.model_source import quiet_transformers
from dwindle.prune.tokenizer_pieces import read_rules
from dwindle.storage import write_json, write_text
from dwindle.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["rebuild"]

_OLD_VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "added_tokens.json")
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_CLASS_SETTINGS = ("add_bos_token", "add_eos_token", "auto_map", "backend", "vocab_file")
"""Settings by which a class changes or replaces what tokenizer.json says already."""


def rebuild(tokenizer: PreTrainedTokenizerBase, new_ids: Mapping[int, int], vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the tokens in `new_ids` (old id to new) for a model that embeds `vocabulary` of them.

    Raises UnsupportedModel for a kind that cannot be rebuilt, or if the result does not have exactly these ids.
    """
    rules = renumbered(read_rules(tokenizer), new_ids)
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        folder = Path(scratch) / "tokenizer"
        tokenizer.save_pretrained(folder)
        for name in _OLD_VOCABULARY_FILES:
            (folder / name).unlink(missing_ok=True)
        write_text(folder / "tokenizer.json", json.dumps(rules, ensure_ascii=False))
        _rewrite_config(folder / "tokenizer_config.json", rules, new_ids)
        rebuilt: PreTrainedTokenizerBase = load_tokenizer(folder, trust_remote_code=False, vocab=vocabulary)
    rebuilt.name_or_path = ""
    needed = {name: new_ids[i] for name, i in tokenizer.get_vocab().items() if i in new_ids}
    found = rebuilt.get_vocab()
    if found != needed:
        wrong = sorted({name for name, _ in found.items() ^ needed.items()})
        raise UnsupportedModel(
            f"prune vocabulary: the rebuilt tokenizer gives {len(wrong)} tokens other ids than planned "
            f"({offenders(wrong, limit=5)}). Its ids have holes or repeat; leave this model's vocabulary whole."
        )
    return rebuilt


def renumbered(rules: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return the object of tokenizer.json with the tokens of `new_ids` only, under their new ids."""
    post_processor, padding = rules["post_processor"], rules.get("padding")
    return {
        **rules,
        "model": _model(rules["model"], new_ids),
        "added_tokens": [{**token, "id": new_ids[token["id"]]} for token in rules["added_tokens"]],
        "post_processor": None if post_processor is None else _post_processor(post_processor, new_ids),
        "padding": padding and {**padding, "pad_id": new_ids.get(padding["pad_id"], padding["pad_id"])},
    }


def _model(model: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    if model["type"] == "Unigram":
        pieces = [piece for i, piece in enumerate(model["vocab"]) if i in new_ids]
        unknown = model["unk_id"]
        return {**model, "vocab": pieces, "unk_id": None if unknown is None else new_ids[unknown]}
    vocabulary = {piece: new_ids[i] for piece, i in model["vocab"].items() if i in new_ids}
    merges = [(left, right) for left, right in model["merges"] if {left, right, left + right} <= vocabulary.keys()]
    return {**model, "vocab": vocabulary, "merges": merges}


def _post_processor(part: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    found = dict(part)
    if "processors" in found:
        found["processors"] = [_post_processor(member, new_ids) for member in found["processors"]]
    if "special_tokens" in found:
        found["special_tokens"] = {
            name: {**token, "ids": [new_ids[i] for i in token["ids"]]}
            for name, token in found["special_tokens"].items()
        }
    for end in ("sep", "cls"):
        if end in found:
            found[end] = [found[end][0], new_ids[found[end][1]]]
    return found


def _rewrite_config(path: Path, rules: Mapping[str, Any], new_ids: Mapping[int, int]) -> None:
    """Give tokenizer_config.json the generic class and the new ids."""
    config = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k not in _CLASS_SETTINGS}
    config["tokenizer_class"] = _GENERIC_CLASS
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(new_ids[int(i)]): t for i, t in config["added_tokens_decoder"].items()}
    if "add_prefix_space" in (rules["pre_tokenizer"] or {}):
        config["add_prefix_space"] = rules["pre_tokenizer"]["add_prefix_space"]
    write_json(path, config)
