"""Learned rounding: signed gradient descent on where every weight rounds to, block by block and then all at once.

Rounding to nearest minimises the error of each weight, GPTQ and LNQ that of each linear. Here the error of a whole
block counts, with its attention, its activation and its norms, and the codes that lie best *together* are searched for
by gradients (`trainable` says how codes get any). Two losses, the second on top of the first:

    block by block     |block'(x') - block(x)|^2             x' behind the coded blocks before it, x behind float ones
    all blocks         KL(unquantized || quantized)          of the next token, per position

The first needs one block in memory. The second needs the model, and is worth it: what a block does wrong matters only
as far as the head sees it, and errors of blocks may cancel. KL of 200 steps of all blocks (AdamW, `own_text`, 2,048
tokens a step) from GPTQ's or LNQ's codes with guided Hessians: babyllama-105, symmetric 2-bit integers 0.299 -> 0.097
(AutoRound's own: 0.197); stories260K, 2-bit integers 1.67 -> 0.46, 4-bit 0.052 -> 0.032 (100 steps), palettes of 8
entries 0.68 -> 0.18, of 4 entries 3.10 -> 0.83.

*Signed gradients* (SignRound / AutoRound; Cheng et al. 2023, arXiv:2309.05516). Every offset and table moves by

    v <- clamp(v - rate sign(dL/dv), -1/2, 1/2)        rate = (1 - step / steps) / steps

The answer wanted is a choice between two neighbouring codes, so all that matters is whether half a grid step is
walked within the budget: the steps add up to 1/2, and no rate must be tuned to a model. There are no moments to keep.
AutoRound learns offsets and clipping ratios of integers; here zero points are learned as well, and the same descent
runs on palettes: offsets between neighbouring entries, the entries themselves, row scales.

*AdamW* with free offsets is the other way, where weights are as good as retrained: EfficientQAT's first phase (Chen et
al. 2024, arXiv:2407.11062, section 3.2), which trains a block's weights and scales on the same loss. All blocks at once
it is the better one: on babyllama-105 the held-back KL after 60 steps is 0.153, with signs 0.206, and 0.246 at a third
of ADAM_RATE; at 2.7 times that rate 0.187 after 120 steps (0.130 after 100 as it is).

*Never worse than the start.* One window in eight is held back from training. The loss on it, at the start and at
intervals, chooses the codes that are returned: AutoRound takes the best training loss of a single batch, which is luck
as much as merit, and a few hundred thousand offsets can learn 128 windows by heart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dwindle.divergence import forward_kl
from dwindle.errors import DataError
from dwindle.quantize.calibration import forward_walk
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.trainable import TrainableIntegers, TrainablePalettes, trainable
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["Descent", "Learned", "learn_block", "learn_blocks", "learn_jointly"]

HELD_BACK = 8
"""Every so many windows one is held back."""
LOOKS = 10
"""Times the held-back windows are looked at."""
REACH = 0.5
"""How far a signed offset may go, in grid steps: to the code above or below the nearest."""
LARGEST_STEP = 0.02
"""Most that a signed offset moves in one step unless a rate is given: few steps must not be wild ones."""
ADAM_RATE = 0.015
"""Peak rate of AdamW for offsets, in grid steps."""
ADAM_TABLE_SHARE = 0.25
"""Rate of scales and palette entries under AdamW, as a share of that of offsets."""

Optimizer = Literal["sign", "adamw"]
_log = logging.getLogger("dwindle")

Loss = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(numbers of windows [B], weights by name) -> mean loss over them, differentiable in the weights."""


@dataclass(frozen=True)
class Descent:
    """How offsets and tables move."""

    steps: int = QuantizeOptions.iterations
    """Updates; each sees one batch."""
    batch_size: int = QuantizeOptions.batch_size
    """Windows per batch."""
    optimizer: Optimizer = "sign"
    """Signed gradients with bounded offsets, or AdamW with free ones."""
    rate: float | None = None
    """First step in grid units; None is 1 / steps (LARGEST_STEP at most) for signs,
    ADAM_RATE for AdamW."""
    seed: int = 0
    """Order of the windows."""

    @classmethod
    def of(cls, options: QuantizeOptions, optimizer: Optimizer = "sign") -> Descent:
        """Return what the recipe asks for."""
        return cls(options.iterations, options.batch_size, optimizer, options.learning_rate, options.seed)

    def rates(self) -> tuple[float, float]:
        """Return the first steps of offsets and of tables.

        >>> Descent(steps=200).rates()
        (0.005, 0.005)
        """
        if self.optimizer == "sign":
            rate = self.rate or min(1 / self.steps, LARGEST_STEP)
            return rate, rate
        return self.rate or ADAM_RATE, ADAM_TABLE_SHARE * (self.rate or ADAM_RATE)


@dataclass(frozen=True)
class Learned:
    """What a descent found: codes, and the loss on the held-back windows before and after."""

    weights: dict[str, QuantizedWeight]
    first_loss: float
    last_loss: float


def learn_block(
    blocks: DecoderBlocks,
    layer: int,
    start: Mapping[str, QuantizedWeight],
    inputs: Sequence[Tensor],
    float_inputs: Sequence[Tensor],
    descent: Descent | None = None,
    *,
    token_weights: Tensor | None = None,
) -> Learned:
    """Return better codes for the linears of one block, in the formats of `start` (by full name).

    `inputs` are batches of hidden states [B, T, D] behind the coded blocks before it, `float_inputs` the same windows
    behind float ones (`forward_walk` gives both); they may lie on another device than the block. `token_weights`
    [N, T], mean 1, say how much each position counts. Memory: the block, what trains it, and the float block's
    outputs. Raises DataError for fewer than two windows.
    """
    with blocks.block(layer) as module:
        path = blocks.anatomy.layer_path(layer) + "."
        parts = {name: trainable(_weight(module, name.removeprefix(path)), start[name]) for name in start}
        with torch.no_grad():
            targets = [blocks.forward(layer, batch.to(blocks.device)).to(batch.device) for batch in float_inputs]
        behind, wanted = ([window for batch in states for window in batch] for states in (inputs, targets))

        def loss(chosen: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            hidden, aim = (
                torch.stack([windows[i] for i in chosen.tolist()]).to(blocks.device) for windows in (behind, wanted)
            )
            error = (blocks.forward(layer, hidden, weights) - aim).square().mean(-1)
            return (error if token_weights is None else error * token_weights[chosen].to(error)).mean()

        return _descend(parts, loss, len(behind), descent or Descent())


def learn_blocks(
    blocks: DecoderBlocks, start: Mapping[str, QuantizedWeight], ids: Tensor, descent: Descent | None = None
) -> dict[str, QuantizedWeight]:
    """Return better codes for every linear of `start`, one block after the other, on windows `ids` [N, T].

    Memory: one block, what trains it, and four times the hidden states of all windows. Raises DataError for too short
    a text.
    """
    found = dict(start)
    for block in forward_walk(blocks, ids, hessian=False, keep_float=True):
        own = {name: start[name] for name in block.statistics if name in start}
        learned = learn_block(blocks, block.layer, own, block.inputs, block.float_inputs, descent)
        found |= learned.weights
        block.continue_with({name: weight.dequantize().to(blocks.device) for name, weight in learned.weights.items()})
        _log.info("learned rounding: block %d of %d, held-back error %.4g -> %.4g", block.layer + 1,
                  blocks.anatomy.layers, learned.first_loss, learned.last_loss)  # fmt: skip
    return found


def learn_jointly(
    blocks: DecoderBlocks, start: Mapping[str, QuantizedWeight], ids: Tensor, descent: Descent | None = None
) -> Learned:
    """Return better codes for all linears of `start` at once, by the KL from the unquantized model on `ids` [N, T].

    Memory: all blocks, what trains them, and one batch's graph through the model. Raises DataError for fewer than two
    windows.
    """
    with ExitStack() as present:
        parts = {}
        for layer in range(blocks.anatomy.layers):
            module, path = present.enter_context(blocks.block(layer)), blocks.anatomy.layer_path(layer) + "."
            for name in blocks.anatomy.parts(layer).values():
                if name in start:
                    parts[name] = trainable(_weight(module, name.removeprefix(path)), start[name])

        def loss(chosen: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
            with torch.no_grad():
                teacher = _logits(blocks, ids[chosen], {})
            return forward_kl(_logits(blocks, ids[chosen], weights), teacher)

        return _descend(parts, loss, len(ids), descent or Descent(optimizer="adamw"))


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _logits(blocks: DecoderBlocks, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return logits [B * T, V] of the model with these weights in place of its own."""
    hidden = blocks.embed(ids)
    for layer in range(blocks.anatomy.layers):
        names = blocks.anatomy.parts(layer).values()
        hidden = blocks.forward(layer, hidden, {name: weights[name] for name in names if name in weights})
    return blocks.logits(hidden).flatten(0, 1)


def _descend(
    parts: Mapping[str, TrainableIntegers | TrainablePalettes], loss: Loss, windows: int, descent: Descent
) -> Learned:
    """Return the codes with the least loss on the held-back windows among those that the descent passed by."""
    held, others = _hold_back(windows)
    first = least = _judge(parts, loss, held, descent.batch_size)
    best = {name: part.finish() for name, part in parts.items()}
    walk = _Walk(parts, descent)
    batches = _batches(others, descent)
    for step in range(descent.steps):
        value = loss(batches[step], {name: part.weight() for name, part in parts.items()})
        walk.step(step, value)
        if (step + 1) * LOOKS // descent.steps > step * LOOKS // descent.steps:
            seen = _judge(parts, loss, held, descent.batch_size)
            _log.debug("step %d: loss %.4g, held back %.4g", step + 1, float(value.detach()), seen)
            if seen < least:
                least, best = seen, {name: part.finish() for name, part in parts.items()}
    return Learned(best, first, least)


def _hold_back(windows: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the windows held back, and of the others."""
    if windows < 2:
        raise DataError(
            f"quantize: learned rounding trains on some calibration windows and is judged by others; found {windows}, "
            "needed 2 or more (128 are usual). Give a longer calibration text or a shorter context."
        )
    numbers = torch.arange(windows)
    held = numbers % HELD_BACK == min(HELD_BACK, windows) - 1
    return numbers[held], numbers[~held]


def _batches(windows: Tensor, descent: Descent) -> list[Tensor]:
    """Return one batch of window numbers per step: shuffled passes over all, one after the other."""
    order = torch.Generator().manual_seed(descent.seed)
    size = min(descent.batch_size, len(windows))
    passes = -(-descent.steps * size // len(windows))
    stream = torch.cat([windows[torch.randperm(len(windows), generator=order)] for _ in range(passes)])
    return list(torch.split(stream[: descent.steps * size], size))


@torch.no_grad()
def _judge(
    parts: Mapping[str, TrainableIntegers | TrainablePalettes], loss: Loss, held: Tensor, batch_size: int
) -> float:
    """Return the mean loss over the held-back windows; infinite where it is not a number."""
    weights = {name: part.weight() for name, part in parts.items()}
    total = sum(float(loss(batch, weights)) * len(batch) for batch in torch.split(held, batch_size))
    return total / len(held) if total == total else float("inf")


class _Walk:
    """Moves the parameters of all parts against their gradients."""

    def __init__(self, parts: Mapping[str, TrainableIntegers | TrainablePalettes], descent: Descent) -> None:
        self._offsets = [part.offset for part in parts.values()]
        self._tables = [table for part in parts.values() for table in part.tables()]
        self._steps = descent.steps
        self._rates = descent.rates()
        self._adam = None
        if descent.optimizer == "adamw":
            groups = [{"params": self._offsets}, {"params": self._tables}]
            self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, number: int, value: Tensor) -> None:
        """Take step `number` of the descent against the gradient of `value`, with rates that fall to 0."""
        moving = [*self._offsets, *self._tables]
        gradients = torch.autograd.grad(value, moving)  # not backward(): the model's own parameters stay untouched
        offset_rate, table_rate = (rate * (1 - number / self._steps) for rate in self._rates)
        with torch.no_grad():
            if self._adam is not None:
                for parameter, gradient in zip(moving, gradients, strict=True):
                    parameter.grad = gradient
                for group, rate in zip(self._adam.param_groups, (offset_rate, table_rate), strict=True):
                    group["lr"] = rate
                self._adam.step()
                return
            for place, (parameter, gradient) in enumerate(zip(moving, gradients, strict=True)):
                of_offset = place < len(self._offsets)
                parameter.sub_(gradient.sign(), alpha=offset_rate if of_offset else table_rate)
                if of_offset:
                    parameter.clamp_(-REACH, REACH)
