"""A model's parameters by name, some rows at a time: from memory, or from the files of a checkpoint that stays on disk.

What decides from weights, hashes or cuts them asks here, so it is written once for both. Rows are read some at a time
where a whole table (embedding, head) in float32, or twice that in float64, would be the largest thing in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.experts import stored_layout, stored_parameter
from dwindle.prune.folder_bundle import FolderBundle

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["parameter_names", "read_parameter", "row_slices"]

_SLICE_ELEMENTS = 1 << 23
"""Elements of a parameter worked on together."""


def parameter_names(bundle: ModelBundle) -> list[str]:
    """Return the names in files of all parameters, sorted, a tied head's left out."""
    return sorted(stored_layout(bundle.anatomy, dict(bundle.model.named_parameters())))


def read_parameter(bundle: ModelBundle, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Return a parameter in float32, or its rows from `start` to `stop`; from memory it is the model's own tensor."""
    if isinstance(bundle, FolderBundle):
        return bundle.source.read(name, start, stop).float().to(bundle.blocks.device)
    return stored_parameter(bundle.model, bundle.anatomy, name).detach()[start:stop]


def row_slices(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the rows to work on together.

    >>> list(row_slices((1000, 32768)))[-1]
    (768, 1000)
    """
    step = max(1, _SLICE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
