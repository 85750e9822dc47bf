"""Documents to one TokenSet: how they are joined, and how the stream is cut into windows.

Training: the stream of a set is

    [BOS] document EOS [BOS] document EOS ...      (BOS where the tokenizer adds one, EOS where it has one)

with stretches of one file that continue each other joined first. A window holds `context` + 1 tokens, the last token
of one being the first of the next, so that a window predicts `context` tokens and each token of the stream is predicted
once.

Calibration: one text, the documents with an empty line between, as evaluation reads it: a model that never saw an EOS
inside a window (llama2.c's) would otherwise be calibrated on states it never has. A window holds `context` tokens.

Windows are shuffled by the seed; the rest of the stream, shorter than one window, is dropped. Evaluation: one row, the
whole text tokenised once (see `core.measure`).

Memory: the text of the documents plus 8 bytes per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.data.document import Document, document_sha256
from dwindle.data.mixture import chosen_windows, counts_of_shares
from dwindle.errors import DataError
from dwindle.token_set import Mixture, Role, TokenSet
from dwindle.tokenization import adds_bos, encode, encode_plain, encode_prefix, encoding_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["joined_text", "pack", "pack_evaluation", "pack_learned", "pack_mixture"]

_PIECE_CHARACTERS = 1 << 20
_BATCH_CHARACTERS = 1 << 22


def joined_text(documents: Sequence[Document]) -> str:
    r"""Return the text of documents: continued ones joined as they were, others with an empty line between.

    >>> joined_text([Document("a\n", "f"), Document("b\n", "f", continues=True), Document("c", "g")])
    'a\nb\n\n\nc'
    """
    parts: list[str] = []
    for document in documents:
        if parts and not document.continues:
            parts.append("\n\n")
        parts.append(document.text)
    return "".join(parts)


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: Role,
    context: int,
    seed: int,
    windows: int | None = None,
) -> TokenSet:
    """Return shuffled windows of a training or calibration set; `windows` keeps only so many.

    Raises DataError if the stream is shorter than one window.
    """
    source = _source_of(documents)
    overlap = 1 if role == "train" else 0
    stream = _stream(_running(documents) if role == "calibration" else documents, tokenizer)
    count = (len(stream) - overlap) // context
    if count < 1:
        raise DataError(
            f"{source}: {len(stream):,} tokens for the role '{role}', but one window needs {context + overlap:,}. "
            "Add data, or set a shorter data.context."
        )
    cut = stream.unfold(0, context + overlap, context)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:windows]
    return _token_set(cut[order], role, documents, tokenizer)


def pack_mixture(
    groups: Sequence[Sequence[Document]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[float],
    most_repeats: int,
    context: int,
    seed: int,
    windows: int | None = None,
) -> TokenSet:
    """Return shuffled training windows in which each group has its share, whatever its size (see `mixture`).

    Raises DataError if a group is shorter than one window.
    """
    sets = [pack(group, tokenizer, role="train", context=context, seed=seed) for group in groups]
    available = [len(one.ids) for one in sets]
    chosen = chosen_windows(available, counts_of_shares(available, weights, most_repeats), seed)[:windows]
    documents = [document for group in groups for document in group]
    return _token_set(torch.cat([one.ids for one in sets])[chosen], "train", documents, tokenizer)


def pack_learned(
    groups: Sequence[Sequence[Document]],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[float],
    every: int,
    held_out: int,
    context: int,
    seed: int,
) -> TokenSet:
    """Return training windows of all groups end to end, with the `Mixture` by which their shares are learned.

    Raises DataError, naming every one, for groups with too few windows to hold some out.
    """
    sets = [pack(group, tokenizer, role="train", context=context, seed=seed) for group in groups]
    few = [f"{name} has {len(one.ids):,}" for name, one in zip(names, sets, strict=True) if len(one.ids) <= held_out]
    if few:
        raise DataError(f"learned weights need more than {held_out} windows of {context + 1:,} tokens from each place: "
                        f"{', '.join(few)}. Add text, or set data.held_out_windows.")  # fmt: skip
    documents = [document for group in groups for document in group]
    made = _token_set(torch.cat([one.ids[held_out:] for one in sets]), "train", documents, tokenizer)
    mixture = Mixture(names=tuple(names), windows=tuple(len(one.ids) - held_out for one in sets), every=every,
                      weights=tuple(weights), held_out=tuple(one.ids[:held_out] for one in sets))  # fmt: skip
    settings = f"{made.sha256} {mixture.windows} {mixture.weights} {every} {held_out}"
    return replace(made, mixture=mixture, sha256=hashlib.sha256(settings.encode()).hexdigest())


def pack_evaluation(
    text: str,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    counted_by: PreTrainedTokenizerBase | None = None,
) -> TokenSet:
    """Return the evaluation set of a text: one row. `max_tokens` cuts ids and text together, so bytes stay exact.

    With `counted_by` these are another tokenizer's tokens: the set is the whole of the text that has so many of them.
    """
    if counted_by is not None and max_tokens is not None:
        text = text.encode()[: encode_prefix(counted_by, text, max_tokens)[1]].decode()
        max_tokens = None
    if max_tokens is None:
        ids, text_bytes = encode(tokenizer, text), len(text.encode())
    else:
        ids, text_bytes = encode_prefix(tokenizer, text, max_tokens)
    if len(ids) < 2:
        raise DataError(f"{_source_of(documents)}: {len(ids)} tokens to evaluate on, at least 2 are needed. Add text.")
    return _token_set(torch.tensor([ids]), "evaluation", documents, tokenizer, text_bytes)


def _source_of(documents: Sequence[Document]) -> str:
    names = list(dict.fromkeys(d.source for d in documents))
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _token_set(
    ids: Tensor,
    role: Role,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    text_bytes: int | None = None,
) -> TokenSet:
    identity = encoding_sha256(tokenizer)
    digest = hashlib.sha256(f"{identity} {tuple(ids.shape)}".encode())
    digest.update(ids.contiguous().numpy().data)
    return TokenSet(
        ids=ids,
        role=role,
        source=_source_of(documents),
        licence=", ".join(sorted({d.licence for d in documents if d.licence})) or None,
        sha256=digest.hexdigest(),
        text_bytes=sum(len(d.text.encode()) for d in documents) if text_bytes is None else text_bytes,
        tokenizer_sha256=identity,
        document_sha256=frozenset(map(document_sha256, documents)),
    )


def _running(documents: Sequence[Document]) -> list[Document]:
    """Return the documents as one: each but the first continues the one before it, behind an empty line."""
    return [
        document if index == 0 or document.continues else Document(f"\n\n{document.text}", document.source, True)
        for index, document in enumerate(documents)
    ]


def _pieces(documents: Sequence[Document]) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether a document begins with it): continued stretches joined, up to about a million characters."""
    text, begins = "", True
    for document in documents:
        if text and not document.continues:
            yield text, begins
            text, begins = "", True
        elif len(text) >= _PIECE_CHARACTERS:
            yield text, begins
            text, begins = "", False
        text += document.text
    if text:
        yield text, begins


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Yield pieces in lists of about four million characters: a fast tokenizer works on all cores at once."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in _pieces(documents):
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stream(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the ids [S] of all documents with BOS and EOS between them."""
    before = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    after = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts, open_document = [torch.empty(0, dtype=torch.int64)], False
    for batch in _batches(documents):
        ids: list[int] = []
        for (_, begins), piece in zip(batch, encode_plain(tokenizer, [text for text, _ in batch]), strict=True):
            if begins:
                ids += (after if open_document else []) + before
            ids += piece
            open_document = True
        parts.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat([*parts, torch.tensor(after if open_document else [], dtype=torch.int64)])
