"""Which token of a full vocabulary each token of a pruned one is, so that a full teacher can teach a pruned student.

The student's ids are renumbered, not respelled: a text in its ids is, through `old_ids`, the same text in the
teacher's, cut into the same tokens. The teacher reads those and its logits at the kept ids, `kept_logits`, are a
distribution over the student's vocabulary: after the softmax the teacher's own, given that the next token is a kept
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.errors import RecipeError, offenders
from dwindle.storage import write_json
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VocabularyMap"]

_SCHEMA = 1


@dataclass(frozen=True)
class VocabularyMap:
    """The old id of every new one, between two tokenizers known by their hashes."""

    vocabulary: int
    """Rows of the full model's embedding."""
    kept: tuple[int, ...]
    """Old ids, ascending: the new id is the place."""
    full_sha256: str
    """`encoding_sha256` of the full tokenizer."""
    pruned_sha256: str
    """`encoding_sha256` of the pruned one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self.kept))
        ascending = all(a < b for a, b in pairwise(self.kept))
        if not self.kept or not ascending or self.kept[0] < 0 or self.kept[-1] >= self.vocabulary:
            raise RecipeError(f"vocabulary map: kept ids must be ascending, below {self.vocabulary:,}, at least one.")

    @classmethod
    def between(
        cls, full: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase, kept: tuple[int, ...], vocabulary: int
    ) -> VocabularyMap:
        """Return the map of two tokenizers; raise RecipeError if a token they share is not where `kept` says."""
        mapped = cls(vocabulary, kept, encoding_sha256(full), encoding_sha256(pruned))
        old = full.get_vocab()
        wrong = [t for t, i in pruned.get_vocab().items() if i < len(mapped.kept) and old.get(t) != mapped.kept[i]]
        if wrong:
            raise RecipeError(
                f"vocabulary map: {len(wrong)} tokens of the pruned tokenizer are other ones in the full tokenizer "
                f"({offenders(sorted(wrong), limit=5)}). Give the two tokenizers of one pruning."
            )
        return mapped

    def require(self, full: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase) -> None:
        """Raise RecipeError unless these are the two tokenizers the map was made for."""
        pairs = (("full", full, self.full_sha256), ("pruned", pruned, self.pruned_sha256))
        wrong = [name for name, tokenizer, needed in pairs if encoding_sha256(tokenizer) != needed]
        if wrong:
            raise RecipeError(
                f"vocabulary map: made for other tokenizers ({' and '.join(wrong)} differ). "
                "Use the map of this student and the teacher it was pruned from."
            )

    def old_ids(self, ids: Tensor) -> Tensor:
        """Return the full vocabulary's ids of new ones, int64, of any shape."""
        return torch.tensor(self.kept, device=ids.device)[ids]

    def new_ids(self) -> Tensor:
        """Return [vocabulary] int64: the new id of every old one, -1 for a token that is gone."""
        found = torch.full((self.vocabulary,), -1, dtype=torch.int64)
        found[torch.tensor(self.kept)] = torch.arange(len(self.kept))
        return found

    def kept_logits(self, logits: Tensor) -> Tensor:
        """Return [..., N] of the full model's logits [..., V]: those of the kept tokens, in their new order."""
        return logits.index_select(-1, torch.tensor(self.kept, device=logits.device))

    def to_json(self) -> dict[str, Any]:
        """Return the object `save` writes."""
        return {"schema": _SCHEMA, "kind": "vocabulary_map", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VocabularyMap:
        """Return the map that `to_json` gave; raise RecipeError for anything else."""
        values = dict(data)
        marks = (values.pop("kind", None), values.pop("schema", None))
        if marks != ("vocabulary_map", _SCHEMA) or set(values) != set(cls.__dataclass_fields__):
            raise RecipeError(f"this is no vocabulary map of schema {_SCHEMA} (keys: {offenders(sorted(data))}).")
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the map as JSON."""
        write_json(path, self.to_json())
