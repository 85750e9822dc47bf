"""Cut a VocabularyPlan out of a model and its tokenizer.

Ids are renumbered in their old order. The rows of embedding and head (and its bias) are selected, never computed: the
pruned model's logits are the full model's at the kept ids. Config, generation config and all files of the tokenizer
follow the new ids. The result carries the map to the full vocabulary (`vocabulary_map`): to the first one, if it was
cut before.

Memory: the full model plus the pruned one; the full embedding and head are never copied.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dwindle.anatomy import anatomy_of, module
from dwindle.errors import RecipeError, offenders
from dwindle.prune.keep_plan import require_float
from dwindle.prune.token_id_settings import renumber
from dwindle.prune.tokenizer_pieces import Pieces, read_pieces
from dwindle.prune.tokenizer_surgery import rebuild
from dwindle.prune.vocabulary import essential_tokens
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.storage import hash_json
from dwindle.vocabulary_map import VocabularyMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle

__all__ = ["cut_vocabulary", "with_plan_tokens"]


def cut_vocabulary(bundle: ModelBundle, plan: VocabularyPlan) -> ModelBundle:
    """Return a new bundle with the plan's tokens only; the bundle given is left as it is.

    Raises RecipeError for a quantized model, a plan made for another one, or one that misses tokens that must stay;
    UnsupportedModel for a tokenizer that cannot be rebuilt.
    """
    require_float(bundle)
    ends = [module(bundle.model, name) for name in (bundle.anatomy.embedding, bundle.anatomy.head)]
    model: PreTrainedModel = copy.deepcopy(bundle.model, {id(p): p for end in ends for p in end.parameters()})
    cut = with_plan_tokens(replace(bundle, model=model), plan)
    options = {"vocabulary": [plan.vocabulary, len(plan.tokens)]}
    return cut.derive(cut.model, "prune", options, {"plan": hash_json(plan.to_json())}).stored_dtype_rounded()


def with_plan_tokens(bundle: ModelBundle, plan: VocabularyPlan) -> ModelBundle:
    """Return the bundle with the plan's tokens only: its model is cut in place, its lineage left as it is.

    Raises as `cut_vocabulary` does, before anything is changed.
    """
    plan.require(bundle)
    pieces = read_pieces(bundle.tokenizer)
    _require_whole(plan, pieces, essential_tokens(bundle, pieces))
    rows = {old: new for new, old in enumerate(plan.kept)}
    tokenizer = rebuild(bundle.tokenizer, _token_ids(pieces, plan, rows), len(rows))
    mapped = VocabularyMap.between(bundle.tokenizer, tokenizer, plan.kept, plan.vocabulary)
    if bundle.vocabulary_map is not None:
        mapped = bundle.vocabulary_map.then(mapped)
    _cut_model(bundle, plan, rows)
    return replace(bundle, tokenizer=tokenizer, anatomy=anatomy_of(bundle.model.config), vocabulary_map=mapped)


def _require_whole(plan: VocabularyPlan, pieces: Pieces, essential: set[int]) -> None:
    """Raise RecipeError if an edited plan took out what must stay or what a kept token is built from."""
    kept = set(plan.kept)
    missing = sorted((essential | pieces.closure(i for i in kept if i in pieces.names)) - kept)
    if missing:
        listed = offenders(f"{pieces.names.get(i, '')!r} ({i})" for i in missing)
        raise RecipeError(
            f"vocabulary plan: {len(missing)} tokens are missing that must stay, or that kept tokens are built from: "
            f"{listed}. Put them back into the plan."
        )


def _token_ids(pieces: Pieces, plan: VocabularyPlan, rows: Mapping[int, int]) -> dict[int, int]:
    """Return the new id of every token that stays; those the model has no row for follow the last row."""
    beyond = sorted(i for i in pieces.names if i >= plan.vocabulary)
    tokens = {old: new for old, new in rows.items() if old in pieces.names}
    return tokens | {old: len(rows) + n for n, old in enumerate(beyond)}


def _cut_model(bundle: ModelBundle, plan: VocabularyPlan, rows: Mapping[int, int]) -> None:
    """Leave the kept rows of embedding and head in the model, and settings that name the new ids."""
    model, kept = bundle.model, torch.tensor(plan.kept, device=bundle.model.device)
    embedding, head = module(model, bundle.anatomy.embedding), module(model, bundle.anatomy.head)
    _select(embedding, kept)
    _select(head, kept)
    if bundle.anatomy.tied:
        cast(nn.Linear, head).weight = cast(nn.Embedding, embedding).weight
    for part in model.modules():
        if getattr(part, "vocab_size", None) == plan.vocabulary:
            setattr(part, "vocab_size", len(rows))  # noqa: B010  (modules declare no such attribute)
        padding = getattr(part, "padding_idx", None)
        if padding is not None:
            setattr(part, "padding_idx", rows.get(padding))  # noqa: B010
    model.config.vocab_size = len(rows)
    model.generation_config = copy.deepcopy(model.generation_config)  # cutting other axes hands the full model's on
    for settings in (model.config, model.generation_config):
        renumber(settings, rows)


def _select(part: nn.Module, kept: Tensor) -> None:
    """Leave the kept rows of an embedding or head; whatever else its class holds stays."""
    for name, parameter in list(part.named_parameters(recurse=False)):
        chosen = parameter.detach().index_select(0, kept)
        setattr(part, name, nn.Parameter(chosen, requires_grad=parameter.requires_grad))
    setattr(part, "num_embeddings" if isinstance(part, nn.Embedding) else "out_features", len(kept))
