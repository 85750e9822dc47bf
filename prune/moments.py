r"""Second moments of what linears read, streamed: M = sum over tokens of x x^T, float64, never the activations.

The product of one batch (at most some thousand tokens) is float32, as the activations are; batches are added in
float64, so the error does not grow with the text. A moment has I^2 entries: as many linears are watched in one pass
over the text as fit into `_PASS_BYTES`, and the text is read again for the next. Memory: that, and one batch. Of a
checkpoint that stays on disk all are had in one pass, layer by layer, and those of one layer are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.anatomy import module
from dwindle.prune.folder_bundle import FolderBundle
from dwindle.prune.text_pass import layers_passed, run_pass
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["input_moments"]

_PASS_BYTES = 1 << 30


def input_moments(
    bundle: ModelBundle, calibration: TokenSet, names: Sequence[str], skipped: Iterable[int] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, M [I, I] in float64) of the input of every named linear, with some layers stepped over."""
    skipped = list(skipped)
    if isinstance(bundle, FolderBundle):
        yield from _layer_by_layer(bundle, calibration, names, skipped)
        return
    for together in _passes(bundle, names):
        sums = _MomentSums(together)
        run_pass(bundle, calibration, sums.inputs, skipped=skipped, purpose="compensation")
        yield from sums.found.items()


def _layer_by_layer(
    bundle: FolderBundle, calibration: TokenSet, names: Sequence[str], skipped: list[int]
) -> Iterator[tuple[str, Tensor]]:
    sums = _MomentSums(names)
    for _ in layers_passed(bundle, calibration, sums.inputs, skipped=skipped, purpose="refitting and cutting"):
        while sums.found:
            yield sums.found.popitem()


def _passes(bundle: ModelBundle, names: Sequence[str]) -> Iterator[list[str]]:
    together: list[str] = []
    held = 0
    for name in names:
        size = 8 * module(bundle.model, name).get_parameter("weight").shape[1] ** 2
        if together and held + size > _PASS_BYTES:
            yield together
            together, held = [], 0
        together.append(name)
        held += size
    if together:
        yield together


class _MomentSums:
    """Listens to a pass of the calibration text and sums the moments."""

    def __init__(self, names: Sequence[str]) -> None:
        self.found: dict[str, Tensor] = {}
        self.inputs = {name: self._adder(name) for name in names}

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(given: Tensor) -> None:
            rows = given.reshape(-1, given.shape[-1]).float()
            product = (rows.T @ rows).cpu()
            if name in self.found:
                self.found[name] += product
            else:
                self.found[name] = product.double()

        return add
