"""The decoder as a row of blocks, of which only the one at work need be in memory.

Everything that calibrates walks over blocks: the hidden states of all calibration windows go through block 0, then
through block 1, and so on; gradients come back the same way. Peak memory is one block and the hidden states, however
deep the model is.

A block is called through `torch.func.functional_call`, so that any of its linears can be given another weight (the
dequantized one, or one with a gradient) without touching the model. What a block is called with besides the hidden
states (rotary tables, masks) depends on its position and on the family; it is caught once, from the decoder's own
forward pass over one window with its blocks left out, and holds for every window of that length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy, Part
    from dwindle.bundle import ModelBundle

__all__ = ["STAGES", "TO_RESIDUAL", "DecoderBlocks", "InMemoryBlocks", "entering_linear"]

STAGES: tuple[tuple[Part, ...], ...] = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",))
"""Linears of a block that read the same tensor, in the order in which they are called."""
TO_RESIDUAL: tuple[Part, ...] = ("o", "down")
"""Linears whose outputs are added to the residual stream."""


class DecoderBlocks(Protocol):
    """A decoder whose blocks come one at a time."""

    anatomy: Anatomy
    device: torch.device

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states [B, T, D] that enter block 0, for ids [B, T]; all calls have the same T."""
        ...

    def block(self, layer: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Return a context in which the block's float32 weights are in memory; it must not be changed in place."""
        ...

    def forward(self, layer: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return hidden states [B, T, D] behind a block that is present.

        `weights` maps full names of linears (`model.layers.3.mlp.up_proj`) to weights used instead of the block's own.
        Gradients flow to `hidden` and `weights` if grad mode is on.
        """
        ...

    def head(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which final norm and head are in memory; calls of `logits` belong inside."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [B, T, V] for the hidden states behind the last block (final norm, head, soft cap)."""
        ...


class InMemoryBlocks:
    """The blocks of a bundle that is in memory as a whole."""

    def __init__(self, bundle: ModelBundle) -> None:
        self._set_up(bundle.model, bundle.anatomy, bundle.model.device)

    def _set_up(self, model: Any, anatomy: Anatomy, device: torch.device) -> None:
        self.anatomy, self.device = anatomy, device
        self._model = model
        self._blocks = [model.get_submodule(anatomy.layer_path(layer)) for layer in range(anatomy.layers)]
        self._called_with: dict[int, list[dict[str, Any]]] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """Return [B, T, D]; catches what the blocks are called with at the first T and at every new one."""
        ids = ids.to(self.device, torch.long)
        if ids.shape[1] not in self._called_with:
            self._called_with = {ids.shape[1]: self._catch(ids[:1])}
        entering: list[Tensor] = []

        def stop(hidden: Tensor, *_: Any, **__: Any) -> None:
            entering.append(hidden)
            raise _Enough

        with _forward_replaced(self._blocks[:1], [stop]):
            self._run_decoder(ids)
        return entering[0]

    def _catch(self, ids: Tensor) -> list[dict[str, Any]]:
        """Return per block the keyword arguments that the decoder calls it with; no block is run."""
        found: list[dict[str, Any]] = []

        def note(_: Any, **named: Any) -> _Anything:
            found.append(named)
            if len(found) == self.anatomy.layers:
                raise _Enough
            return _Anything()

        with _forward_replaced(self._blocks, [note] * self.anatomy.layers):
            self._run_decoder(ids)
        return found

    def _run_decoder(self, ids: Tensor) -> None:
        with contextlib.suppress(_Enough), torch.no_grad():
            self._model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """Yield the model's own block."""
        yield self._blocks[layer]

    def forward(self, layer: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return [B, T, D]; see `DecoderBlocks`."""
        path = self.anatomy.layer_path(layer)
        named = self._called_with[hidden.shape[1]][layer]
        changed = {f"{name.removeprefix(path + '.')}.weight": weight for name, weight in (weights or {}).items()}
        out = torch.func.functional_call(self._blocks[layer], changed, (hidden,), named)
        leaving: Tensor = out[0] if isinstance(out, tuple) else out
        return leaving

    def head(self) -> contextlib.AbstractContextManager[None]:
        """Return a context of nothing: norm and head are in memory."""
        return contextlib.nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [B, T, V]."""
        normed = self._model.get_submodule(self.anatomy.final_norm)(hidden)
        logits: Tensor = self._model.get_output_embeddings()(normed).float()
        cap = self.anatomy.traits.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def entering_linear(
    blocks: DecoderBlocks, layer: int, block: nn.Module, linear: nn.Module, hidden: Tensor,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a linear's input [n, I] and the residual stream [n, D] that the output of its half block is added to.

    `block` is the block of `layer`, in memory; `hidden` [B, T, D] enters it, and `weights` are as in `forward`.
    """
    caught: list[Tensor] = []
    stream = [hidden]
    start = len(blocks.anatomy.layer_path(layer)) + 1
    middle = block.get_submodule(blocks.anatomy.layer_norms(layer)[1][start:])

    def enter_middle(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        stream.append(inputs[0])

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0].detach().float().flatten(0, -2))
        raise _Enough

    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(contextlib.suppress(_Enough))
        hooks.callback(middle.register_forward_pre_hook(enter_middle).remove)
        hooks.callback(linear.register_forward_pre_hook(enter).remove)
        blocks.forward(layer, hidden, weights)
    return caught[0], stream[-1].detach().float().flatten(0, -2)


class _Enough(Exception):
    """What was wanted of the forward pass is known."""


class _Anything:
    """Stands for hidden states that nobody looks into, alone or as the first of a tuple (Gemma in 4.57)."""

    def __getitem__(self, _: object) -> _Anything:
        return self


@contextlib.contextmanager
def _forward_replaced(blocks: list[Any], replacements: list[Callable[..., Any]]) -> Iterator[None]:
    """Let the blocks do something else within a `with`."""
    for block, replacement in zip(blocks, replacements, strict=True):
        block.forward = replacement
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
