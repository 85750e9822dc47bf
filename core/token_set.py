"""A packed corpus with a role: training, calibration and evaluation never mix.

`ids` is [N, T] for training and calibration (N windows of T tokens, every window one slice of a shuffled, packed
stream) and [1, S] for evaluation (the whole text tokenised once; `core.measure` cuts it into windows as the
definition of nats/token asks). A consumer calls `require(role)`, so that a mix-up is an error and not a number
that looks too good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dwindle.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["Mixture", "Role", "TokenSet", "require_disjoint"]

Role = Literal["train", "calibration", "evaluation"]


@dataclass(frozen=True)
class Mixture:
    """Several places in one training set whose shares are learned (`data.learned_mixture`)."""

    names: tuple[str, ...]
    """Of the places."""
    windows: tuple[int, ...]
    """How many each has; `ids` holds them end to end."""
    weights: tuple[float, ...]
    """What their shares are in proportion to at the start."""
    every: int
    """Steps between two changes of the shares."""
    held_out: tuple[torch.Tensor, ...]
    """[H, T] of each place: windows that are measured on and never trained on."""


@dataclass(frozen=True)
class TokenSet:
    """Token ids with where they come from and what they may be used for."""

    ids: torch.Tensor
    """[N, T] int64 token ids."""
    role: Role
    source: str
    """Names of the files or data sets, joined by `, `."""
    sha256: str
    """Hash over the ids and the tokenizer: two equal hashes hold the same tokens."""
    text_bytes: int
    """UTF-8 bytes of the text the ids were made from."""
    tokenizer_sha256: str
    revision: str | None = None
    licence: str | None = None
    document_sha256: frozenset[str] = frozenset()
    """Hashes of the documents inside, to prove that two sets share none."""
    mixture: Mixture | None = None
    """Its places, where their shares are learned during training."""

    @property
    def tokens(self) -> int:
        """Return N * T."""
        return self.ids.numel()

    def require(self, role: Role) -> TokenSet:
        """Return self if it has `role`; raise DataError otherwise."""
        if self.role != role:
            raise DataError(
                f"{self.source}: this token set has the role '{self.role}', but '{role}' is needed. "
                "Build it for that role; the roles never mix."
            )
        return self


def require_disjoint(*sets: TokenSet) -> None:
    """Raise DataError, naming every pair, if two sets of different roles share a document."""
    shared = [
        f"{a.source} ({a.role}) and {b.source} ({b.role}) share {len(a.document_sha256 & b.document_sha256)}"
        for i, a in enumerate(sets)
        for b in sets[i + 1 :]
        if a.role != b.role and a.document_sha256 & b.document_sha256
    ]
    if shared:
        raise DataError("documents stand in two roles: " + "; ".join(shared) + ". Remove them from one side.")
