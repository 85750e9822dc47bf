"""Which choice of bits every linear gets: the exact optimum of a multiple-choice knapsack. Torch-free.

Every linear has a few choices, each with the bits it takes in the file (codes, scales, zero points, palettes: counted,
not estimated) and a predicted cost (nats/token of KL). Wanted is one choice a linear so that the summed cost is the
least and the bits fit the budget:

    minimise sum_l cost[l, c_l]    subject to    sum_l bits[l, c_l] <= budget

The problem is NP-hard in general and easy in practice. Linears enter one after another; a *state* is a pair (bits,
cost) of the linears so far. A state is dropped when another takes no more bits and costs no more (dominance), and when
even the relaxation of the linears still to come cannot bring it below a solution that is already known:

    cost of the state + LP(linears to come, budget left) > cost of the greedy solution

LP lets a linear take mixtures of two choices. Its value is a convex, piecewise linear function of the budget: the
increments of every linear's lower convex hull, sorted by cost saved per bit (Dyer 1984, Zemel 1984; Pisinger, "A
minimal algorithm for the multiple-choice knapsack problem", 1995). Both rules keep an optimum, so the result is exact;
few states survive the second, because the greedy solution is the LP's but for one linear.

Not a solver for integer programmes (HAWQ-V3 uses one): the relaxation is so tight here that a hundred lines do it in
milliseconds. Not a greedy or Lagrangian choice alone: it stops short of the budget by up to one linear's increment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dwindle.errors import RecipeError

__all__ = ["Choice", "Target", "allocate", "reachable_bits"]

_Bits = npt.NDArray[np.int64]
_Costs = npt.NDArray[np.float64]
_SLACK = 1e-9
"""Share of the known solution's cost by which a bound may miss it through rounding."""


@dataclass(frozen=True, order=True)
class Choice:
    """One way to store a linear: bits of a code, group size, all bits in the file, and what it is predicted to cost."""

    stored_bits: int
    cost: float
    """Nats/token of KL."""
    bits: int
    group_size: int


@dataclass(frozen=True)
class Target:
    """A size that a plan must not exceed: of the planned linears per weight, or of the whole model in bytes."""

    weights: int
    """Weights in the planned linears."""
    bits_per_weight: float | None = None
    model_bytes: int | None = None
    other_bits: int = 0
    """Stored bits of all that is not planned: embedding, head, norms, biases, linears kept float."""

    @property
    def budget_bits(self) -> int:
        """Return the bits that the planned linears may take together.

        >>> Target(weights=1000, bits_per_weight=3.5).budget_bits
        3500
        >>> Target(weights=1000, model_bytes=600, other_bits=1600).budget_bits
        3200
        """
        if self.bits_per_weight is not None:
            return math.floor(self.bits_per_weight * self.weights + 1e-6)
        assert self.model_bytes is not None, "a target has one of the two"
        return 8 * self.model_bytes - self.other_bits

    def require_reachable(self, least_bits: int, most_bits: int) -> None:
        """Raise RecipeError, naming the nearest target, if even the smallest allocation exceeds this one."""
        if least_bits <= self.budget_bits:
            return
        least, most = self._written(least_bits), self._written(most_bits)
        key = "target_bits_per_weight" if self.model_bytes is None else "target_bytes"
        asked = f"{self.bits_per_weight:g}" if self.model_bytes is None else f"{self.model_bytes:,}"
        other = "" if self.model_bytes is None else f", of which {-(-self.other_bits // 8):,} are not in these linears"
        raise RecipeError(
            f"quantize: no allocation reaches {key}={asked}: with the bits allowed, the least is {least} and the most "
            f"{most}{other}. Set {key}={least.replace(',', '')} or more, or allow fewer bits (allowed_bits) or larger "
            "groups (group_size)."
        )

    def _written(self, bits: int) -> str:
        """Return the smallest target, as one writes it, whose budget holds so many bits of the linears."""
        if self.model_bytes is None:
            return f"{math.ceil(bits / self.weights * 1000 - 1e-6) / 1000:g}"
        return f"{-(-(bits + self.other_bits) // 8):,}"


def reachable_bits(choices: Mapping[str, Sequence[Choice]]) -> tuple[int, int]:
    """Return the least and the most bits that any allocation takes."""
    least = sum(min(c.stored_bits for c in options) for options in choices.values())
    return least, sum(max(c.stored_bits for c in options) for options in choices.values())


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bits: int) -> dict[str, Choice]:
    """Return the choice of every name with the least summed cost within the budget; among equals the smaller one.

    The budget must hold the smallest allocation (`Target.require_reachable` tells the user).

    >>> steep, flat = [Choice(2, 9.0, 2, 1), Choice(4, 1.0, 4, 1)], [Choice(2, 5.0, 2, 1), Choice(4, 1.0, 4, 1)]
    >>> {name: choice.bits for name, choice in allocate({"steep": steep, "flat": flat}, 6).items()}
    {'steep': 4, 'flat': 2}
    """
    layers = [_undominated(options) for options in choices.values()]
    assert sum(options[0].stored_bits for options in layers) <= budget_bits, "ask require_reachable first"
    taken = _search(layers, budget_bits)
    return {name: options[number] for name, options, number in zip(choices, layers, taken, strict=True)}


def _undominated(options: Sequence[Choice]) -> list[Choice]:
    """Return the choices that no other beats in both bits and cost, fewest bits first."""
    kept: list[Choice] = []
    for choice in sorted(options):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def _hull_increments(options: list[Choice]) -> list[tuple[float, int, float]]:
    """Return (cost saved per bit, bits, cost) of every step along the lower convex hull, steepest first."""
    corners = [options[0]]
    for choice in options[1:]:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], choice):
            corners.pop()
        corners.append(choice)
    return [(-_slope(a, b), b.stored_bits - a.stored_bits, b.cost - a.cost) for a, b in itertools.pairwise(corners)]


def _slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.stored_bits - a.stored_bits)


@dataclass(frozen=True)
class _Steps:
    """The steps along the hulls of all linears, those that save most per bit first."""

    layer: _Bits
    bits: _Bits
    cost: _Costs

    @classmethod
    def of(cls, layers: list[list[Choice]]) -> _Steps:
        steps = [(saved, layer, bits, cost) for layer, options in enumerate(layers)
                 for saved, bits, cost in _hull_increments(options)]  # fmt: skip
        steps.sort(key=lambda step: -step[0])
        layer, bits, cost = ([step[column] for step in steps] for column in (1, 2, 3))
        return cls(np.array(layer, dtype=np.int64), np.array(bits, dtype=np.int64), np.array(cost, dtype=np.float64))

    def relaxed(self, layers: list[list[Choice]], first: int, bits: _Bits) -> _Costs:
        """Return the LP's least cost of the linears from `first` on within so many bits each; infinite: none fits."""
        later = self.layer >= first
        least, cost = sum(o[0].stored_bits for o in layers[first:]), sum(o[0].cost for o in layers[first:])
        corners = np.concatenate([[0], np.cumsum(self.bits[later])]) + least
        values = np.concatenate([[0.0], np.cumsum(self.cost[later])]) + cost
        return np.asarray(np.where(bits < least, np.inf, np.interp(bits, corners, values)))

    def greedy_cost(self, layers: list[list[Choice]], budget: int) -> float:
        """Return the cost of the steps taken whole, in order, wherever they still fit."""
        left = budget - sum(options[0].stored_bits for options in layers)
        cost = sum(options[0].cost for options in layers)
        stopped: set[int] = set()
        for layer, bits, change in zip(self.layer.tolist(), self.bits.tolist(), self.cost.tolist(), strict=True):
            if bits > left:
                stopped.add(layer)
            if layer not in stopped:
                left, cost = left - bits, cost + change
        return cost


def _search(layers: list[list[Choice]], budget: int) -> list[int]:
    """Return the number of every layer's choice in an optimum."""
    steps = _Steps.of(layers)
    limit = steps.greedy_cost(layers, budget)
    limit += _SLACK * sum(abs(choice.cost) for options in layers for choice in options)
    bits, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[_Bits, _Bits]] = []
    for layer, options in enumerate(layers):
        reached = np.add.outer(bits, np.array([choice.stored_bits for choice in options], dtype=np.int64)).reshape(-1)
        paid = np.add.outer(cost, np.array([choice.cost for choice in options])).reshape(-1)
        alive = np.flatnonzero(paid + steps.relaxed(layers, layer + 1, budget - reached) <= limit)
        order = alive[np.lexsort((paid[alive], reached[alive]))]
        falling = np.minimum.accumulate(paid[order])
        order = order[np.concatenate([[True], falling[1:] < falling[:-1]])]
        bits, cost = reached[order], paid[order]
        trail.append((order // len(options), order % len(options)))
    state, taken = len(cost) - 1, []
    for before, number in reversed(trail):
        taken.append(int(number[state]))
        state = int(before[state])
    return taken[::-1]
