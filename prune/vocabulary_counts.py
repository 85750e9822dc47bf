"""How often each token of a model stands in a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from dwindle.errors import DataError
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode_plain, require_tokenizer

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Corpora", "TokenCounts", "count_tokens"]

Corpora: TypeAlias = TokenSet | str | Iterable[TokenSet | str]
"""Token sets made with the model's own tokenizer, texts, or both."""

_BATCH_TEXTS = 256


@dataclass(frozen=True)
class TokenCounts:
    """Counts and where they come from."""

    rows: Tensor
    """[V] int64: occurrences by id."""
    sha256: tuple[str, ...]
    """The hashes of the token sets, in order, then one hash of all texts if there were any."""

    @property
    def total(self) -> int:
        """Return the tokens counted."""
        return int(self.rows.sum())

    @property
    def seen(self) -> int:
        """Return the different tokens counted."""
        return int((self.rows > 0).sum())


def count_tokens(bundle: ModelBundle, corpora: Corpora) -> TokenCounts:
    """Return the counts over all corpora; texts are tokenised in batches and may be a generator.

    Raises DataError for an evaluation set, a set of another tokenizer, or corpora without a token.
    """
    vocabulary = bundle.anatomy.vocab
    given = [corpora] if isinstance(corpora, TokenSet | str) else corpora
    rows = torch.zeros(vocabulary, dtype=torch.int64)
    hashes: list[str] = []
    text_hashes: list[bytes] = []

    def texts() -> Iterator[str]:
        for corpus in given:
            if isinstance(corpus, str):
                text_hashes.append(hashlib.sha256(corpus.encode()).digest())
                yield corpus
            else:
                _require_countable(bundle, corpus)
                hashes.append(corpus.sha256)
                rows.add_(_counted(corpus.ids.flatten().cpu(), vocabulary))

    stream = texts()
    while batch := list(islice(stream, _BATCH_TEXTS)):
        for ids in encode_plain(bundle.tokenizer, batch):
            rows.add_(_counted(torch.tensor(ids, dtype=torch.int64), vocabulary))
    if not rows.any():
        raise DataError("prune vocabulary: the corpus holds no token. Give texts of the kind the model is to serve.")
    whole = [hashlib.sha256(b"".join(text_hashes)).hexdigest()] if text_hashes else []
    return TokenCounts(rows, (*hashes, *whole))


def _counted(ids: Tensor, vocabulary: int) -> Tensor:
    """Return the counts [V]; ids of added tokens that the model has no row for are left out."""
    return torch.bincount(ids, minlength=vocabulary)[:vocabulary]


def _require_countable(bundle: ModelBundle, corpus: TokenSet) -> None:
    if corpus.role == "evaluation":
        raise DataError(
            f"{corpus.source}: an evaluation set may not choose the vocabulary it will judge. "
            "Count training or calibration text."
        )
    require_tokenizer(corpus, bundle.tokenizer)
