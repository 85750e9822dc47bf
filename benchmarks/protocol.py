"""What every side of the quality table is measured on: three real models, their calibration windows, unseen text.

| model | architecture | calibration | evaluation |
|---|---|---|---|
| stories260K | Llama, 5 layers, width 64, FFN 172 | `tinystories_train.txt` | `tinystories_valid.txt` |
| babyllama-105 | Llama, 5 layers, width 128, FFN 352, characters | `tinystories_train.txt` | `tinystories_valid.txt` |
| pycode-6m | Llama, 6 layers, width 256, FFN 768, fp16 | the standard library's packages email, json, http, unittest, \
logging, xml | its package asyncio, in windows of 512 |

The first 32,768 tokens of the evaluation text count. 128 calibration windows of the model's context (512 tokens for
pycode-6m), the same ids for every side. Only the decoder's linears are coded; embedding and head stay float.
Nats/token, KL(float ‖ quantized) and agreement are those of `dwindle.measure`, for all sides alike, on the weights as
each format gives them back. The models are not part of the repository: they lie in `$DWINDLE_ASSETS`, or in
`shared/assets` beside it.
"""

from __future__ import annotations

import copy
import os
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, calibration_set, evaluation_set
from dwindle.distill import DistillOptions
from dwindle.measure import Meter
from dwindle.report import Measurement
from dwindle.token_set import TokenSet

__all__ = ["MODELS", "RealModel", "Training", "assets", "model_folder"]

WINDOWS = 128
"""Calibration windows."""


@dataclass(frozen=True)
class Training:
    """How the students of a table are trained."""

    steps: int
    batch: int
    """Windows per step."""
    context: int
    """Tokens a window predicts."""
    learning_rate: float

    @property
    def windows(self) -> int:
        """Return how many windows are trained on."""
        return self.steps * self.batch

    def options(self, **others: Any) -> DistillOptions:
        """Return the options of a row."""
        return DistillOptions(steps=self.steps, batch_size=self.batch, learning_rate=self.learning_rate, **others)


@dataclass(frozen=True)
class _Text:
    """Where a model's calibration and evaluation text lie, below the assets or the standard library."""

    train: tuple[str, ...]
    evaluation: str
    of_standard_library: bool = False
    evaluation_tokens: int = 32_768
    context: int | None = None

    def place(self, name: str) -> str:
        """Return the path of a text."""
        return str((Path(sysconfig.get_paths()["stdlib"]) if self.of_standard_library else assets()) / name)


_STORIES = _Text(("data/text/tinystories_train.txt",), "data/text/tinystories_valid.txt")
MODELS: dict[str, _Text] = {
    "stories260K": _STORIES,
    "babyllama-105": _STORIES,
    "pycode-6m": _Text(
        ("email", "json", "http", "unittest", "logging", "xml"), "asyncio",
        of_standard_library=True, context=512,
    ),
}  # fmt: skip
"""The models, smallest first."""


def assets() -> Path:
    """Return the folder of real models and texts; it may not exist."""
    given = os.environ.get("DWINDLE_ASSETS")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "assets"


def model_folder(name: str) -> Path:
    """Return a model's folder; it may not exist."""
    return assets() / "models" / name


class RealModel:
    """One model of the table with its calibration windows and its meter, each made at first use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = MODELS[name]
        self.bundle = ModelBundle.load(model_folder(name))

    def calibration(self) -> TokenSet:
        """Return the calibration windows [128, T]."""
        train = tuple(self.text.place(name) for name in self.text.train)
        options = DataOptions(train=train, calibration_windows=WINDOWS, context=self.text.context)
        return calibration_set(options, self.bundle.tokenizer, self.bundle.anatomy.context)

    def meter(self, tokens: int | None = None) -> Meter:
        """Return the meter, on the first `tokens` of the text if given."""
        evaluation = evaluation_set(
            self.text.place(self.text.evaluation),
            self.bundle.tokenizer,
            max_tokens=tokens or self.text.evaluation_tokens,
        )
        return Meter(evaluation, teacher=self.bundle, context=self.text.context)

    def with_linears(self, weights: Mapping[str, torch.Tensor]) -> ModelBundle:
        """Return a copy of the float model with these dense weights in the named linears."""
        model = copy.deepcopy(self.bundle.model)
        with torch.no_grad():
            for name, weight in weights.items():
                model.get_submodule(name).weight.copy_(weight)
        return replace(self.bundle, model=model)

    def measure(self, meter: Meter, weights: Mapping[str, torch.Tensor]) -> Measurement:
        """Return the quality of the model with these linears."""
        return meter.measure(self.with_linears(weights))
