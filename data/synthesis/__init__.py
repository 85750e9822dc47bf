"""Text written by a model: rephrased, asked about, instructed, continued or from nothing; checked before it counts."""

from __future__ import annotations

from dwindle.data.synthesis.options import SynthesisOptions, VerifierOptions

__all__ = ["SynthesisOptions", "VerifierOptions"]
