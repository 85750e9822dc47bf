"""A progress bar with loss, tokens/s and time left, on a terminal only.

It is drawn on stderr, so that stdout stays clean for results; without a terminal (a log file, CI) nothing is drawn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from dwindle.train_log import TrainLine

__all__ = ["progress_bar"]


def _nothing(line: TrainLine) -> None:
    del line


@contextlib.contextmanager
def progress_bar(done: int, steps: int, shown: bool = True) -> Iterator[Callable[[TrainLine], None]]:
    """Yield a function to call after each step; it draws only if `shown` and stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("train", total=steps, completed=done, loss=float("nan"), speed=0.0)

        def update(line: TrainLine) -> None:
            bar.update(task, completed=line.step, loss=line.loss, speed=line.tokens_per_second)

        yield update
