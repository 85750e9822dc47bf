r"""Second moments of what the down projection of each expert reads, over the tokens that pass the expert.

    M_e = sum over tokens t that pass e of  w_e(t)^2 a_e(t) a_e(t)^T

A token counts with the square of the weight that the router gives it, since that is how an error in its output counts.
Tokens are routed among the experts that stay.

Memory: the moments of as many experts as fit into `_PASS_BYTES`; the text is read again for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.prune.mixture import Mixture, mixtures_of
from dwindle.prune.text_pass import run_pass
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["expert_moments"]

_PASS_BYTES = 1 << 30

_Expert = tuple[int, int]
"""Layer and expert."""


def expert_moments(
    bundle: ModelBundle, calibration: TokenSet, kept: Mapping[int, Sequence[int]], skipped: Sequence[int]
) -> Iterator[tuple[_Expert, Tensor]]:
    """Yield ((layer, expert), M [F, F] in float64) for the experts kept in each of these layers.

    An expert that no token passes is left out. `skipped` layers hand on what they are given.
    """
    mixtures = mixtures_of(bundle)
    for together in _passes(mixtures, [(layer, expert) for layer, experts in kept.items() for expert in experts]):
        found: dict[_Expert, Tensor] = {}
        listeners = {
            mixtures[layer].module: _adder(mixtures[layer], layer, kept[layer], together, found)
            for layer in sorted({layer for layer, _ in together})
        }
        run_pass(bundle, calibration, listeners, skipped=skipped, purpose="compensation")
        yield from found.items()


def _passes(mixtures: Mapping[int, Mixture], wanted: list[_Expert]) -> Iterator[list[_Expert]]:
    widest = max((mixtures[layer].experts.width for layer, _ in wanted), default=1)
    together = max(1, _PASS_BYTES // (8 * widest**2))
    for start in range(0, len(wanted), together):
        yield wanted[start : start + together]


def _adder(
    mixture: Mixture, layer: int, kept: Sequence[int], together: list[_Expert], found: dict[_Expert, Tensor]
) -> Callable[[Tensor], None]:
    experts = [expert for other, expert in together if other == layer]

    def add(given: Tensor) -> None:
        for routed in mixture.routed(given.reshape(-1, given.shape[-1]), kept, experts):
            if not len(routed.rows):
                continue
            rows = (routed.activations * routed.weights[:, None]).float()
            product, place = (rows.T @ rows).cpu(), (layer, routed.expert)
            if place in found:
                found[place] += product
            else:
                found[place] = product.double()

    return add
