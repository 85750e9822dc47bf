"""How a logit cache is written: every default once. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dwindle.errors import RecipeError

__all__ = ["CACHED_LOSSES", "CacheOptions"]

CACHED_LOSSES = ("forward_kl", "top1_blend", "label_cross_entropy")
"""Losses that are linear in the teacher's probabilities, or read its most probable token only. A sample of the
probabilities gives others (reverse KL, Jensen-Shannon ...) a biased gradient."""
MAX_DRAWS = 255


@dataclass(frozen=True)
class CacheOptions:
    """Where the cache lies and how the teacher is sampled. Only a cache with the same sampling is gone on with."""

    folder: str
    """Folder of the cache."""
    draws: int = 32
    """N: tokens of at least 1/N are kept for certain, others with the probability N p and the weight 1/N."""
    temperature: float = 1.0
    """Temperature of the probabilities that are kept; the losses that read the cache must have the same."""
    always: tuple[int, ...] = ()
    """Ids whose probability is kept at every position, however small: end of text, tool calls."""
    seed: int = 0
    """Seed of the draws."""
    shard_tokens: int = 1 << 19
    """Positions per file: what a kill loses at most."""
    batch_tokens: int = 4096
    """Positions per forward pass of the teacher, whole windows, at least one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "always", tuple(self.always))
        wrong = []
        if not self.folder:
            wrong.append("folder is empty (needed: a folder)")
        if not isinstance(self.draws, int) or not 2 <= self.draws <= MAX_DRAWS:
            wrong.append(f"draws={self.draws!r} (needed: 2 to {MAX_DRAWS})")
        if not 0 < self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature!r} (needed: above 0)")
        if len(set(self.always)) != len(self.always) or any(id_ < 0 for id_ in self.always):
            wrong.append(f"always={list(self.always)} (needed: token ids, each once)")
        wrong += [f"{name}={getattr(self, name)!r} (needed: at least 1)" for name in ("shard_tokens", "batch_tokens")
                  if getattr(self, name) < 1]  # fmt: skip
        if wrong:
            raise RecipeError(f"distill: cache: {'; '.join(wrong)}.")

    @classmethod
    def of(cls, folder: str) -> CacheOptions:
        """Return the options of a cache at `folder`, all else by default: a recipe's `cache: FOLDER`."""
        return cls(folder)

    def wrong_losses(self, losses: Iterable[tuple[str, float]]) -> list[str]:
        """Return a line per loss (name, temperature) that cannot be had from this cache."""
        named = dict(losses)
        wrong = [f"{name} needs more of the teacher than the samples of a cache (needed: {', '.join(CACHED_LOSSES)}, "
                 "or no cache)" for name in named if name not in CACHED_LOSSES]  # fmt: skip
        temperature = named.get("forward_kl", self.temperature)
        if temperature != self.temperature:
            wrong.append(f"forward_kl has temperature={temperature:g}, the cache {self.temperature:g} (needed: equal)")
        return wrong

    @property
    def sampling(self) -> dict[str, Any]:
        """Return what decides the bytes of the cache, as JSON values."""
        values = asdict(self)
        del values["folder"]
        return {**values, "always": list(self.always)}

    @property
    def chosen(self) -> dict[str, Any]:
        """Return what was chosen against the defaults: an existing cache must have it, all else is as it was made."""
        usual = CacheOptions(self.folder).sampling
        return {name: value for name, value in self.sampling.items() if value != usual[name]}
