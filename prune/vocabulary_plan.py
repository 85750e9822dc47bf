"""Which tokens stay, decided before anything is cut, as JSON to read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, offenders
from dwindle.storage import write_json
from dwindle.tokenization import encoding_sha256
from dwindle.typed_json import require_types

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["VocabularyPlan"]

_SCHEMA = 1


@dataclass(frozen=True)
class VocabularyPlan:
    """Tokens to keep, with what the corpus says about them. To edit: take lines out of `tokens`, or put some in."""

    vocabulary: int
    """Rows of the model's embedding before."""
    tokenizer_sha256: str
    """`encoding_sha256` of the tokenizer the ids belong to."""
    tokens: tuple[tuple[int, int, str], ...]
    """Ids to keep, ascending (the new id is the place), each with its count in the corpus and its spelling."""
    essential: int
    """Tokens that stay whatever the corpus says, with the pieces they are built from."""
    seen: int
    """Different tokens the corpus holds."""
    coverage: float
    """Share of the corpus's tokens that are kept ones."""
    corpus_tokens: int
    corpus_sha256: tuple[str, ...]
    """Hashes of the token sets or texts that were counted."""
    parameters_before: int
    parameters_per_token: int
    """What one token costs: its row of the embedding and, untied, of the head with its bias."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(tuple(token) for token in self.tokens))
        object.__setattr__(self, "corpus_sha256", tuple(self.corpus_sha256))
        wrong = ""
        if not self.tokens:
            wrong = "keeps nothing"
        elif list(self.kept) != sorted(set(self.kept)):
            wrong = "ids are not ascending, or one stands twice"
        elif self.kept[0] < 0 or self.kept[-1] >= self.vocabulary:
            wrong = f"ids from {self.kept[0]:,} to {self.kept[-1]:,} of {self.vocabulary:,}"
        if wrong:
            raise RecipeError(f"vocabulary plan: {wrong}. Keep ascending ids below {self.vocabulary:,}.")

    @property
    def kept(self) -> tuple[int, ...]:
        """Return the old ids in the order of the new ones."""
        return tuple(token for token, _, _ in self.tokens)

    @property
    def parameters_after(self) -> int:
        """Return the parameters the pruned model will have."""
        return self.parameters_before - (self.vocabulary - len(self.tokens)) * self.parameters_per_token

    def require(self, bundle: ModelBundle) -> None:
        """Raise RecipeError unless the plan was made for a model of this vocabulary and tokenizer."""
        if self.vocabulary != bundle.anatomy.vocab:
            raise RecipeError(
                f"vocabulary plan: made for {self.vocabulary:,} tokens, the model embeds {bundle.anatomy.vocab:,}. "
                "Make a plan from this model."
            )
        if self.tokenizer_sha256 != encoding_sha256(bundle.tokenizer):
            raise RecipeError(
                "vocabulary plan: made for another tokenizer than the model's (their hashes differ). "
                "Make a plan from this model."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the object `save` writes."""
        return {"schema": _SCHEMA, "kind": "vocabulary_plan", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VocabularyPlan:
        """Return the plan that `to_json` gave; raise RecipeError for anything else."""
        values = dict(data)
        marks = (values.pop("kind", None), values.pop("schema", None))
        if marks != ("vocabulary_plan", _SCHEMA) or set(values) != set(cls.__dataclass_fields__):
            raise RecipeError(f"this is no vocabulary plan of schema {_SCHEMA} (keys: {offenders(sorted(data))}).")
        try:
            made = cls(**values)
            require_types(made)
            return made
        except (TypeError, ValueError) as error:
            raise RecipeError(f"this vocabulary plan is damaged: {error}.") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())
