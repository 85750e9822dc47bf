"""How to prune the vocabulary. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from dwindle.errors import RecipeError

__all__ = ["VocabularyOptions"]


@dataclass(frozen=True)
class VocabularyOptions:
    """How many tokens to keep; which ones, the corpus says (see `vocabulary`)."""

    keep: float | None = None
    """Largest share of the vocabulary to keep; None: no such limit. Not together with `size`."""
    size: int | None = None
    """Most tokens to keep; None: no such limit."""
    min_count: int = 1
    """Tokens the corpus holds less often go, even where the limit leaves room; 0 fills the room with unseen ones."""
    multiple: int = 64
    """The new size is rounded up to a multiple of this by keeping more tokens: matrix units want it."""

    def __post_init__(self) -> None:
        wrong = []
        if self.keep is not None and not 0 < self.keep <= 1:
            wrong.append(f"keep={self.keep!r} (needed: above 0, at most 1)")
        for name, least in (("size", 1), ("min_count", 0), ("multiple", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                wrong.append(f"{name}={value!r} (needed: a whole number of at least {least})")
        if self.keep is not None and self.size is not None:
            wrong.append(f"keep={self.keep} and size={self.size} (needed: one of them)")
        if wrong:
            raise RecipeError(f"prune vocabulary: {'; '.join(wrong)}.")

    def limit(self, vocabulary: int) -> int:
        """Return the most tokens that may stay of `vocabulary`, rounded up to the multiple.

        >>> VocabularyOptions(keep=0.5).limit(4000)
        2048
        >>> VocabularyOptions(size=50).limit(105)
        64
        >>> VocabularyOptions().limit(105)
        105
        """
        if self.size is not None:
            return self.rounded(self.size, vocabulary)
        return self.rounded(round((self.keep or 1) * vocabulary), vocabulary)

    def rounded(self, size: int, vocabulary: int) -> int:
        """Return `size` rounded up to the multiple, at most the whole vocabulary.

        >>> VocabularyOptions().rounded(1473, 4096)
        1536
        """
        return min(vocabulary, -(-size // self.multiple) * self.multiple)
