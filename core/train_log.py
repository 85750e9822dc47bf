"""What a training run says about itself: run.jsonl, a bounded history, and the sums of the line being made.

`RunProgress` is everything of a run that is no tensor. It stands in each checkpoint as JSON, sums of an unfinished line
included, so that the log of a resumed run equals that of an undisturbed one (times apart).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dwindle.storage import append_text, write_text

__all__ = ["RunProgress", "TrainLine", "TrainResult", "append_line", "cut_log"]

_HISTORY_LINES = 512


@dataclass(frozen=True)
class TrainLine:
    """One line of run.jsonl. Loss and parts are means over the steps since the line before; the rest is the step's, and
    so are the parts of an evaluation, whose names begin with `evaluation_`."""

    step: int
    tokens: int
    loss: float
    parts: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What a finished run tells. `history` holds at most 513 lines, evenly thinned; run.jsonl holds all."""

    steps: int
    tokens: int
    seconds: float
    first_loss: float
    """Loss of the first step, before any update."""
    last_loss: float
    """Mean loss of the last line's steps."""
    history: tuple[TrainLine, ...]


@dataclass
class RunProgress:
    """Steps taken, losses so far, and the line in the making."""

    step_tokens: int
    step: int = 0
    seconds: float = 0.0
    first_loss: float = 0.0
    line_loss: float = 0.0
    line_parts: dict[str, float] = field(default_factory=dict)
    line_steps: int = 0
    line_seconds: float = 0.0
    lines: int = 0
    stride: int = 1
    history: list[TrainLine] = field(default_factory=list)
    last_line: TrainLine | None = None
    lowest_line: float | None = None
    """Least mean loss of a closed line."""
    order: dict[str, Any] | None = None
    """State of a `WindowOrder`, where the run has one."""

    def add(
        self, loss: float, parts: Mapping[str, float], learning_rate: float, grad_norm: float, seconds: float
    ) -> TrainLine:
        """Count one step and return its own values."""
        if self.step == 0:
            self.first_loss = loss
        self.step += 1
        self.seconds += seconds
        self.line_steps += 1
        self.line_seconds += seconds
        self.line_loss += loss
        for name, value in parts.items():
            self.line_parts[name] = self.line_parts.get(name, 0.0) + value
        speed = round(self.step_tokens / max(seconds, 1e-9), 1)
        return TrainLine(
            self.step,
            self.step * self.step_tokens,
            loss,
            dict(parts),
            learning_rate,
            grad_norm,
            speed,
            round(self.seconds, 3),
        )

    def evaluation_due(self, every: int | None) -> bool:
        """Return whether a multiple of `every` lies in the line being made."""
        return every is not None and self.step // every > (self.step - self.line_steps) // every

    def close_line(self, now: TrainLine, evaluation: Mapping[str, float] | None = None) -> TrainLine:
        """Return the line that ends at step `now`, with the `evaluation` made there, and begin another.

        Of all lines every `stride`-th is kept; whenever there are too many, every other one goes and `stride` doubles.
        """
        line = TrainLine(
            step=self.step,
            tokens=now.tokens,
            loss=self.line_loss / self.line_steps,
            parts={
                **{name: value / self.line_steps for name, value in sorted(self.line_parts.items())},
                **(evaluation or {}),
            },
            learning_rate=now.learning_rate,
            grad_norm=now.grad_norm,
            tokens_per_second=round(self.line_steps * self.step_tokens / max(self.line_seconds, 1e-9), 1),
            seconds=now.seconds,
        )
        if self.lines % self.stride == 0:
            self.history.append(line)
        self.lines += 1
        if len(self.history) > _HISTORY_LINES:
            del self.history[1::2]
            self.stride *= 2
        self.last_line = line
        self.lowest_line = line.loss if self.lowest_line is None else min(self.lowest_line, line.loss)
        self.line_loss, self.line_steps, self.line_seconds, self.line_parts = 0.0, 0, 0.0, {}
        return line

    def result(self) -> TrainResult:
        """Return what a finished run tells."""
        if self.last_line is None:
            raise RuntimeError("a run without a closed line has no result")
        rest = () if self.history[-1] == self.last_line else (self.last_line,)
        return TrainResult(
            self.step,
            self.step * self.step_tokens,
            self.seconds,
            self.first_loss,
            self.last_line.loss,
            (*self.history, *rest),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands in a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunProgress:
        """Return the progress written by `to_json`."""
        last = data["last_line"]
        return cls(
            **{
                **data,
                "history": [TrainLine(**line) for line in data["history"]],
                "last_line": None if last is None else TrainLine(**last),
            }
        )


def append_line(path: Path, line: TrainLine) -> None:
    """Add `line` to run.jsonl."""
    append_text(path, json.dumps(asdict(line), allow_nan=False) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes anew, and a half-written last one."""
    kept = []
    if step and path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
    write_text(path, "".join(kept))
