"""Token ids in config.json and generation_config.json: which ones they name, and the same settings with new ids.

Ids that a model cannot embed (a padding id of -1 in some Llama configs, or one past the vocabulary) name no token:
they are read as absent, and written as None where they would come to mean another token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["named_ids", "renumber"]

_NAMING = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "forced_decoder_ids", "force_words_ids",
)  # fmt: skip
"""Settings whose tokens must exist."""
_FORBIDDING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Settings whose tokens are never to be generated: what does not exist needs no ban."""


def named_ids(settings: object, vocabulary: int) -> set[int]:
    """Return the ids below `vocabulary` that a config or generation config needs."""
    found = (i for name in _NAMING for i in _flat(name, getattr(settings, name, None)))
    return {i for i in found if 0 <= i < vocabulary}


def renumber(settings: object, new_ids: Mapping[int, int]) -> None:
    """Give the token ids in a config or generation config their new numbers, in place."""
    for name in (*_NAMING, *_FORBIDDING):
        value = getattr(settings, name, None)
        if value is not None:
            setattr(settings, name, _mapped(name, value, new_ids))
    bias = getattr(settings, "sequence_bias", None)
    if bias:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        kept = [([new_ids[i] for i in ids], value) for ids, value in pairs if all(i in new_ids for i in ids)]
        whole = {tuple(ids): value for ids, value in kept} if isinstance(bias, Mapping) else [list(p) for p in kept]
        setattr(settings, "sequence_bias", whole or None)  # noqa: B010  (config and generation config alike)


def _flat(name: str, value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif name == "forced_decoder_ids" and value:
        yield from (token for _, token in value if token is not None)
    elif value is not None:
        for member in value:
            yield from _flat(name, member)


def _mapped(name: str, value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, int):
        return value if value < 0 else new_ids.get(value)
    if name == "forced_decoder_ids":
        return [[position, None if token is None else new_ids[token]] for position, token in value]
    if name == "bad_words_ids":
        words = [[new_ids[i] for i in word] for word in value if all(i in new_ids for i in word)]
        return words or None
    if name == "force_words_ids":
        return [_mapped(name, member, new_ids) for member in value]
    return [new_ids[i] for i in value if i in new_ids] or None
