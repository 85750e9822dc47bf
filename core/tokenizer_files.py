"""The tokenizer of a checkpoint folder: loaded as its files say, checked against the model, and known by a hash.

transformers 4.57 and 5.x disagree on three points that are settled here. The class that takes tokenizer.json as it
stands has another name in each; 5.x writes further special tokens as a list, `extra_special_tokens`, where 4.57 fails
for want of a dict (both read the list as `additional_special_tokens`); and `AutoTokenizer` of 5.x rebuilds some
tokenizers by the model's family instead (Qwen 2), with other rules for cutting words than the file has.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import UnsupportedModel, offenders
from dwindle.model_source import quiet_transformers
from dwindle.storage import hash_json, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer", "name_generic_tokenizer", "tokenizer_class", "tokenizer_sha256"]

_log = logging.getLogger("dwindle")
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that takes tokenizer.json as it is: 4.57's, and 5.x's, which 4.57 does not know."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(folder: Path, *, trust_remote_code: bool, vocab: int) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer, whose ids must fit the model's `vocab`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UnsupportedModel(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)} were looked for). "
            "Copy the files of the model's tokenizer beside its weights."
        )
    try:
        generic = (folder / "tokenizer.json").is_file() and tokenizer_class(folder) in _GENERIC_TOKENIZERS
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = (
                PreTrainedTokenizerFast if generic else AutoTokenizer
            ).from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, **_listed_tokens(folder)
            )
    except BaseException as error:  # the tokenizers library raises plain Exception, and its panics are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UnsupportedModel(f"{folder}: the tokenizer cannot be read ({error}). Copy its files again.") from error
    _require_known_ids(folder, tokenizer, vocab)
    return tokenizer


def _require_known_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Raise UnsupportedModel if ordinary text, BOS or EOS has ids without an embedding; warn of other added tokens.

    Published text models do carry such added tokens (an image token in Gemma 3), which no text contains.
    """
    ends = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    largest = max([tokenizer.vocab_size - 1, *ends])
    if largest >= vocab:
        raise UnsupportedModel(
            f"{folder}: the tokenizer has ids up to {largest:,}, the model embeds {vocab:,}. "
            "Use the tokenizer of this model."
        )
    beyond = [token for token, i in tokenizer.get_added_vocab().items() if i >= vocab]
    if beyond:
        _log.warning("%s: the model has no embedding for added tokens %s", folder.name, offenders(beyond))


def tokenizer_class(folder: Path) -> str | None:
    """Return the class that tokenizer_config.json names, if any."""
    named = _config(folder).get("tokenizer_class")
    return None if named is None else str(named)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return dict(read_json(path)) if path.is_file() else {}


def _listed_tokens(folder: Path) -> dict[str, Any]:
    """Return 5.x's list of further special tokens as the options that both versions read; empty without one."""
    listed = _config(folder).get("extra_special_tokens")
    return {"extra_special_tokens": {}, "additional_special_tokens": listed} if isinstance(listed, list) else {}


def name_generic_tokenizer(folder: Path) -> None:
    """Rewrite 5.x's name of the generic tokenizer class, and its list of special tokens, so that both versions read."""
    config = _config(folder)
    changed = {**config, **_listed_tokens(folder)}
    if tokenizer_class(folder) in _GENERIC_TOKENIZERS:
        changed["tokenizer_class"] = _GENERIC_TOKENIZERS[0]
    if changed != config:
        write_json(folder / "tokenizer_config.json", changed)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return one hash over what a tokenizer does: vocabulary, merges, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    special = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    template = getattr(tokenizer, "chat_template", None)
    return hash_json({"rules": rules, "special": special, "chat_template": template})
