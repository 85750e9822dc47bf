"""What to read for training, calibration and evaluation. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from dwindle.errors import RecipeError

__all__ = ["DataOptions"]


@dataclass(frozen=True)
class DataOptions:
    """Places of the three roles (see `sources`) and how they are cut."""

    train: tuple[str, ...]
    """Files, folders or data sets to train on."""
    calibration: str | None = None
    """Place of the calibration text; None draws documents out of the training data, which then lack them."""
    evaluation: str | None = None
    """Place of the evaluation text; None holds out the last part of the training data."""
    text_column: str = "text"
    """Column of .jsonl, .json, .csv, .parquet and data sets; `PLACE::COLUMN` overrides it for one place."""
    context: int | None = None
    """Tokens a window predicts; None is the model's context, but at most 2,048."""
    calibration_windows: int = 128
    """Calibration windows (fewer if a quarter of the training text is less than that)."""
    evaluation_share: float = 0.02
    """Share of the training text that is held out when `evaluation` is None."""
    evaluation_tokens: int | None = None
    """Evaluate on the first so many tokens; None is the whole text."""
    train_tokens: int | None = None
    """Read at most about this much training data; None is all of it."""
    weights: tuple[float, ...] | None = None
    """Shares of the places of `train` in the tokens trained on, in their order; None takes all there is of each."""
    most_repeats: int = 1
    """With weights: how often a place may be gone through where it is too small for its share."""
    learn_weights_every: int | None = None
    """With weights, in distillation: every so many steps they follow what is left to learn of each place; None: never
    (`learned_mixture`)."""
    held_out_windows: int = 8
    """With learned weights: windows of each place that are measured on and not trained on."""
    seed: int = 0
    """Order of the windows and choice of the calibration documents."""

    def __post_init__(self) -> None:
        places = (self.train,) if isinstance(self.train, str) else tuple(self.train)
        object.__setattr__(self, "train", places)
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
        wrong = []
        if self.weights is not None and (len(self.weights) != len(places) or not all(w > 0 for w in self.weights)):
            wrong.append(f"weights={list(self.weights)!r} (needed: a number above 0 for each of {len(places)} places)")
        if not self.most_repeats >= 1:
            wrong.append(f"most_repeats={self.most_repeats!r} (needed: a whole number of at least 1)")
        if not places or not all(isinstance(place, str) and place for place in places):
            wrong.append(f"train={list(places)!r} (needed: at least one file, folder or data set)")
        wrong += [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least {least}, or none)"
            for name, least in (
                ("context", 2),
                ("evaluation_tokens", 2),
                ("train_tokens", 1),
                ("learn_weights_every", 1),
            )
            if getattr(self, name) is not None and not getattr(self, name) >= least
        ]
        if self.learn_weights_every is not None and self.weights is None:
            wrong.append("learn_weights_every without weights (needed: weights to begin with)")
        if not self.held_out_windows >= 1:
            wrong.append(f"held_out_windows={self.held_out_windows!r} (needed: a whole number of at least 1)")
        if not self.calibration_windows >= 1:
            wrong.append(f"calibration_windows={self.calibration_windows!r} (needed: a whole number of at least 1)")
        if not 0 < self.evaluation_share < 1:
            wrong.append(f"evaluation_share={self.evaluation_share!r} (needed: between 0 and 1)")
        if wrong:
            raise RecipeError(f"data: {'; '.join(wrong)}.")
