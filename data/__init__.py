"""Corpora: from files, folders and Hugging Face data sets to packed token sets whose roles never mix."""

from __future__ import annotations

from dwindle.data.options import DataOptions
from dwindle.data.token_sets import (
    TokenSets,
    build_token_sets,
    calibration_set,
    evaluation_set,
    training_set,
    training_texts,
)

__all__ = ["DataOptions", "TokenSets", "build_token_sets", "calibration_set", "evaluation_set", "training_set",
           "training_texts"]  # fmt: skip
