"""How many pieces a batch is cut into: more of them when memory runs out, the same batch and the same gradient.

A batch of B windows in k pieces gives the mean of the pieces' gradients, each over B / k windows: the gradient of the
whole batch, up to the order of additions. When a piece does not fit into memory, what it left is dropped, k becomes the
next larger number that divides the windows of this process, and the step is taken again from its beginning. Under
`torchrun` the other processes wait in a collective that this one left, so there the run stops with the arithmetic.
"""

from __future__ import annotations

import gc
import logging

import torch

from dwindle.errors import DoesNotFit

__all__ = ["Pieces"]

_log = logging.getLogger("dwindle")


class Pieces:
    """The number of pieces of each step's batch, over all processes."""

    def __init__(self, count: int, batch_size: int, world: int) -> None:
        self.count, self.batch_size, self.world = count, batch_size, world
        """Pieces a process takes in a step, one after the other; windows of a step; processes."""

    @property
    def windows(self) -> int:
        """Return the windows of one piece."""
        return self.batch_size // (self.count * self.world)

    def shrink(self, why_not: str, window_tokens: int) -> None:
        """Cut into more pieces after memory ran out, as `why_not` says; raise DoesNotFit if that cannot help.

        To be called when the error is no longer handled: its frames hold the tensors that did not fit.
        """
        held = self.batch_size // self.world
        larger = next((k for k in range(2 * self.count, held + 1) if held % k == 0), None)
        if larger is None or self.world > 1:
            why = (
                "one window is the least"
                if larger is None
                else f"with {self.world} processes the pieces cannot change in mid-run"
            )
            raise DoesNotFit(
                f"train: memory ran out with {self.windows} windows of {window_tokens:,} tokens at a time "
                f"({self.batch_size} in a batch, {self.count} pieces), and {why} "
                f"({_first_line(why_not)}). "
                "Take a shorter data.context, activation_checkpointing: true, precision: bf16, more "
                "gradient_accumulation, or a machine with more memory."
            )
        _log.warning(
            "train: memory ran out with %d windows at a time. The batch of %d is now cut into %d pieces of %d: the "
            "same gradient, up to the order of additions. Set gradient_accumulation: %d to begin so.",
            self.windows, self.batch_size, larger, held // larger, larger,
        )  # fmt: skip
        self.count = larger
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]
