"""What the pieces of a tokenizer are built from, and which of them no text can do without.

A vocabulary can be cut without changing what the kept tokens mean if two things hold.

**Text of kept tokens encodes as before.** BPE (Sennrich et al. 2016, arXiv 1508.07909) starts from characters and
always applies the earliest merge in the list that fits, leftmost first. No merge crosses the border of a token that is
in the result, so the merges inside it are those that build it when it stands alone: its derivation is unique, although
the list may hold several merges with the same result ("o" + "ut" and "ou" + "t"). Keep all pieces of that derivation
and, of the list, the merges of kept pieces: then every step of the old encoding is still the earliest that fits.
Unigram (Kudo 2018, arXiv 1804.10959) takes the path of the highest total score; fewer pieces leave fewer paths, the old
best among them. Only its score of an unknown character depends on the whole vocabulary (the lowest score less 10), so
one piece with the lowest score always stays.

**Any text decodes back.** Single characters stay, unless byte tokens spell them (byte fallback) and the decoder joins
those again; in byte-level BPE the 256 characters of its alphabet are the single characters. The character that stands
for a space stays: decoders replace it before they join bytes.

Pieces are read from the JSON of tokenizer.json, which says all of this; the kinds that are refused are those where it
does not hold (WordPiece marks continuations by spelling, WordLevel knows whole words only).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dwindle.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pieces", "read_pieces", "read_rules"]

_SPACE = "\u2581"
"""The lower one eighth block, which SentencePiece writes for a space."""
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
"""Decoders that give the same text for the same characters, however they are cut into tokens."""
_POST_PROCESSORS = {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}


@dataclass(frozen=True)
class Pieces:
    """The tokens of a tokenizer by id, those that must stay, and what each of them needs."""

    names: Mapping[int, str]
    """All tokens, the added ones included."""
    essential: frozenset[int]
    """Tokens that stay whatever the corpus says."""
    _ranks: Mapping[tuple[str, str], int]
    """Merges in their order; empty for Unigram."""
    _ids: Mapping[str, int]
    _needs: dict[int, frozenset[int]] = field(default_factory=dict, repr=False, compare=False)

    def needs(self, token: int) -> frozenset[int]:
        """Return the token and all pieces from which the merges build it."""
        if token not in self._needs:
            steps = _derivation(self.names[token], self._ranks) if self._ranks else []
            built = bool(steps) and steps[-1] == self.names[token]
            self._needs[token] = frozenset({token, *(self._ids[s] for s in steps if built and s in self._ids)})
        return self._needs[token]

    def closure(self, tokens: Iterable[int]) -> set[int]:
        """Return the tokens and everything they need."""
        return set().union(*(self.needs(token) for token in tokens))


def _derivation(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the characters of a piece and the result of each merge BPE applies to it alone, in order.

    >>> _derivation("out", {("o", "u"): 0, ("ou", "t"): 1, ("o", "ut"): 2})
    ['o', 'u', 't', 'ou', 'out']
    """
    symbols = list(piece)
    found = list(symbols)
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        found.append(symbols[i])
    return found


def read_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the object of tokenizer.json; raise UnsupportedModel for a kind whose vocabulary cannot be cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"prune vocabulary: {type(tokenizer).__name__} has no tokenizer.json to rebuild. "
            "Save the model with a fast tokenizer, or leave its vocabulary whole."
        )
    rules: dict[str, Any] = json.loads(backend.to_str())
    problems = [*_model_problems(rules["model"]), *_decoder_problems(rules)]
    unknown = {p["type"] for p in _parts(rules["post_processor"], "processors")} - _POST_PROCESSORS
    problems += [f"post-processor {kind}, of which it is not known where it holds ids" for kind in sorted(unknown)]
    if problems:
        raise UnsupportedModel(
            f"prune vocabulary: the tokenizer cannot be rebuilt ({'; '.join(problems)}). "
            "BPE and Unigram tokenizers can; leave this model's vocabulary whole."
        )
    return rules


def read_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """Return the pieces of a BPE or Unigram tokenizer. Raises UnsupportedModel for any other."""
    rules = read_rules(tokenizer)
    model = rules["model"]
    ids = _vocabulary(model)
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    essential = {*(i for name, i in ids.items() if name in _BYTE_TOKENS), *_irreplaceable(rules, ids)}
    essential |= {token["id"] for token in rules["added_tokens"]} | set(tokenizer.all_special_ids)
    essential |= set(_post_processor_ids(rules))
    if model["type"] == "BPE":
        essential |= {ids[model["unk_token"]]} if model.get("unk_token") in ids else set()
        ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        return Pieces(names, frozenset(essential), ranks, ids)
    essential |= {model["unk_id"]} if model["unk_id"] is not None else set()
    essential.add(min(range(len(model["vocab"])), key=lambda i: float(model["vocab"][i][1])))
    return Pieces(names, frozenset(essential), {}, ids)


def _model_problems(model: Mapping[str, Any]) -> Iterator[str]:
    if model["type"] not in ("BPE", "Unigram"):
        yield f"its model is {model['type']}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            yield f"it has {name}={model[name]!r}"


def _decoder_problems(rules: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the decoded text depends on how the characters are cut into tokens."""
    parts = _parts(rules["decoder"], "decoders")
    kinds = [part["type"] for part in parts]
    if not parts:
        yield "it has no decoder: tokens are joined by spaces"
    for kind in sorted(set(kinds) - _DECODERS):
        yield f"decoder {kind}"
    if "Strip" in kinds and "Fuse" not in kinds[: kinds.index("Strip")]:
        yield "decoder Strip before Fuse"
    if any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts):
        spaced = [name for name in _vocabulary(rules["model"]) if _SPACE in name[1:]]
        if spaced:
            yield f"decoder Metaspace loses the spaces of a first token such as {spaced[0]!r}"


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the members of a normalizer, decoder or post-processor: of a Sequence its own, else the part itself."""
    if part is None:
        return []
    return [p for member in part[key] for p in _parts(member, key)] if part["type"] == "Sequence" else [part]


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    found = model["vocab"]
    return dict(found) if isinstance(found, dict) else {piece: i for i, (piece, _) in enumerate(found)}


def _irreplaceable(rules: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[int]:
    """Yield the pieces without which some text could not be spelled."""
    falls_back = rules["model"].get("byte_fallback") and any(
        part["type"] == "ByteFallback" for part in _parts(rules["decoder"], "decoders")
    )

    def spelled(character: str) -> bool:
        return bool(falls_back) and all(_BYTE_TOKENS[byte] in ids for byte in character.encode())

    for name, i in ids.items():
        single = len(name) == 1 and (name == _SPACE or not spelled(name))
        if single or (rules["model"]["type"] == "Unigram" and any(c not in ids and not spelled(c) for c in name)):
            yield i


def _post_processor_ids(rules: Mapping[str, Any]) -> Iterator[int]:
    for part in _parts(rules["post_processor"], "processors"):
        for token in part.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (part[end][1] for end in ("sep", "cls") if end in part)
