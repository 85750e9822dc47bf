"""Corpora: from files, folders and Hugging Face data sets to packed token sets whose roles never mix.

Token sets need torch; they are imported when they are first asked for, so that reading and curating text does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dwindle.data.options import DataOptions

if TYPE_CHECKING:
    from dwindle.data.token_sets import (
        TokenSets,
        build_token_sets,
        calibration_set,
        evaluation_set,
        training_set,
        training_texts,
        window_of,
    )

__all__ = ["DataOptions", "TokenSets", "build_token_sets", "calibration_set", "evaluation_set", "training_set",
           "training_texts", "window_of"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dwindle.data' has no attribute {name!r}")
    from dwindle.data import token_sets

    return getattr(token_sets, name)
