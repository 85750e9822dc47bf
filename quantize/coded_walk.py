"""All linears of a decoder coded as a calibration walk comes by them, in memory or streamed alike.

matched    forward; every linear's target makes good what was lost before it (`output_matching`): lnq, gptq, awq
backward   statistics of the unquantized model, weighed by the gradient of its loss: guided, Fisher
forward    statistics behind coded blocks, targets as they are: activation second moments
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dwindle.quantize.calibration import backward_walk, forward_walk
from dwindle.quantize.layer_plan import LayerFormat
from dwindle.quantize.layer_statistics import LayerStatistics
from dwindle.quantize.learned import learn_block
from dwindle.quantize.methods import Coder, Walk
from dwindle.quantize.output_matching import match_outputs
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["coded_walk", "row_curvatures"]

CodedLinear = tuple[LayerFormat, Tensor, QuantizedWeight]


def coded_walk(
    blocks: DecoderBlocks, formats: Mapping[str, LayerFormat], coder: Coder, walk: Walk, ids: Tensor, seed: int = 0
) -> Iterator[CodedLinear]:
    """Yield (format, float weight [O, I], codes) of every linear that `formats` names; ids [N, T].

    One block is in memory at a time. Raises DataError for too short a text or activations that are not finite.
    """
    if walk.direction == "backward":
        for layer, statistics in backward_walk(blocks, ids, hessian=walk.hessian, fisher=walk.fisher, seed=seed):
            with blocks.block(layer) as module:
                yield from _coded(_weights(blocks, layer, module, formats), formats, coder, statistics)
        return
    rows = row_curvatures(blocks, ids, seed) if walk.rows else {}
    matched = walk.direction == "matched"  # `match_outputs` has Hessians of its own
    for block in forward_walk(blocks, ids, hessian=walk.hessian and not matched, keep_float=matched):
        dense = _weights(blocks, block.layer, block.module, formats)
        if matched:

            def code(name: str, target: Tensor, found: LayerStatistics) -> QuantizedWeight:
                return coder(formats[name], target, replace(found, row_curvature=rows.get(name)))

            made = match_outputs(blocks, block.layer, block.module, block.inputs, block.float_inputs, dense, code)
            if walk.descent is not None and made:
                made = learn_block(blocks, block.layer, made, block.inputs, block.float_inputs, walk.descent).weights
            coded = [(formats[name], dense[name], weight) for name, weight in made.items()]
        else:
            coded = list(_coded(dense, formats, coder, block.statistics))
        block.continue_with({layer.name: weight.dequantize().to(blocks.device) for layer, _, weight in coded})
        yield from coded


def row_curvatures(blocks: DecoderBlocks, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """Return how much every output row of every linear matters to the loss."""
    walk = backward_walk(blocks, ids, hessian=False, seed=seed)
    return {name: found.row_curvature for _, told in walk for name, found in told.items()
            if found.row_curvature is not None}  # fmt: skip


def _weights(
    blocks: DecoderBlocks, layer: int, module: nn.Module, formats: Mapping[str, LayerFormat]
) -> dict[str, Tensor]:
    """Return the float weights of a block's linears that get codes, by full name."""
    start = len(blocks.anatomy.layer_path(layer)) + 1
    found = {}
    for name in blocks.anatomy.parts(layer).values():
        if name in formats:
            weight = module.get_submodule(name[start:]).weight
            assert isinstance(weight, Tensor)
            found[name] = weight.detach()
    return found


def _coded(
    dense: Mapping[str, Tensor], formats: Mapping[str, LayerFormat], coder: Coder,
    statistics: dict[str, LayerStatistics],
) -> Iterator[CodedLinear]:  # fmt: skip
    """Code linear after linear; each one's statistics are given up with it."""
    for name in list(statistics):
        found = statistics.pop(name)
        if name in dense:
            yield formats[name], dense[name], coder(formats[name], dense[name], found)
        del found
