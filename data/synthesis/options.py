"""What to let a model write, how, and what of it to keep. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dwindle.checkers import make_checker
from dwindle.data.synthesis.kinds import kind_of
from dwindle.errors import DwindleError, RecipeError

__all__ = ["SynthesisOptions", "VerifierOptions"]


@dataclass(frozen=True)
class VerifierOptions:
    """A second model that judges what the first one wrote."""

    model: str
    """Folder or Hugging Face id of a causal model."""
    asks: Literal["log_probability", "yes_no"] = "log_probability"
    """log_probability: its mean log-probability per token of the answer behind the question (of the text where there is
    none). yes_no: its probability of yes against no when asked whether the answer is right."""
    least: float | None = None
    """What is kept: at least this, -3.5 or 0.5 unless given."""

    def __post_init__(self) -> None:
        if self.least is None:
            object.__setattr__(self, "least", -3.5 if self.asks == "log_probability" else 0.5)
        if self.asks == "yes_no" and not 0 <= self.limit <= 1:
            raise RecipeError(f"synthesis: verifier least={self.least} (needed: a probability).")

    @property
    def limit(self) -> float:
        """Return the least score kept."""
        assert self.least is not None
        return self.least


@dataclass(frozen=True)
class SynthesisOptions:
    """What is written and what is kept of it."""

    kinds: tuple[str, ...]
    """What to write (see `kinds`): rephrase:easy, questions, instructions, continue, free, template:FILE ..."""
    pieces: int = 1000
    """Pieces to write, the same number of each kind."""
    piece_tokens: int = 300
    """Most tokens of a passage and of a piece: a longer rephrasing loses information (arXiv 2401.16380)."""
    prefix_tokens: int = 16
    """Tokens of a passage that `continue` begins with."""
    temperature: float = 1.0
    """Of sampling; 0 takes the most probable token."""
    top_p: float = 1.0
    """Sample among the most probable tokens that hold this share of the probability."""
    batch_size: int = 16
    """Pieces written together. The text drawn depends on it."""
    least_tokens: int = 8
    """A piece with fewer is dropped."""
    checks: tuple[str, ...] = ()
    """Checkers that a piece must pass (`dwindle.checkers`): arithmetic, python, json:SCHEMA.json, script:FILE ..."""
    verifier: VerifierOptions | None = None
    """A second model that must agree; None: none."""
    novelty_ngram: int = 8
    """Words of the n-grams by which a piece is compared with the corpus."""
    most_overlap: float | None = 0.5
    """Largest share of a piece's n-grams that the corpus may hold; None does not look."""
    most_share: float = 0.5
    """Largest share of synthetic text in the bytes of the whole; 1 where there is no other text."""
    seed: int = 0
    """Choice of passages and draws."""

    def __post_init__(self) -> None:
        for name in ("kinds", "checks"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        wrong = []
        for make, names in ((kind_of, self.kinds), (make_checker, self.checks)):
            for name in names:
                try:
                    make(name)
                except DwindleError as error:
                    wrong.append(str(error).removeprefix("synthesis: ").removesuffix("."))
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            wrong.append(f"kinds={list(self.kinds)} (needed: at least one, each once)")
        wrong += [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least {least})"
            for name, least in (("pieces", 1), ("piece_tokens", 2), ("prefix_tokens", 1), ("batch_size", 1),
                                ("least_tokens", 1), ("novelty_ngram", 1))
            if not getattr(self, name) >= least
        ]  # fmt: skip
        if not self.temperature >= 0:
            wrong.append(f"temperature={self.temperature!r} (needed: at least 0)")
        wrong += [
            f"{name}={value!r} (needed: above 0, at most 1)"
            for name, value in (("top_p", self.top_p), ("most_share", self.most_share))
            if not 0 < value <= 1
        ]
        if self.most_overlap is not None and not 0 <= self.most_overlap < 1:
            wrong.append(f"most_overlap={self.most_overlap!r} (needed: at least 0, below 1, or none)")
        if wrong:
            raise RecipeError(f"synthesis: {'; '.join(wrong)}.")
