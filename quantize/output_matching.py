"""Weights to quantize that make good what was lost before them: targets matched to the unquantized model's outputs.

Coding each linear against its own float weight leaves every layer's error in the hidden states, and the next layers
add theirs. Behind blocks that are coded already, a linear reads x^ where the unquantized model has x, and what it
should put out is the unquantized model's y = W x. Among all weights, the mean of |V x^ - y|^2 over tokens is smallest
at the regression of y on x^,

    W* = (mean y x^^T + lambda W) (H^ + lambda)^-1        H^ = mean x^ x^^T,  lambda = damping * mean diag H^

and around it the error is (V - W*) H^ (V - W*)^T plus a constant: precisely what GPTQ and LNQ minimise. So they are
given W* and H^ in the place of W and H, and need know nothing of this (Li et al., "GPTAQ", ICML 2025,
arXiv:2504.02692, have the same objective and build it into the sweep).

The last linears of the two halves of a block, o and down, add to the residual stream h, and what h lacks by then they
can give back, as far as it can be told from x^. Their target is therefore

    y = W x + (h - h^)

where the family adds their outputs as they are (not where a norm stands between, as in Gemma and OLMo 2).

Within a block the linears are coded in four stages, each behind the ones before: q k v, o, gate up, down.

KL on stories260K (GPTQ, group 32, asymmetric, 3.557 bits a weight, 128 windows): 0.263 with float inputs, 0.269 with
inputs from the coded prefix and the float weight as the target, 0.205 with y = W x, 0.178 with the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.decoder_blocks import STAGES, TO_RESIDUAL, DecoderBlocks, entering_linear
from dwindle.quantize.layer_statistics import InputSums, LayerStatistics, require_finite
from dwindle.weights import QuantizedWeight

__all__ = ["TargetCoder", "match_outputs", "target_weight"]

DAMPING = 0.01
"""Share of the mean of H^'s diagonal that ties the target to the float weight."""

TargetCoder = Callable[[str, Tensor, LayerStatistics], QuantizedWeight]
"""(name of the linear, target weight [O, I], statistics of its input behind the coded prefix) -> codes."""


def match_outputs(
    blocks: DecoderBlocks,
    layer: int,
    block: nn.Module,
    inputs: Sequence[Tensor],
    float_inputs: Sequence[Tensor],
    names: Collection[str],
    code: TargetCoder,
) -> dict[str, QuantizedWeight]:
    """Return the codes of the linears of a block that `names` lists, by full name.

    `block` is the float block, in memory; `inputs` and `float_inputs` are the hidden states [B, T, D] that enter it
    behind the coded blocks and in the unquantized model (`CalibratedBlock` of a walk with keep_float). Raises
    DataError if activations are not finite.
    """
    start = len(blocks.anatomy.layer_path(layer)) + 1
    linears = {part: (name, block.get_submodule(name[start:])) for part, name in blocks.anatomy.parts(layer).items()}
    found: dict[str, QuantizedWeight] = {}
    dense: dict[str, Tensor] = {}
    for stage in STAGES:
        wanted = [linears[part] for part in stage if part in linears and linears[part][0] in names]
        if not wanted:
            continue
        sums = _StageSums(blocks, layer, block, wanted[0][1], stage[0] in TO_RESIDUAL)
        for states, float_states in zip(inputs, float_inputs, strict=True):
            sums.add(states, float_states, dense)
        statistics = sums.statistics()
        require_finite({name: statistics for name, _ in wanted})
        for name, linear in wanted:
            weight: Any = linear.weight
            target = target_weight(weight.detach().float(), sums.inputs, statistics, sums.lacking)
            found[name] = code(name, target, statistics)
            dense[name] = found[name].dequantize().to(target.device)
    return found


def target_weight(weight: Tensor, crossed: Tensor, found: LayerStatistics, lacking: Tensor | None = None) -> Tensor:
    """Return W* [O, I] for `crossed` = mean x x^^T [I, I] and `lacking` = mean (h - h^) x^^T [O, I]."""
    assert found.hessian is not None
    hessian = found.hessian[0].double()
    mean = float(hessian.diagonal().mean())
    ridge = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device) * (DAMPING * mean if mean > 0 else 1.0)
    outputs = weight.double() @ (crossed.double() + ridge)
    if lacking is not None:
        outputs += lacking
    target: Tensor = torch.linalg.solve(hessian + ridge, outputs.mT).mT.to(torch.float32)
    return target.contiguous()


class _StageSums:
    """H^, mean x x^^T and mean (h - h^) x^^T at the input of one linear, over batches."""

    def __init__(
        self, blocks: DecoderBlocks, layer: int, block: nn.Module, linear: nn.Module, to_residual: bool
    ) -> None:
        self._blocks, self._layer, self._block, self._linear = blocks, layer, block, linear
        weight: Any = linear.weight
        anatomy, width = blocks.anatomy, int(weight.shape[1])
        self._sums = InputSums(width, True, blocks.device)
        self._crossed = torch.zeros(width, width, device=blocks.device)
        self._residual = to_residual and anatomy.traits.norm_layout == "pre"
        self._lacking = torch.zeros(anatomy.width, width, device=blocks.device) if self._residual else None
        self._tokens = 0

    def add(self, states: Tensor, float_states: Tensor, dense: dict[str, Tensor]) -> None:
        """Count in a batch; `dense` are the weights of this block that are coded already."""
        at = self._blocks, self._layer, self._block, self._linear
        given, stream = entering_linear(*at, states, dense)
        wanted, float_stream = entering_linear(*at, float_states)
        self._tokens += len(given)
        self._sums.add(given)
        self._crossed.addmm_(wanted.T, given)
        if self._lacking is not None:
            self._lacking.addmm_((float_stream - stream).T, given)

    def statistics(self) -> LayerStatistics:
        """Return the statistics of the linear's input, and give up the sums."""
        return self._sums.statistics()

    @property
    def inputs(self) -> Tensor:
        """Return mean x x^^T [I, I]."""
        return self._crossed / self._tokens

    @property
    def lacking(self) -> Tensor | None:
        """Return mean (h - h^) x^^T [D, I] for linears that add to the residual stream as they are."""
        return None if self._lacking is None else self._lacking / self._tokens
