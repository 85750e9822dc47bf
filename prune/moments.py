r"""Second moments of what linears read, streamed: M = sum over tokens of x x^T, float64, never the activations.

The product of one batch (at most some thousand tokens) is float32, as the activations are; batches are added in
float64, so the error does not grow with the text. A moment has I^2 entries: as many linears are watched in one pass
over the text as fit into `_PASS_BYTES`, and the text is read again for the next. Memory: that, and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.anatomy import module
from dwindle.prune.calibration_pass import batches, decode, skipping, watching
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
    for together in _passes(bundle, names):
        yield from _one_pass(bundle, calibration, together, skipped).items()


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


@torch.inference_mode()
def _one_pass(bundle: ModelBundle, calibration: TokenSet, names: list[str], skipped: list[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(given: Tensor) -> None:
            rows = given.flatten(0, 1).float()
            product = (rows.T @ rows).cpu()
            if name in found:
                found[name] += product
            else:
                found[name] = product.double()

        return add

    with skipping(bundle, skipped), watching(bundle, {name: adder(name) for name in names}):
        for ids in batches(bundle, calibration):
            decode(bundle, ids)
    return found
