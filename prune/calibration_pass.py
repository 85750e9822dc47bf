"""Passes of the calibration text through a model with something listening: what all scores and moments are made of.

Hooks stand where they watch (inputs of linears, outputs of norms, what a layer takes and gives) and are removed
whatever happens. Layers that a plan drops can be stepped over: their output becomes their input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import module
from dwindle.errors import DataError
from dwindle.experts import mixture_module
from dwindle.token_set import TokenSet
from dwindle.tokenization import require_tokenizer

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["batches", "check_calibration", "decode", "hooked", "layer_input", "reading_names", "skipping", "watching",
           "window_batches"]  # fmt: skip

_BATCH_TOKENS = 4096


def check_calibration(bundle: ModelBundle, calibration: TokenSet) -> None:
    """Raise DataError for a set of another role or tokenizer, or windows longer than the model's context."""
    calibration.require("calibration")
    require_tokenizer(calibration, bundle.tokenizer)
    window, context = calibration.ids.shape[1], bundle.anatomy.context
    if window > context:
        raise DataError(
            f"{calibration.source}: windows of {window:,} tokens, but the model's context is {context:,}. "
            f"Build the calibration set with context={context}."
        )


def batches(bundle: ModelBundle, calibration: TokenSet) -> Iterator[Tensor]:
    """Yield the windows [B, T] on the model's device, as many at a time as make `_BATCH_TOKENS` tokens."""
    for batch in window_batches(calibration):
        yield batch.to(bundle.model.device)


def window_batches(calibration: TokenSet) -> tuple[Tensor, ...]:
    """Return the windows [B, T], as many at a time as make `_BATCH_TOKENS` tokens."""
    windows = max(1, _BATCH_TOKENS // calibration.ids.shape[1])
    return torch.split(calibration.ids, windows)


def decode(bundle: ModelBundle, ids: Tensor) -> Tensor:
    """Return the decoder's last hidden states [B, T, D]; the mask of ones says that nothing is padded."""
    found: Tensor = (
        bundle.model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    ).last_hidden_state
    return found


def reading_names(bundle: ModelBundle, layer: int) -> list[str]:
    """Return one module per place where the layer reads the hidden width: its attention's and its FFN's."""
    parts = bundle.anatomy.parts(layer)
    if bundle.anatomy.experts_of(layer) is not None:
        return [parts["q"], mixture_module(bundle.model, bundle.anatomy, layer)]
    return [parts["qkv" if bundle.anatomy.fused else "q"], parts["gate_up" if bundle.anatomy.fused else "gate"]]


@contextlib.contextmanager
def watching(bundle: ModelBundle, inputs: Mapping[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Call a function with the input of each named module; where it returns a tensor, that takes the input's place."""
    with hooked(bundle.model, inputs):
        yield


@contextlib.contextmanager
def hooked(root: nn.Module, inputs: Mapping[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Do what `watching` does, for modules below any module."""

    def hook(watcher: Callable[[Tensor], Any]) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def call(_: nn.Module, given: tuple[Any, ...]) -> Any:
            changed = watcher(given[0])
            return None if changed is None else (changed, *given[1:])

        return call

    handles = [module(root, name).register_forward_pre_hook(hook(watcher)) for name, watcher in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states that a decoder layer was called with."""
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    return given


@contextlib.contextmanager
def skipping(bundle: ModelBundle, layers: Iterable[int]) -> Iterator[None]:
    """Let these layers hand on what they were given, as if they were not there."""

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = layer_input(args, kwargs)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [
        module(bundle.model, bundle.anatomy.layer_path(layer)).register_forward_hook(hand_on, with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
