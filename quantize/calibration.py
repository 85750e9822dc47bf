"""Two walks over the decoder's blocks, which tell what the calibration text does to every linear.

Forward: the hidden states of all windows go through block 0, then block 1, and so on. It gives plain Hessians, and
it can go on behind weights that were just quantized, so that a later block makes up for the errors of earlier ones.

    for block in forward_walk(blocks, calibration.ids):
        codes = {name: gptq(weight_of(name), ..., found.hessian) for name, found in block.statistics.items()}
        block.continue_with({name: code.dequantize() for name, code in codes.items()})

Backward: forward once, keeping the states between blocks; then the loss at the head, and from the last block to the
first each is run again with gradients, which gives dL/dz at every linear and the gradient for the block before. One
block's graph and one block's statistics are alive at a time.

    for layer, statistics in backward_walk(blocks, calibration.ids, fisher=True): ...

The loss. What is to be kept is the unquantized model's distribution p, so the curvature wanted is that of KL(p || q) at
q = p: the Fisher information, E over y ~ p of the squared gradient of -log p(y). So the labels are drawn from the
model's own p ("sampled", seeded), one for each position; drawing more than once is passing `ids` more than once. With
labels from the text ("text", as SqueezeLLM and GuidedQuant do) the same sum is the *empirical* Fisher, which is large
where the model is wrong rather than where it is sensitive (Kunstner et al. 2019, arXiv:1905.12558).

The head runs on slices of 64 MiB of logits; the gradient at the logits is p - onehot(y), written down directly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dwindle.boundary_states import BoundaryStates
from dwindle.errors import DataError
from dwindle.quantize.layer_statistics import GuidedSums, InputSums, LayerStatistics, require_finite
from dwindle.time_left import TimeLeft

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy, Part
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["ROW_GROUPS", "CalibratedBlock", "Labels", "LayerStatistics", "backward_walk", "block_gradients",
           "forward_walk", "require_tokens"]  # fmt: skip

Labels = Literal["sampled", "text"]
K = TypeVar("K")

ROW_GROUPS = 4
"""Guided Hessians per linear, as in GuidedQuant; more cost as much more time and memory."""
_BATCH_TOKENS = 2048
"""Tokens that go through a block at once, in whole windows, at least one."""
_SLICE_BYTES = 64 << 20
_FEWEST_TOKENS = 32
_FEWEST_PER_INPUT = 1 / 16
"""Below this share of tokens per input of the widest linear its Hessian says next to nothing."""
_SHARED: dict[str, Part] = {"k": "q", "v": "q", "up": "gate"}
"""Parts that read the input of another one."""

_log = logging.getLogger("dwindle")


@dataclass
class CalibratedBlock:
    """One block of a forward walk, while its weights are in memory."""

    layer: int
    module: nn.Module
    """The unquantized block."""
    statistics: dict[str, LayerStatistics]
    """By full name of the linear."""
    inputs: list[Tensor]
    """Hidden states [B, T, D] that enter it, behind whatever earlier blocks were continued with."""
    float_inputs: list[Tensor]
    """Hidden states that enter it in the unquantized model; `inputs` itself unless the walk keeps both."""
    _weights: Mapping[str, Tensor] = field(default_factory=dict)

    def continue_with(self, weights: Mapping[str, Tensor]) -> None:
        """Let the walk go on behind these weights (full name of the linear -> dense [O, I])."""
        self._weights = weights


def forward_walk(
    blocks: DecoderBlocks, ids: Tensor, *, hessian: bool = True, keep_float: bool = False
) -> Iterator[CalibratedBlock]:
    """Yield every block, first to last, with what reaches its linears; ids [N, T].

    `keep_float` carries the unquantized model's states along as `float_inputs`. Memory: the block, its Hessians, and
    the states of all tokens two to four times (4 N T D bytes each). Raises DataError for too short a text.
    """
    require_tokens(ids, blocks.anatomy)
    if hessian:
        _warn_of_few(ids, blocks.anatomy)
    inputs = [blocks.embed(batch) for batch in _batches(ids)]
    floats = inputs
    left = TimeLeft(blocks.anatomy.layers)
    for layer in range(blocks.anatomy.layers):
        with blocks.block(layer) as module:
            statistics, outputs = _input_statistics(blocks, layer, module, inputs, hessian)
            block = CalibratedBlock(layer, module, statistics, inputs, floats)
            yield block
            replaced, block.statistics = block._weights, {}
            del statistics
            if keep_float and floats is not inputs:
                floats = [_forward(blocks, layer, states) for states in floats]
            elif keep_float or not replaced:
                floats = outputs
            inputs = [_forward(blocks, layer, states, replaced) for states in inputs] if replaced else outputs
            floats = floats if keep_float else inputs
        _log.info("calibrated block %d of %d, %s", layer + 1, blocks.anatomy.layers, left.after(layer + 1))


def backward_walk(
    blocks: DecoderBlocks, ids: Tensor, *, row_groups: int = ROW_GROUPS, hessian: bool = True, fisher: bool = False,
    labels: Labels = "sampled", seed: int = 0,
) -> Iterator[tuple[int, dict[str, LayerStatistics]]]:  # fmt: skip
    """Yield (layer, statistics by full name), last to first, with end-loss gradients; ids [N, T].

    `row_groups` is brought down to a divisor of a linear's output rows. Memory: one block's graph for 2,048 tokens,
    its guided Hessians, the gradient (4 N T D bytes), and the states between blocks, on disk from 1 GiB. Raises
    DataError for too short a text.
    """
    require_tokens(ids, blocks.anatomy)
    if hessian:
        _warn_of_few(ids, blocks.anatomy)
    layers, width = blocks.anatomy.layers, blocks.anatomy.width
    batches = _batches(ids)
    left = TimeLeft(layers)
    with BoundaryStates(layers * ids.numel() * width * 4) as states:
        gradients = _loss_gradients(blocks, batches, _forward_keeping(blocks, batches, states), labels, seed)
        for layer in reversed(range(layers)):
            with blocks.block(layer) as module:
                yield layer, _guided_statistics(blocks, layer, module, states, gradients, row_groups, hessian, fisher)
            _log.info("calibrated block %d of %d, %s", layer + 1, layers, left.after(layers - layer))


def require_tokens(ids: Tensor, anatomy: Anatomy) -> None:
    """Raise DataError if ids [N, T] are too few to calibrate this model with."""
    widest, name = _widest(anatomy)
    found, needed = ids.numel(), max(_FEWEST_TOKENS, int(widest * _FEWEST_PER_INPUT))
    if ids.dim() != 2 or found < needed:
        raise DataError(
            f"calibration: {found:,} tokens found (shape {list(ids.shape)}), at least {needed:,} needed because "
            f"{name} has {widest:,} inputs; {widest:,} or more are better. Give more text, or more "
            "data.calibration_windows."
        )


def _warn_of_few(ids: Tensor, anatomy: Anatomy) -> None:
    """Warn if a Hessian of so many tokens cannot have full rank."""
    widest, name = _widest(anatomy)
    if ids.numel() < widest:
        _log.warning("calibration: %s tokens are fewer than the %s inputs of %s, so its Hessian rests on its damping; "
                     "more text is better", f"{ids.numel():,}", f"{widest:,}", name)  # fmt: skip


def _widest(anatomy: Anatomy) -> tuple[int, str]:
    """Return the most inputs that a linear has, and its name."""
    return max(
        (anatomy.linear_shape(layer, part)[1], name)
        for layer in range(anatomy.layers)
        for part, name in anatomy.parts(layer).items()
    )


def _batches(ids: Tensor) -> list[Tensor]:
    return list(torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1])))


def _forward(blocks: DecoderBlocks, layer: int, states: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return blocks.forward(layer, states, weights)


def _linears(anatomy: Anatomy, layer: int, block: nn.Module) -> dict[Part, tuple[str, nn.Module]]:
    """Return part -> (full name, module) of a block's linears."""
    start = len(anatomy.layer_path(layer)) + 1
    return {part: (name, block.get_submodule(name[start:])) for part, name in anatomy.parts(layer).items()}


def _input_statistics(
    blocks: DecoderBlocks, layer: int, block: nn.Module, inputs: list[Tensor], hessian: bool
) -> tuple[dict[str, LayerStatistics], list[Tensor]]:
    """Return the statistics of all linears, and the states behind the unchanged block."""
    linears = _linears(blocks.anatomy, layer, block)
    sums = {
        part: InputSums(blocks.anatomy.linear_shape(layer, part)[1], hessian, blocks.device)
        for part in linears
        if part not in _SHARED
    }
    with ExitStack() as hooks:
        for part, counted in sums.items():
            hooks.callback(linears[part][1].register_forward_pre_hook(_counting(counted)).remove)
        outputs = [_forward(blocks, layer, states) for states in inputs]
    found = {part: counted.statistics() for part, counted in sums.items()}
    statistics = {name: found[_SHARED.get(part, part)] for part, (name, _) in linears.items()}
    require_finite(statistics)
    return statistics, outputs


def _counting(sums: InputSums) -> Any:
    return lambda _, inputs: sums.add(inputs[0].detach().flatten(0, -2))


def _forward_keeping(blocks: DecoderBlocks, batches: list[Tensor], states: BoundaryStates) -> list[Tensor]:
    """Return the states behind the last block, after putting those in front of each into `states`."""
    hidden = [blocks.embed(batch) for batch in batches]
    for layer in range(blocks.anatomy.layers):
        with blocks.block(layer):
            for batch, entering in enumerate(hidden):
                states.put(layer, batch, entering)
                hidden[batch] = _forward(blocks, layer, entering)
    return hidden


def _loss_gradients(
    blocks: DecoderBlocks, batches: list[Tensor], hidden: list[Tensor], labels: Labels, seed: int
) -> list[Tensor]:
    """Return the gradients [B, T, D] of the summed loss at the states behind the last block."""
    generator = torch.Generator(blocks.device).manual_seed(seed)
    rows = max(1, _SLICE_BYTES // (4 * blocks.anatomy.vocab))
    gradients = []
    with blocks.head():
        for ids, states in zip(batches, hidden, strict=True):
            chosen = _next_tokens(ids, blocks.device) if labels == "text" else None
            flat = states.flatten(0, 1)
            parts = [
                _slice_gradient(blocks, flat[i : i + rows], None if chosen is None else chosen[i : i + rows], generator)
                for i in range(0, len(flat), rows)
            ]
            gradients.append(torch.cat(parts).view_as(states))
    return gradients


def _next_tokens(ids: Tensor, device: torch.device) -> Tensor:
    """Return the labels [B * T] that the text gives; -1 at the end of a window, where it gives none."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1).flatten().to(device, torch.long)


def _slice_gradient(blocks: DecoderBlocks, hidden: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return the gradient [n, D] of the summed cross-entropy at hidden [n, D]; draws the labels if there are none."""
    entering = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = blocks.logits(entering[None])[0]
    slope = torch.softmax(logits.detach(), -1)
    if labels is None:
        labels = torch.multinomial(slope, 1, generator=generator)[:, 0]
    slope[torch.arange(len(slope), device=slope.device), labels] -= 1  # row of a -1: any column, zeroed below
    slope[labels < 0] = 0
    return torch.autograd.grad(logits, entering, slope)[0]


def _guided_statistics(
    blocks: DecoderBlocks, layer: int, block: nn.Module, states: BoundaryStates, gradients: list[Tensor],
    row_groups: int, hessian: bool, fisher: bool,
) -> dict[str, LayerStatistics]:  # fmt: skip
    """Return the statistics of one block; `gradients` behind it become those in front of it, in place."""
    anatomy = blocks.anatomy
    linears = _linears(anatomy, layer, block)
    sums = {
        part: GuidedSums(anatomy.linear_shape(layer, part), row_groups, hessian, fisher, blocks.device)
        for part in linears
    }
    modules = {part: linear for part, (_, linear) in linears.items()}
    for found in block_gradients(blocks, layer, modules, states, gradients):
        for part, (inputs, gradient) in found.items():
            sums[part].add(inputs.flatten(0, -2), gradient.flatten(0, -2))
    statistics = {linears[part][0]: counted.statistics() for part, counted in sums.items()}
    require_finite(statistics)
    return statistics


def block_gradients(
    blocks: DecoderBlocks, layer: int, linears: Mapping[K, nn.Module], states: BoundaryStates, gradients: list[Tensor]
) -> Iterator[dict[K, tuple[Tensor, Tensor]]]:
    """Yield per batch, by linear, its input [B, T, I] and the loss's gradient [B, T, O] at its output.

    The block must be present; `gradients` behind it become those in front of it, in place.
    """
    seen: dict[K, tuple[Tensor, Tensor]] = {}
    with ExitStack() as hooks:
        for key, linear in linears.items():
            hooks.callback(linear.register_forward_hook(_noting(seen, key)).remove)
        for batch, behind in enumerate(gradients):
            entering = states.take(layer, batch, blocks.device).requires_grad_()
            with torch.enable_grad():
                leaving = blocks.forward(layer, entering)
            outputs = [seen[key][1] for key in linears]
            gradients[batch], *slopes = torch.autograd.grad(leaving, [entering, *outputs], behind)
            yield {key: (seen[key][0].detach(), slope) for key, slope in zip(linears, slopes, strict=True)}
            seen.clear()


def _noting(seen: dict[K, tuple[Tensor, Tensor]], key: K) -> Any:
    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[key] = inputs[0], output

    return note
