"""One pass of the calibration text through a model, with something listening: in memory, or layer by layer from disk.

In memory the windows go through the whole model, some at a time. A checkpoint that stays on disk (`FolderBundle`) is
passed the other way round: all windows go through one layer, then through the next, so that one layer's weights are
in memory, once, and the hidden states of all windows, which beyond `_MEMORY_BYTES` stand in a temporary file, float32
as computed. The windows are taken together in the same numbers and every listener hears the same values in the same
order, so what is summed per place is the same to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import module
from dwindle.boundary_states import BoundaryStates
from dwindle.bundle import ModelBundle
from dwindle.prune.calibration_pass import batches, decode, hooked, layer_input, skipping, window_batches
from dwindle.prune.folder_bundle import FolderBundle
from dwindle.time_left import TimeLeft
from dwindle.token_set import TokenSet

__all__ = ["layers_passed", "run_pass"]

_MEMORY_BYTES = 1 << 29
"""Hidden states beyond this many bytes go to a temporary file."""

_log = logging.getLogger("dwindle")

Hears = Callable[[Tensor], Any]
HearsBoth = Callable[[Tensor, Tensor], Any]


def run_pass(
    bundle: ModelBundle, calibration: TokenSet, inputs: Mapping[str, Hears], *, purpose: str,
    layers: Mapping[int, HearsBoth] | None = None, last: Hears | None = None, skipped: Iterable[int] = (),
) -> None:  # fmt: skip
    """Call what listens: `inputs` with what the named modules read, `layers` with what a layer takes and gives, `last`
    with the last hidden states behind the final norm; all [B, T, ...]. `skipped` layers hand on what they are given.
    """
    if isinstance(bundle, FolderBundle):
        for _ in layers_passed(bundle, calibration, inputs, purpose=purpose, layers=layers, last=last, skipped=skipped):
            pass
        return
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(skipping(bundle, skipped))
        stack.enter_context(hooked(bundle.model, inputs))
        for layer, hears in (layers or {}).items():
            block = module(bundle.model, bundle.anatomy.layer_path(layer))
            stack.callback(block.register_forward_hook(_hook(hears), with_kwargs=True).remove)
        for ids in batches(bundle, calibration):
            found = decode(bundle, ids)
            if last is not None:
                last(found)


def layers_passed(
    bundle: FolderBundle, calibration: TokenSet, inputs: Mapping[str, Hears], *, purpose: str,
    layers: Mapping[int, HearsBoth] | None = None, last: Hears | None = None, skipped: Iterable[int] = (),
) -> Iterator[int]:  # fmt: skip
    """Yield each layer when all text has gone through it; see `run_pass`."""
    anatomy, blocks, skipped = bundle.anatomy, bundle.blocks, set(skipped)
    passed = [layer for layer in range(anatomy.layers) if layer not in skipped]
    left = TimeLeft(len(passed))
    windows = window_batches(calibration)
    with BoundaryStates(calibration.ids.numel() * anatomy.width * 4, _MEMORY_BYTES) as states:
        for number, ids in enumerate(windows):
            states.put(0, number, blocks.embed(ids))
        for done, layer in enumerate(passed, 1):
            with blocks.block(layer) as block:
                _through(bundle, layer, block, states, len(windows), inputs, (layers or {}).get(layer))
            yield layer
            _log.info("prune: %s, layer %d/%d, %s", purpose, done, len(passed), left.after(done))
        before = inputs.get(anatomy.final_norm)
        if last is None and before is None:
            return
        with torch.inference_mode(), blocks.final_norm() as norm:
            for number in range(len(windows)):
                given = states.take(0, number, blocks.device)
                if before is not None:
                    before(given)
                if last is not None:
                    last(norm(given))


@torch.inference_mode()
def _through(
    bundle: FolderBundle, layer: int, block: nn.Module, states: BoundaryStates, windows: int,
    inputs: Mapping[str, Hears], hears: HearsBoth | None,
) -> None:  # fmt: skip
    """Take the hidden states of all windows from before to behind a layer."""
    path = f"{bundle.anatomy.layer_path(layer)}."
    within = {name.removeprefix(path): watcher for name, watcher in inputs.items() if name.startswith(path)}
    with hooked(block, within):
        for number in range(windows):
            given = states.take(0, number, bundle.blocks.device)
            gone = bundle.blocks.forward(layer, given)
            if hears is not None:
                hears(given, gone)
            states.put(0, number, gone)


def _hook(hears: HearsBoth) -> Any:
    def call(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        hears(layer_input(args, kwargs), output[0] if isinstance(output, tuple) else output)

    return call
