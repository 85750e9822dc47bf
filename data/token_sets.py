"""The three token sets of a run, and the rule that keeps their roles apart.

A role with a place of its own takes all of that place; the others come out of the training documents: the last
`evaluation_share` of the text is held out for evaluation, and calibration takes documents drawn at random from the
rest. A document that stands twice in the training data goes to one role only. Places of different roles may not be
the same or lie inside each other, nor share a document.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from dwindle.data.corpus_folder import of_corpus, role_folder
from dwindle.data.document import Document, document_sha256
from dwindle.data.options import DataOptions
from dwindle.data.packing import joined_text, pack, pack_evaluation, pack_learned, pack_mixture
from dwindle.data.sources import Source, check_sources, is_plain_text, read_documents, read_text
from dwindle.errors import DataError
from dwindle.token_set import TokenSet, require_disjoint
from dwindle.tokenization import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenSets", "build_token_sets", "calibration_set", "evaluation_set", "training_set",
           "training_texts", "window_of"]  # fmt: skip

_LOG = logging.getLogger("dwindle")

_LONGEST_DEFAULT_CONTEXT = 2048
_CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer packs into a token on average: reading this many characters per wanted token is enough."""
_CALIBRATION_SHARE = 0.25
"""Calibration takes no more than this share of the training text."""


@dataclass(frozen=True)
class TokenSets:
    """The data of one run, by role."""

    train: TokenSet
    calibration: TokenSet
    evaluation: TokenSet
    held_out_text: str | None = None
    """The evaluation text if it was held out of the training data: written to a file, `evaluation_set` of that file
    gives the same set again."""


def build_token_sets(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    counted_by: PreTrainedTokenizerBase | None = None,
) -> TokenSets:
    """Return the three sets; `context` is the model's. Raises DataError for unusable, shared or too little data.

    `counted_by` is the tokenizer by which the text is divided among the roles, if not `tokenizer`: with it the sets of
    a model with a pruned vocabulary hold the very documents that those of the full model do.
    """
    options = of_corpus(options)
    roles = {"train": options.train, "calibration": options.calibration, "evaluation": options.evaluation}
    places = {role: (p,) if isinstance(p, str) else p for role, p in roles.items() if p is not None}
    check_sources([place for found in places.values() for place in found], options.text_column)
    _refuse_shared_places(places)
    window = window_of(options, context)
    train = _documents(options.train, options.text_column, options.train_tokens)
    held_out_text: str | None = None
    if options.evaluation is None:
        train, held_out = _hold_out_tail(train, options.evaluation_share)
        held_out_text = joined_text(held_out)
        evaluation = pack_evaluation(held_out_text, held_out, tokenizer, options.evaluation_tokens, counted_by)
    else:
        evaluation = evaluation_set(options.evaluation, tokenizer, text_column=options.text_column,
                                    max_tokens=options.evaluation_tokens, counted_by=counted_by)  # fmt: skip
    if options.calibration is None:
        train, drawn = _draw(train, options.calibration_windows * window, counted_by or tokenizer, options.seed)
    else:
        drawn = _documents([options.calibration], options.text_column, None)
    calibration = pack(drawn, tokenizer, role="calibration", context=window, seed=options.seed,
                       windows=options.calibration_windows)  # fmt: skip
    if len(calibration.ids) < options.calibration_windows:
        _LOG.warning("calibration: %d windows instead of %d: there is no more text for it",
                     len(calibration.ids), options.calibration_windows)  # fmt: skip
    taken = calibration.document_sha256 | evaluation.document_sha256
    sets = TokenSets(_pack_training(train, tokenizer, window, options, taken), calibration, evaluation, held_out_text)
    require_disjoint(sets.train, sets.calibration, sets.evaluation)
    return sets


def training_set(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, context: int, *, apart_from: Iterable[TokenSet] = ()
) -> TokenSet:
    """Return a training set of all that `options.train` names, but for the documents of other sets."""
    options = of_corpus(options)
    check_sources(options.train, options.text_column)
    taken = frozenset[str]().union(*(one.document_sha256 for one in apart_from))
    documents = _without(_documents(options.train, options.text_column, options.train_tokens), taken)
    if not documents:
        raise DataError(f"{', '.join(options.train)}: all of it serves calibration or evaluation. Add data.")
    return _pack_training(documents, tokenizer, window_of(options, context), options, taken)


def calibration_set(options: DataOptions, tokenizer: PreTrainedTokenizerBase, context: int) -> TokenSet:
    """Return a calibration set from `options.calibration` if it is given, else from all that `options.train` names."""
    options = of_corpus(options)
    places = options.train if options.calibration is None else (options.calibration,)
    check_sources(places, options.text_column)
    documents = _documents(places, options.text_column, options.train_tokens)
    return pack(documents, tokenizer, role="calibration", context=window_of(options, context), seed=options.seed,
                windows=options.calibration_windows)  # fmt: skip


def evaluation_set(
    place: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = DataOptions.text_column,
    max_tokens: int | None = None,
    counted_by: PreTrainedTokenizerBase | None = None,
) -> TokenSet:
    """Return the evaluation set of a place: a text file exactly as it is, or documents with an empty line between.

    `counted_by` is the tokenizer that `max_tokens` counts by, if not `tokenizer`.
    """
    place = role_folder(place, "evaluation")
    check_sources([str(place)], text_column)
    documents = _documents([str(place)], text_column, None)
    source = Source.parse(str(place), text_column)
    text = read_text(source.path) if is_plain_text(source.path) else joined_text(documents)
    return pack_evaluation(text, documents, tokenizer, max_tokens, counted_by)


def training_texts(options: DataOptions) -> Iterator[str]:
    """Yield the texts of all that `options.train` names, document by document."""
    check_sources(options.train, options.text_column)
    for place in options.train:
        yield from (document.text for document in read_documents(place, options.text_column))


def window_of(options: DataOptions, context: int) -> int:
    """Return the tokens that a window predicts; raise DataError for more than the model's `context`."""
    if options.context is None:
        return min(context, _LONGEST_DEFAULT_CONTEXT)
    if options.context > context:
        raise DataError(
            f"data.context={options.context:,} is longer than the model's context of {context:,}. Shorten it, or "
            "stretch the model by rope_scaling in its config.json (docs/data.md, Curricula)."
        )
    return options.context


def _refuse_shared_places(places: dict[str, tuple[str, ...]]) -> None:
    """Raise DataError, naming every pair, if a place serves two roles or lies inside one of another role."""
    listed = [
        (role, place, Source.parse(place, "").path.resolve()) for role, found in places.items() for place in found
    ]
    shared = [
        f"{one} ({role}) and {other} ({other_role})"
        for (role, one, a), (other_role, other, b) in combinations(listed, 2)
        if role != other_role and (a == b or a in b.parents or b in a.parents)
    ]
    if shared:
        raise DataError(
            f"one place in two roles: {'; '.join(shared)}. Roles never mix: leave data.calibration or data.evaluation "
            "out, and documents for it are taken out of the training data."
        )


def _documents(places: Iterable[str], column: str, tokens: int | None) -> list[Document]:
    found: list[Document] = []
    characters = 0
    for place in places:
        for document in read_documents(place, column):
            if tokens is not None and characters >= tokens * _CHARACTERS_PER_TOKEN:
                return found
            found.append(document)
            characters += len(document.text)
    if not found:
        raise DataError(f"{', '.join(places)}: no text in it. Name data with text in column '{column}'.")
    return found


def _pack_training(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    options: DataOptions,
    taken: Set[str] = frozenset(),
) -> TokenSet:
    """Return the training windows of documents; with weights, those of the places without what is `taken`."""
    windows = None if options.train_tokens is None else max(1, options.train_tokens // window)
    if options.weights is None:
        return pack(documents, tokenizer, role="train", context=window, seed=options.seed, windows=windows)
    groups = [_without(_documents([place], options.text_column, None), taken) for place in options.train]
    empty = [place for place, group in zip(options.train, groups, strict=True) if not group]
    if empty:
        raise DataError(f"{', '.join(empty)}: all of it serves calibration or evaluation, and its weight asks for some "
                        "in training. Add data, or name an evaluation text with data.evaluation.")  # fmt: skip
    if options.learn_weights_every is not None:
        return pack_learned(groups, options.train, tokenizer, weights=options.weights, context=window,
                            every=options.learn_weights_every, held_out=options.held_out_windows,
                            seed=options.seed)  # fmt: skip
    return pack_mixture(groups, tokenizer, weights=options.weights, most_repeats=options.most_repeats, context=window,
                        seed=options.seed, windows=windows)  # fmt: skip


def _without(documents: Sequence[Document], taken: Set[str]) -> list[Document]:
    """Return the documents whose text is not taken; what followed a taken one does not continue anything any more."""
    kept: list[Document] = []
    gap = False
    for document in documents:
        if document_sha256(document) in taken:
            gap = True
            continue
        broken = gap and document.continues
        kept.append(replace(document, continues=False) if broken else document)
        gap = False
    return kept


def _hold_out_tail(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Return (training documents, the last documents, together at least `share` of the characters)."""
    wanted = share * sum(len(d.text) for d in documents)
    start = len(documents)
    while start > 0 and wanted > 0:
        start -= 1
        wanted -= len(documents[start].text)
    held_out = list(documents[start:])
    rest = _without(documents[:start], {document_sha256(d) for d in held_out})
    if not rest:
        raise DataError(
            f"{documents[0].source}: {len(documents)} document(s) are too few to hold some out for evaluation. "
            "Add data, or name an evaluation text with data.evaluation."
        )
    return rest, held_out


def _draw(
    documents: Sequence[Document], tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return (training documents, documents drawn at random with about `tokens` tokens, at most a quarter of all)."""
    limit = _CALIBRATION_SHARE * sum(len(d.text) for d in documents)
    order = random.Random(seed).sample(range(len(documents)), len(documents))  # noqa: S311  (no secret)
    drawn: set[str] = set()
    for index in order:
        if tokens <= 0 or (drawn and limit < len(documents[index].text)):
            break
        drawn.add(document_sha256(documents[index]))
        limit -= len(documents[index].text)
        tokens -= len(encode_plain(tokenizer, [documents[index].text])[0])
    rest = _without(documents, drawn)
    if not rest:
        raise DataError(
            f"{documents[0].source}: {len(documents)} document(s) are too few to draw some for calibration. "
            "Add data, or name a calibration text with data.calibration."
        )
    taken = _without(documents, {document_sha256(d) for d in rest})
    return rest, taken
