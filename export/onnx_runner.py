"""An exported ONNX decoder, executed by plain ONNX Runtime on the CPU with the KV cache kept here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.errors import MissingExtra, OutputError

__all__ = ["OnnxRunner"]


class OnnxRunner:
    """A DecodeRunner over the `model.onnx` of an artifact folder."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Open a session. `threads` None leaves the number to ONNX Runtime (one a physical core).

        Raises MissingExtra without onnxruntime, OutputError if the folder holds no model.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("Running an ONNX model", "onnx") from error
        path = folder / "model.onnx"
        if not path.is_file():
            raise OutputError(f"{folder} holds no model.onnx. Give a folder that an ONNX export wrote.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.executed_by = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self._empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
                       for name, shape in shapes.items() if name.startswith("past_key_values.")}  # fmt: skip
        self._present = ["present" + name.removeprefix("past_key_values") for name in self._empty]
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._past: dict[str, Any] = dict(self._empty)
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32."""
        total = self.length + ids.shape[1]
        feeds = {
            "input_ids": ids.numpy().astype(np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
            **self._past,
        }
        logits, *present = self.session.run(["logits", *self._present], feeds)
        self._past = dict(zip(self._empty, present, strict=True))
        self.length = total
        return torch.from_numpy(logits[0])
