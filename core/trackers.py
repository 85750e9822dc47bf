"""Further places for the training log: TensorBoard, Weights & Biases, trackio.

Each is imported only when `TrainOptions.trackers` names it, and before the first step, so that a missing package
does not end a long run. They get the lines of run.jsonl as scalars and nothing else; without a tracker, nothing
leaves the run's folder. A resumed run is continued in TensorBoard's files; the two services show it as a new run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dwindle.errors import MissingExtra, RecipeError
from dwindle.train_log import TrainLine

__all__ = ["Tracker", "open_trackers", "scalars"]


class Tracker(Protocol):
    """A place that shows numbers over steps."""

    def log(self, line: TrainLine) -> None:
        """Show one line."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


def scalars(line: TrainLine) -> dict[str, float]:
    """Return the numbers of a line by name.

    >>> sorted(scalars(TrainLine(1, 64, 2.5, {"kl": 0.5}, 1e-3, 1.0, 100.0, 0.6)))
    ['grad_norm', 'learning_rate', 'loss', 'parts/kl', 'tokens', 'tokens_per_second']
    """
    parts = {f"parts/{name}": value for name, value in line.parts.items()}
    names = ("tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    return {**{name: float(getattr(line, name)) for name in names}, **parts}


class _TensorBoard:
    def __init__(self, folder: Path | None, settings: Mapping[str, Any], step: int) -> None:
        del settings
        if folder is None:
            raise RecipeError("train: the tracker 'tensorboard' writes files. Give the run a folder.")
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, line: TrainLine) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line.step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Weights & Biases, or trackio, which took over its three calls. What they print goes to stderr."""

    def __init__(self, module_name: str, settings: Mapping[str, Any]) -> None:
        self._module = importlib.import_module(module_name)
        with contextlib.redirect_stdout(sys.stderr):
            self._module.init(project="dwindle", config=dict(settings))

    def log(self, line: TrainLine) -> None:
        self._module.log(scalars(line), step=line.step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._module.finish()


_MAKERS: Mapping[str, Callable[[Path | None, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": lambda folder, settings, step: _Service("wandb", settings),
    "trackio": lambda folder, settings, step: _Service("trackio", settings),
}


def open_trackers(names: tuple[str, ...], folder: Path | None, settings: Mapping[str, Any], step: int) -> list[Tracker]:
    """Return the trackers called `names` for a run that stands at `step`.

    Raises MissingExtra if a package is not installed, RecipeError if one is broken or TensorBoard has no folder.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_MAKERS[name](folder, settings, step))
        except ImportError as error:
            for tracker in opened:
                tracker.close()
            if importlib.util.find_spec(name) is None:
                raise MissingExtra(f"the tracker '{name}'", name) from error
            raise RecipeError(
                f"train: the tracker '{name}' is installed but cannot be imported ({error}). "
                "Mend its installation, or take it out of trackers."
            ) from error
    return opened
