"""Second moments of what the linears of one layer read, and of the gradients at what they give out.

Both are gathered a layer at a time, so that one layer's moments are in memory. Linears that read the same tensor (q, k
and v; gate and up) share one moment of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.evaluation_mode import evaluating

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["LinearMoments", "divergence_moments", "input_moments"]

_BATCH_TOKENS = 2_048


@dataclass
class LinearMoments:
    """Moments of the linears that read one tensor, in float64 on the CPU."""

    inputs: Tensor
    """X X^T [I, I], summed over the tokens."""
    names: list[str] = field(default_factory=list)
    """The linears, in the order they are called."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """G G^T [O, O] of each, G the gradients of -log p(y) at its outputs; empty where none were asked for."""


class _Seen(Exception):
    """Every linear of the layer was called."""


def input_moments(bundle: ModelBundle, names: set[str], ids: Tensor) -> list[LinearMoments]:
    """Return the moments of the linears' inputs on the windows `ids` [N, T]; a pass ends at the last linear."""
    found: list[LinearMoments] = []
    for part in _parts(bundle, ids) if names else ():
        watch = _Watch(found, names, ends=True)
        with torch.no_grad(), evaluating(bundle.model), watch.on(bundle.model):
            try:
                _logits(bundle.model, part)
            except _Seen:
                continue
    return found


def divergence_moments(bundle: ModelBundle, names: set[str], ids: Tensor, seed: int = 0) -> list[LinearMoments]:
    """Return the moments of inputs and of gradients, y drawn from the model's own predictions at every position.

    The labels depend on `seed` and on the model alone, so every layer meets the same ones. Memory: the activations from
    this layer on, of 2,048 tokens, and their logits.
    """
    found: list[LinearMoments] = []
    for number, part in enumerate(_parts(bundle, ids) if names else ()):
        watch = _Watch(found, names, ends=False)
        with torch.enable_grad(), evaluating(bundle.model), _frozen(bundle.model), watch.on(bundle.model):
            logs = _logits(bundle.model, part).float().flatten(0, 1).log_softmax(-1)
        draw = torch.Generator(logs.device).manual_seed(seed + number)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=draw)
        gradients = torch.autograd.grad(-logs.gather(1, drawn).sum(), list(watch.outputs.values()))
        for name, gradient in zip(watch.outputs, gradients, strict=True):
            row = next(one for one in found if name in one.names)
            moment = _moment(gradient)
            row.gradients[name] = row.gradients[name].add_(moment) if name in row.gradients else moment
    return found


class _Watch:
    """Takes the inputs of the linears as they are called, and keeps their outputs where a pass goes on."""

    def __init__(self, found: list[LinearMoments], names: set[str], *, ends: bool) -> None:
        self._found, self._names, self._ends = found, names, ends
        self._left = set(names)
        self._seen: list[tuple[Tensor, LinearMoments]] = []
        self.outputs: dict[str, Tensor] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        hooks = [model.get_submodule(name).register_forward_hook(
                     lambda module, given, out, name=name: self._look(name, given[0], out))
                 for name in sorted(self._names)]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, name: str, read: Tensor, out: Tensor) -> None:
        self._row(name, read)
        self._left.discard(name)
        if not self._ends:
            self.outputs[name] = out if out.requires_grad else out.requires_grad_()
        elif not self._left:
            raise _Seen

    def _row(self, name: str, read: Tensor) -> None:
        row = next((row for tensor, row in self._seen if tensor is read), None)
        if row is None:
            moment = _moment(read)
            row = next((one for one in self._found if name in one.names), None)
            if row is None:
                row = LinearMoments(torch.zeros_like(moment))
                self._found.append(row)
            row.inputs.add_(moment)
            self._seen.append((read, row))
        if name not in row.names:
            row.names.append(name)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient within: the graph begins at the outputs that do."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _parts(bundle: ModelBundle, ids: Tensor) -> list[Tensor]:
    model: Any = bundle.model
    return [part.to(model.device, torch.long) for part in torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))]


def _logits(model: Any, part: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits
    return logits


def _moment(rows: Tensor) -> Tensor:
    rows = rows.detach().flatten(0, -2).float()
    return (rows.T @ rows).double().cpu()
