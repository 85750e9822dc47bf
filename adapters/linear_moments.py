"""Second moments of what linears read, and of the loss's gradients at what they give out, a layer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.evaluation_mode import evaluating

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["BATCH_TOKENS", "InputMoment", "gradient_moments", "input_moments", "weights_frozen"]

BATCH_TOKENS = 2_048


@dataclass
class InputMoment:
    """Moment of the linears that read one tensor (q, k and v; gate and up), in float64 on the CPU."""

    inputs: Tensor
    """X X^T [I, I], summed over the tokens."""
    names: list[str] = field(default_factory=list)
    """The linears, in the order they are called."""


def input_moments(bundle: ModelBundle, names: set[str], ids: Tensor) -> list[InputMoment]:
    """Return the moments of the linears' inputs on the windows `ids` [N, T]; a pass ends at the last linear."""
    found: list[InputMoment] = []
    model: Any = bundle.model
    parts = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])) if names else ()
    for part in parts:
        part = part.to(model.device, torch.long)
        watch = _Watch(found, names)
        with torch.no_grad(), evaluating(model), watch.on(model), contextlib.suppress(_Seen):
            model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)
    return found


class _Seen(Exception):
    """Every linear was called."""


class _Watch:
    """Takes the inputs of the linears as they are called, and ends the pass at the last one."""

    def __init__(self, found: list[InputMoment], names: set[str]) -> None:
        self._found, self._names, self._left = found, names, set(names)
        self._seen: list[tuple[Tensor, InputMoment]] = []

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Look within."""
        hooks = [model.get_submodule(name).register_forward_hook(
                     lambda module, given, out, name=name: self._look(name, given[0]))
                 for name in sorted(self._names)]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self, name: str, read: Tensor) -> None:
        row = next((row for tensor, row in self._seen if tensor is read), None)
        if row is None:
            moment = _moment(read)
            row = next((one for one in self._found if name in one.names), None)
            if row is None:
                row = InputMoment(torch.zeros_like(moment))
                self._found.append(row)
            row.inputs.add_(moment)
            self._seen.append((read, row))
        if name not in row.names:
            row.names.append(name)
        self._left.discard(name)
        if not self._left:
            raise _Seen


def gradient_moments(
    blocks: DecoderBlocks, layer: int, linears: Mapping[str, nn.Module], states: Sequence[Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Return G G^T [O, O] of each linear of a layer, in float64 on the CPU.

    G are the gradients of -log p(y) at the linear's outputs, for one token y drawn from the model's own prediction at
    every position; `states` [B, T, D] enter the layer. The draws depend on `seed` and the predictions alone, so every
    layer meets the same ones. Weights must not ask for gradients (`weights_frozen`). Memory: what the layers from this
    one on keep for their way back, and the logits, of one of the states.
    """
    found: dict[str, Tensor] = {}
    for number, hidden in enumerate(states):
        outputs: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks, torch.enable_grad():
            for name, linear in linears.items():
                hooks.callback(linear.register_forward_hook(_asking(outputs, name)).remove)
            hidden = blocks.forward(layer, hidden)
            for later in range(layer + 1, blocks.anatomy.layers):
                with blocks.block(later):
                    hidden = blocks.forward(later, hidden)
            with blocks.head():
                logs = blocks.logits(hidden).flatten(0, 1).log_softmax(-1)
            draw = torch.Generator(logs.device).manual_seed(seed + number)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=draw)
            slopes = torch.autograd.grad(-logs.gather(1, drawn).sum(), list(outputs.values()))
        for name, slope in zip(outputs, slopes, strict=True):
            moment = _moment(slope)
            found[name] = found[name].add_(moment) if name in found else moment
    return found


def _asking(outputs: dict[str, Tensor], name: str) -> Any:
    def keep(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
        outputs[name] = out if out.requires_grad else out.requires_grad_()

    return keep


@contextmanager
def weights_frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient within: a graph begins at the outputs that do."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _moment(rows: Tensor) -> Tensor:
    rows = rows.detach().flatten(0, -2).float()
    return (rows.T @ rows).double().cpu()
