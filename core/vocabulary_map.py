"""Which token of a full vocabulary each token of a pruned one is, so that a full teacher can teach a pruned student.

The student's ids are renumbered, not respelled: a text in its ids is, through `old_ids`, the same text in the
teacher's, cut into the same tokens. The teacher reads those, and its logits at the kept ids are a distribution over the
student's vocabulary: after the softmax the teacher's own, given that the next token is a kept one. So KL and agreement
between the two are taken over the kept tokens, at the student's positions; what the teacher gave to tokens that are
gone is divided among the others in proportion. Where a text uses such tokens, the student spells it in more and shorter
ones, and nats per token are then those of other tokens than the teacher's: bits per byte compare the two.

A bundle carries the map to the model its vocabulary was cut from (`vocabulary_map.json` beside the weights); cut twice,
it is the map to the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.storage import read_json, write_json
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dwindle.bundle import ModelBundle

__all__ = ["VOCABULARY_MAP_FILE", "Reader", "VocabularyMap", "map_between", "map_from"]

VOCABULARY_MAP_FILE = "vocabulary_map.json"
_SCHEMA = 1
_LARGEST_VOCABULARY = 1 << 24


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
        numbers = (self.vocabulary, *self.kept)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n <= _LARGEST_VOCABULARY for n in numbers):
            raise RecipeError(
                "vocabulary map: the vocabulary and the kept ids must be whole numbers of a model's size."
            )
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

    def then(self, second: VocabularyMap) -> VocabularyMap:
        """Return the map to this one's full vocabulary of what `second` leaves of its pruned one.

        >>> first, second = VocabularyMap(9, (0, 3, 5, 8), "a", "b"), VocabularyMap(4, (1, 3), "b", "c")
        >>> first.then(second)
        VocabularyMap(vocabulary=9, kept=(3, 8), full_sha256='a', pruned_sha256='c')
        """
        if second.full_sha256 != self.pruned_sha256 or second.vocabulary != len(self.kept):
            raise RecipeError(
                f"vocabulary map: the second leads to {second.vocabulary:,} tokens of the tokenizer "
                f"{second.full_sha256[:12]}, the first comes from {len(self.kept):,} of {self.pruned_sha256[:12]}. "
                "Join maps of one model, cut twice."
            )
        kept = tuple(self.kept[i] for i in second.kept)
        return VocabularyMap(self.vocabulary, kept, self.full_sha256, second.pruned_sha256)

    def within(self, larger: VocabularyMap) -> VocabularyMap | None:
        """Return the map to a `larger` cut of the same full vocabulary, or None if that lacks some token.

        >>> VocabularyMap(9, (3, 8), "a", "c").within(VocabularyMap(9, (0, 3, 5, 8), "a", "b"))
        VocabularyMap(vocabulary=4, kept=(1, 3), full_sha256='b', pruned_sha256='c')
        """
        places = {old: new for new, old in enumerate(larger.kept)}
        if larger.full_sha256 != self.full_sha256 or not places.keys() >= set(self.kept):
            return None
        kept = tuple(places[old] for old in self.kept)
        return VocabularyMap(len(larger.kept), kept, larger.pruned_sha256, self.pruned_sha256)

    def require(self, full: PreTrainedTokenizerBase, pruned: PreTrainedTokenizerBase) -> None:
        """Raise RecipeError, naming found and needed, unless these are the two tokenizers the map was made for."""
        pairs = (("full", full, self.full_sha256), ("pruned", pruned, self.pruned_sha256))
        found = [(name, len(tokenizer), encoding_sha256(tokenizer), needed) for name, tokenizer, needed in pairs]
        wrong = [f"{name}: found {digest[:12]} with {size:,} tokens, needed {needed[:12]}"
                 for name, size, digest, needed in found if digest != needed]  # fmt: skip
        if wrong:
            raise RecipeError(
                f"vocabulary map: made for other tokenizers ({'; '.join(wrong)}). "
                "Use the map of this student and the teacher it was pruned from."
            )

    def rows(self, device: torch.device | str = "cpu") -> Tensor:
        """Return [N] int64: the old id of every new one, which are also the rows of the full head that stay."""
        return torch.tensor(self.kept, device=device)

    def old_ids(self, ids: Tensor) -> Tensor:
        """Return the full vocabulary's ids of new ones, int64, of any shape."""
        return self.rows(ids.device)[ids]

    def new_ids(self) -> Tensor:
        """Return [vocabulary] int64: the new id of every old one, -1 for a token that is gone."""
        found = torch.full((self.vocabulary,), -1, dtype=torch.int64)
        found[self.rows()] = torch.arange(len(self.kept))
        return found

    def kept_logits(self, logits: Tensor) -> Tensor:
        """Return [..., N] of the full model's logits [..., V]: those of the kept tokens, in their new order."""
        return logits.index_select(-1, self.rows(logits.device))

    def to_json(self) -> dict[str, Any]:
        """Return the object of `vocabulary_map.json`."""
        return {"schema": _SCHEMA, "kind": "vocabulary_map", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VocabularyMap:
        """Return the map that `to_json` gave; raise RecipeError for anything else."""
        values = dict(data)
        marks = (values.pop("kind", None), values.pop("schema", None))
        if marks != ("vocabulary_map", _SCHEMA) or set(values) != set(cls.__dataclass_fields__):
            raise RecipeError(f"this is no vocabulary map of schema {_SCHEMA} (keys: {offenders(sorted(data))}).")
        return cls(**values)

    def write(self, folder: Path) -> None:
        """Write `vocabulary_map.json` into a folder."""
        write_json(folder / VOCABULARY_MAP_FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> VocabularyMap | None:
        """Return the map in a folder, None if there is none; raise UnsupportedModel for a damaged one."""
        path = folder / VOCABULARY_MAP_FILE
        if not path.is_file():
            return None
        try:
            return cls.from_json(read_json(path))
        except (OSError, ValueError, TypeError, RecipeError) as error:
            raise UnsupportedModel(
                f"{path} cannot be read ({error}). Restore it, or delete it: the model then cannot be held against the "
                "one its vocabulary was cut from."
            ) from error


class _Sized(Protocol):
    @property
    def vocab(self) -> int: ...


class Reader(Protocol):
    """A model that reads ids of a vocabulary: a bundle, or a teacher of any family."""

    @property
    def anatomy(self) -> _Sized:
        """Return what names the vocabulary's size."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return what makes the ids."""
        ...

    @property
    def vocabulary_map(self) -> VocabularyMap | None:
        """Return the map to the vocabulary that this one was cut from."""
        ...


def map_between(teacher: Reader, student: ModelBundle) -> VocabularyMap | None:
    """Return the map by which `teacher` reads what `student` reads; None where both have one vocabulary.

    A teacher of the same tokenizer whose embedding is longer has more rows that stand for no token (Qwen 2.5 pads its
    sizes differently): the student's rows are kept. Raises UnsupportedModel where there is no such map: two
    vocabularies that no cut relates.
    """
    return map_from(teacher, student.anatomy.vocab, student.tokenizer, student.vocabulary_map)


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(int(one) for one in tokenizer.get_vocab().values())


def map_from(
    teacher: Reader, vocabulary: int, tokenizer: PreTrainedTokenizerBase, mapped: VocabularyMap | None
) -> VocabularyMap | None:
    """Return the map of `map_between` for a student known by its vocabulary's size, tokenizer and own map alone."""
    same_size = teacher.anatomy.vocab == vocabulary
    if same_size and (mapped is None or encoding_sha256(teacher.tokenizer) == encoding_sha256(tokenizer)):
        return None
    if mapped is None and teacher.anatomy.vocab > vocabulary:
        spoken = encoding_sha256(teacher.tokenizer)
        if spoken == encoding_sha256(tokenizer) and _largest_id(tokenizer) < vocabulary:  # padded with rows of no token
            return VocabularyMap(teacher.anatomy.vocab, tuple(range(vocabulary)), spoken, spoken)
    sizes = f"the teacher's vocabulary has {teacher.anatomy.vocab:,} entries, the student's {vocabulary:,}"
    if mapped is None:
        raise UnsupportedModel(
            f"{sizes}, and nothing says which token of one is which of the other; KL needs one vocabulary. Choose a "
            f"teacher of the same family, or cut the student's vocabulary with dwindle, which writes "
            f"{VOCABULARY_MAP_FILE}."
        )
    if teacher.vocabulary_map is not None and mapped.full_sha256 != encoding_sha256(teacher.tokenizer):
        mapped = mapped.within(teacher.vocabulary_map) or mapped
    try:
        mapped.require(teacher.tokenizer, tokenizer)
    except RecipeError as error:
        raise UnsupportedModel(f"{sizes}; {error}") from error
    if mapped.vocabulary != teacher.anatomy.vocab:
        raise UnsupportedModel(f"{sizes}; the student's map leads to a vocabulary of {mapped.vocabulary:,}. Use the "
                               "teacher the student was pruned from.")  # fmt: skip
    return mapped
