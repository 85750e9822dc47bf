"""Which tokens a model keeps: those a corpus uses, and those no text or chat can do without.

For a small model the vocabulary is the largest saving there is: half of the parameters may be embedding, and a model
that serves one purpose uses a part of its tokens. Tokens are kept in the order of their counts on the user's corpus.
Always kept: special, added and chat-template tokens, those that config and generation config name, byte tokens, and the
characters that nothing else spells; and with a token of BPE all the pieces its merges build it from (see
`tokenizer_pieces`). Text of kept tokens so encodes as before, any other text into more, shorter tokens, and both
decode back exactly.

Counts are those of the full tokenizer, taken once. An order by what a text would cost without a token depends on which
other tokens stay; with counts a plan for 2,000 tokens is a part of the plan for 3,000 but for a token whose pieces no
longer fit.

Embedding rows without a token, which pad many vocabularies to a round number, go first and come back only where
`multiple` wants more rows than there are tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.prune.chat_template_tokens import chat_template_tokens
from dwindle.prune.keep_plan import require_float
from dwindle.prune.token_id_settings import named_ids
from dwindle.prune.tokenizer_pieces import Pieces, read_pieces
from dwindle.prune.vocabulary_counts import Corpora, count_tokens
from dwindle.prune.vocabulary_options import VocabularyOptions
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["essential_tokens", "plan_vocabulary"]


def plan_vocabulary(bundle: ModelBundle, corpora: Corpora, options: VocabularyOptions | None = None) -> VocabularyPlan:
    """Return which tokens to keep: the essential ones, then by count, ties to the lower id.

    Raises RecipeError for a quantized model, a size below the essential tokens or a plan that removes nothing;
    UnsupportedModel for a tokenizer that cannot be rebuilt; DataError for a corpus that is empty, for evaluation, or
    tokenised with another tokenizer.
    """
    options = options or VocabularyOptions()
    require_float(bundle)
    pieces, vocabulary = read_pieces(bundle.tokenizer), bundle.anatomy.vocab
    essential = essential_tokens(bundle, pieces)
    counts = count_tokens(bundle, corpora)
    kept = _choose(pieces, essential, counts.rows, options)
    if len(kept) == vocabulary and options.keep != 1:
        raise RecipeError(
            f"prune vocabulary: all {vocabulary:,} tokens stay ({len(essential):,} are essential, the corpus holds "
            f"{counts.seen:,}, sizes are multiples of {options.multiple}). "
            "Lower size, keep or multiple, or raise min_count."
        )
    head = bundle.model.get_output_embeddings()
    return VocabularyPlan(
        vocabulary=vocabulary,
        tokenizer_sha256=encoding_sha256(bundle.tokenizer),
        tokens=tuple((i, int(counts.rows[i]), pieces.names.get(i, "")) for i in kept),
        essential=len(essential),
        seen=counts.seen,
        coverage=int(counts.rows[torch.tensor(kept)].sum()) / counts.total,
        corpus_tokens=counts.total,
        corpus_sha256=counts.sha256,
        parameters_before=bundle.size().parameters,
        parameters_per_token=(1 if bundle.anatomy.tied else 2) * bundle.anatomy.width + (head.bias is not None),
    )


def essential_tokens(bundle: ModelBundle, pieces: Pieces) -> set[int]:
    """Return the rows that stay whatever a corpus says.

    Added tokens that the model has no row for stay as well, in the tokenizer alone. Raises UnsupportedModel if other
    tokens have none.
    """
    vocabulary = bundle.anatomy.vocab
    beyond = [name for i, name in pieces.names.items() if i >= vocabulary and i not in pieces.essential]
    if beyond:
        raise UnsupportedModel(
            f"prune vocabulary: the model embeds {vocabulary:,} tokens, but the tokenizer has {len(beyond)} more "
            f"({offenders(sorted(beyond), limit=5)}). Use the tokenizer of this model."
        )
    named = pieces.essential | chat_template_tokens(bundle.tokenizer)
    rows = {i for i in pieces.closure(named) if i < vocabulary}
    for settings in (bundle.model.config, bundle.model.generation_config):
        rows |= named_ids(settings, vocabulary)
    return rows


def _choose(pieces: Pieces, essential: set[int], counts: Tensor, options: VocabularyOptions) -> list[int]:
    """Return the ids to keep, ascending: essential, then by count while they fit, then up to the multiple."""
    vocabulary = len(counts)
    limit = options.limit(vocabulary)
    if len(essential) > limit:
        raise RecipeError(
            f"prune vocabulary: {limit:,} of {vocabulary:,} tokens were asked for, but {len(essential):,} cannot go: "
            "special, added and chat-template tokens, bytes and characters, and what they are built from. "
            f"The smallest reachable size is {options.rounded(len(essential), vocabulary):,}."
        )
    order = [i for i in counts.argsort(descending=True, stable=True).tolist() if i in pieces.names]
    kept = set(essential)

    def add(tokens: Iterable[int], size: int) -> None:
        for token in tokens:
            if len(kept) == size:
                return
            missing = pieces.needs(token) - kept
            if len(kept) + len(missing) <= size:
                kept.update(missing)

    add((i for i in order if counts[i] >= options.min_count), limit)
    target, before = options.rounded(len(kept), vocabulary), -1
    while before < len(kept) < target:  # a token passed over for its pieces may fit once they are there
        before = len(kept)
        add(order, target)
    past = 1 + max(i for i in pieces.names if i < vocabulary)
    return sorted(kept.union(islice(range(past, vocabulary), target - len(kept))))
