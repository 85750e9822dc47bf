"""Mixture weights that follow what is left to learn of each place: dynamic batch loading.

    w_d <- w_d * exp(max(0, loss_d - reference_d)) / sum of all            every `every` steps

loss_d is the student's nats/token on windows of place d that it is never trained on, reference_d the teacher's on the
same (Sheared LLaMA, Xia et al. 2023, arXiv 2310.06694, algorithm 1, whose reference is a scaling law's prediction; in
distillation the teacher is where the student can get to). Places the student is behind in are read more, places it has
caught up with less, and the weights add up over the run.

A batch of B windows has floor or ceil of B * w_d of place d: systematic sampling, its starts a golden-ratio sequence,
so that shares are met closely over a few steps too. Each place is gone through in a random order, and again in another
when it is at its end. Weights, windows drawn and the history are JSON and stand in every checkpoint, so a resumed run
goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.data_order import mixed_seed
from dwindle.token_set import Mixture

__all__ = ["LearnedOrder"]

_GOLDEN = (math.sqrt(5) - 1) / 2


class LearnedOrder:
    """Chooses windows by weights it learns; a `core.window_order.WindowOrder`."""

    def __init__(
        self, mixture: Mixture, seed: int, losses: Callable[[nn.Module], Sequence[float]], reference: Sequence[float]
    ) -> None:
        self.mixture, self.seed, self.reference = mixture, seed, list(reference)
        self._losses = losses
        total = sum(mixture.weights)
        self.weights = [weight / total for weight in mixture.weights]
        self.drawn = [0] * len(self.weights)
        """Windows that each place has given so far."""
        self.history: list[dict[str, Any]] = []
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def windows(self, batch_size: int, step: int) -> Tensor:
        """Return the windows of a step: so many of each place, in a random order."""
        draw = torch.Generator().manual_seed(mixed_seed(self.seed, step, len(self.weights)))
        start = (mixed_seed(self.seed, len(self.weights)) / 2**63 + step * _GOLDEN) % 1
        edges = [math.floor(batch_size * edge + start) for edge in self._edges()]
        chosen, first = [], 0
        for place, available in enumerate(self.mixture.windows):
            for _ in range(edges[place + 1] - edges[place]):
                again, position = divmod(self.drawn[place], available)
                chosen.append(first + self._order(place, again)[position])
                self.drawn[place] += 1
            first += available
        return torch.tensor(chosen)[torch.randperm(batch_size, generator=draw)]

    def due(self, step: int) -> bool:
        """Return whether the weights change after so many steps."""
        return step % self.mixture.every == 0

    def update(self, model: nn.Module, step: int) -> None:
        """Measure the model on every place and change the weights."""
        losses = list(self._losses(model))
        excess = [max(0.0, loss - known) for loss, known in zip(losses, self.reference, strict=True)]
        grown = [weight * math.exp(more) for weight, more in zip(self.weights, excess, strict=True)]
        self.weights = [weight / sum(grown) for weight in grown]
        self.history.append({"step": step, "losses": losses, "weights": list(self.weights)})

    def state(self) -> dict[str, Any]:
        """Return weights, windows drawn and history."""
        return {"weights": list(self.weights), "drawn": list(self.drawn), "history": list(self.history)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.weights, self.drawn = list(state["weights"]), list(state["drawn"])
        self.history = list(state["history"])

    def to_json(self) -> dict[str, Any]:
        """Return what the report says of the mixture."""
        passes = [drawn / available for drawn, available in zip(self.drawn, self.mixture.windows, strict=True)]
        return {"places": list(self.mixture.names), "reference_nats_per_token": self.reference, "passes": passes,
                "history": self.history}  # fmt: skip

    def _edges(self) -> list[float]:
        edges = [0.0]
        for weight in self.weights[:-1]:
            edges.append(edges[-1] + weight)
        return [*edges, 1.0]

    def _order(self, place: int, again: int) -> list[int]:
        held = self._orders.get(place)
        if held is None or held[0] != again:
            draw = torch.Generator().manual_seed(mixed_seed(self.seed, place, again))
            held = (again, torch.randperm(self.mixture.windows[place], generator=draw).tolist())
            self._orders[place] = held
        return held[1]
