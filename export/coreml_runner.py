"""An exported Core ML package as a DecodeRunner: by dwindle's evaluator anywhere, by Core ML itself on a Mac."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.errors import RecipeError
from dwindle.export.coreml_files import PACKAGE
from dwindle.export.kv_cache import causal_bias
from dwindle.export.mil_evaluator import MilProgram

__all__ = ["CoreMLEvaluatorRunner", "CoreMLNativeRunner"]


class CoreMLEvaluatorRunner:
    """Computes the saved package in numpy, float32. Says nothing about a device's rounding or speed."""

    executed_by = "dwindle MIL evaluator (numpy, float32) of the saved package; Core ML itself was not executed"

    def __init__(self, folder: Path) -> None:
        """Read `model.mlpackage` in an artifact folder. Raises OutputError, UnsupportedModel or MissingExtra."""
        self.program = MilProgram.load(folder / PACKAGE)
        self.context: int = next(shape[3] for shape in self.program.state_shapes.values())
        self.reset()

    @property
    def fp16_peak(self) -> float:
        """Return the largest |value| that fp16 had to hold so far; above 65,504 a device would have overflowed."""
        return self.program.fp16_peak

    def reset(self) -> None:
        """Empty the cache."""
        self._state = self.program.new_state()
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32."""
        inputs = _inputs(ids, self.length, self.context)
        self.length += ids.shape[1]
        return torch.from_numpy(np.ascontiguousarray(self.program(inputs, self._state)["logits"][0]))


class CoreMLNativeRunner:
    """Runs the package in Core ML, fp16, on the compute units it picks. macOS 15 or newer.

    Only a test with the marker `macos` executes this class; on other systems it is never run.
    """

    executed_by = "Core ML"

    def __init__(self, folder: Path) -> None:
        """Compile and load the package. Raises RecipeError where there is no Core ML."""
        if sys.platform != "darwin":
            raise RecipeError(f"Core ML runs on macOS, this is {sys.platform}. Use CoreMLEvaluatorRunner, which "
                              "computes the saved package itself.")  # fmt: skip
        import coremltools as ct

        self._model: Any = ct.models.MLModel(str(folder / PACKAGE))
        self.context: int = int(self._model.user_defined_metadata["dwindle.context_length"])
        self.reset()

    def reset(self) -> None:
        """Start from an empty state."""
        self._state = self._model.make_state()
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32."""
        inputs = _inputs(ids, self.length, self.context)
        self.length += ids.shape[1]
        logits = self._model.predict(inputs, state=self._state)["logits"]
        return torch.from_numpy(np.asarray(logits, np.float32)[0])


def _inputs(ids: Tensor, past: int, context: int) -> dict[str, Any]:
    tokens = ids.shape[1]
    if past + tokens > context:
        raise RecipeError(f"the package holds a context of {context:,} tokens; {past + tokens:,} were fed. "
                          "Export it with a larger context_length.")  # fmt: skip
    return {"input_ids": ids.numpy().astype(np.int32), "causal_mask": causal_bias(tokens, past).numpy()}
