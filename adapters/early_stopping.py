"""The best adapter of a run: kept whenever the held-out loss falls, and the run ended when it no longer does.

Both are functions of the evaluations up to a step, which are written beside the checkpoints: a run that was cut off and
goes on stops where, and keeps what, an undisturbed one does. Under `torchrun` every process evaluates alike and goes by
the first one's loss, so that all stop together; the first one writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dwindle.adapters.attach import adapter_tensors
from dwindle.errors import GateFailed
from dwindle.sharding import Processes
from dwindle.storage import atomic_file, write_json

__all__ = ["BestAdapter"]

_LOSSES, _WEIGHTS = "held_out.json", "best.safetensors"


class BestAdapter:
    """Evaluates an adapter in training and remembers its best state."""

    def __init__(
        self, held_out_loss: Callable[[nn.Module], float], patience: int | None, folder: Path | None, identity: str,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        self._loss, self._patience, self._folder, self._identity = held_out_loss, patience, folder, identity
        self._processes = processes or Processes()
        self.losses: dict[int, float] = {}
        self._tensors: dict[str, Tensor] = {}
        if folder is not None:
            self._read(folder)
        self._processes.wait()

    def start(self, model: nn.Module) -> None:
        """Evaluate what training starts from, as step 0."""
        if 0 not in self.losses:
            with torch.no_grad():
                self.evaluate(model, 0)

    def evaluate(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """Return the held-out loss after so many steps; the model is in evaluation mode."""
        loss = self._processes.shared(self._loss(model))
        if not math.isfinite(loss):
            raise GateFailed(f"adapt: the held-out loss after {step} steps is {loss}, no number. Measure the base "
                             "first; if its loss is finite, lower the rate.")  # fmt: skip
        self.losses[step] = loss
        if self._folder is not None and self._processes.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / _LOSSES, {"run": self._identity, "losses": self.losses})
        if self.best_step == step:
            self._tensors = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
            self._write(step)
        return {"held_out_loss": self.losses[step]}

    def stopped(self, step: int) -> bool:
        """Return whether `patience` evaluations up to `step` have brought no better one."""
        if self._patience is None:
            return False
        known = {at: loss for at, loss in self.losses.items() if at <= step}
        if not known:
            return False
        best = min(known, key=lambda at: (known[at], at))
        return sum(at > best for at in known) >= self._patience

    @property
    def best_step(self) -> int:
        """Return the step of the lowest held-out loss; the first of equal ones."""
        return min(self.losses, key=lambda at: (self.losses[at], at))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the best adapter's weights."""
        return self._tensors

    def _read(self, folder: Path) -> None:
        """Take up what an earlier part of the same run wrote."""
        from safetensors import SafetensorError, safe_open

        try:
            told = json.loads((folder / _LOSSES).read_text(encoding="utf-8"))
            with safe_open(folder / _WEIGHTS, framework="pt") as stored:
                if told["run"] != self._identity or stored.metadata()["run"] != self._identity:
                    return
                step = int(stored.metadata()["step"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return
        losses = {int(at): float(loss) for at, loss in told["losses"].items()}
        if step in losses:
            self.losses, self._tensors = losses, tensors

    def _write(self, step: int) -> None:
        """Write the best weights. The losses stand there already: cut off in between, the step is evaluated again."""
        from safetensors.torch import save_file

        if self._folder is not None and self._processes.first:
            with atomic_file(self._folder / _WEIGHTS) as partial:
                save_file(self._tensors, partial, metadata={"run": self._identity, "step": str(step)})
