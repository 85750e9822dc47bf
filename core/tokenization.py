"""Text to ids, one way everywhere: BOS where the tokenizer adds one, never an EOS of its own, no truncation.

`encoding_sha256` says whether two tokenizers mean the same by an id. It hashes what they do with text (vocabulary, BOS,
EOS, the ids of a probe text), not files, which change with the library that wrote them, and not the chat template: a
base model may learn from an instructed teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dwindle.errors import DataError
from dwindle.storage import hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dwindle.token_set import TokenSet

__all__ = ["adds_bos", "encode", "encode_plain", "encode_prefix", "encoding_sha256", "require_tokenizer"]

_PROBE = "One day, 3 cats\tsaid:\n\n  “Größe – 好!” def f(x):\n    return x**2 + 1.50\r\n"


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without any special token added around it."""
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    return found


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer puts a BOS before a text."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    with_specials = tokenizer("a", verbose=False).input_ids
    return bool(with_specials[:1] == [bos] and len(with_specials) > len(encode_plain(tokenizer, ["a"])[0]))


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(tokenizer.bos_token_id)] if adds_bos(tokenizer) else []


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a whole text tokenised once, BOS first where the tokenizer adds one."""
    return _bos(tokenizer) + encode_plain(tokenizer, [text])[0]


def encode_prefix(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> tuple[list[int], int]:
    """Return at most `max_tokens` ids of the start of `text`, and the UTF-8 bytes of the text they stand for.

    The whole text is tokenised once and cut where a token and a character end together, so that the bytes are exact:
    a character spelled by several byte tokens is never split. Raises DataError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__}: a prefix of {max_tokens:,} tokens needs the character offsets that only fast "
            "tokenizers give. Leave the number of evaluation tokens open, or save the model with a fast tokenizer."
        )
    bos = _bos(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = encoded.input_ids, encoded.offset_mapping
    cut = max_tokens - len(bos)
    if cut >= len(ids):
        return bos + ids, len(text.encode())
    while cut > 0 and spans[cut][0] < spans[cut - 1][1]:
        cut -= 1
    return bos + ids[:cut], len(text[: spans[cut][0]].encode())


def encoding_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash that two tokenizers share if and only if they give texts the same ids (probed, see above)."""
    return hash_json(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "adds_bos": adds_bos(tokenizer),
            "probe": encode_plain(tokenizer, [_PROBE])[0],
        }
    )


def require_tokenizer(tokens: TokenSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError unless the set was made with a tokenizer that gives texts the same ids."""
    if tokens.tokenizer_sha256 != encoding_sha256(tokenizer):
        raise DataError(
            f"{tokens.source}: tokenised with another tokenizer than the model's. "
            f"Build the {tokens.role} set again with the model's own tokenizer."
        )
