"""What every choice of bits costs a linear, in nats/token of KL: three grades of one answer.

    grade    looks at                  cost of storing W as W + D
    kl       held-apart windows        measured: KL of the model with this one linear replaced (`joint_kl`)
    fisher   gradients of windows      1/2 mean <dL/dW, D>^2, exact to second order (`window_gradients`)
    error    the weights alone         |D|^2 / |W|^2

*Fisher.* One run forward and one back serve all choices of all linears, and a streamed checkpoint will do: the grade
to use where the model is large. On stories260K with rounded integers the logarithms of these costs and of the KL
measured with one linear replaced correlate 0.97 at 2, 3 and 4 bits; the diagonal of the Fisher information gives 0.81
to 0.84, guided Hessians 0.53 to 0.68.

*KL.* Also right where second order fails (1 and 2 bits). Its price is one run of the blocks behind the linear per
choice, so it is for models of which all choices are measured in minutes.

*Error.* Without data nothing tells one linear from another but its own error. The linearity theorem of HIGGS
(Malinovskii et al. 2024, arXiv:2411.17525) makes the loss a sum of coefficient x relative error; the coefficients
need data, so here they are equal. The numbers are no nats: plans made from them carry no predicted KL.

The codes are those of the method that will be applied, given as a callable, so the answer is the method's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from dwindle.quantize.allocation import Choice
from dwindle.quantize.joint_kl import JointKL
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan
from dwindle.quantize.window_gradients import error_curvatures
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.decoder_blocks import DecoderBlocks

__all__ = ["Candidates", "Coder", "Grade", "Sensitivities", "error_sensitivities", "fisher_sensitivities",
           "kl_sensitivities", "layer_choices"]  # fmt: skip

Grade = Literal["kl", "fisher", "error"]
Shape = tuple[int, int]
Coder = Callable[[LayerFormat, Tensor], QuantizedWeight]
"""(format, float weight [O, I]) -> codes; the format bears the linear's name."""
Candidates = Mapping[str, Mapping[LayerFormat, QuantizedWeight]]
"""Name of a linear -> every form it may take."""

_SAMPLED_FROM = 1 << 18
"""Weights from which on the error grade looks at one group in four."""
_SAMPLED_STRIDE = 4


@dataclass(frozen=True)
class Sensitivities:
    """Name of a linear -> format -> predicted cost."""

    grade: Grade
    costs: Mapping[str, Mapping[LayerFormat, float]]

    @property
    def in_nats(self) -> bool:
        """Return whether costs are nats/token."""
        return self.grade != "error"

    def choices(self, shapes: Mapping[str, Shape]) -> dict[str, list[Choice]]:
        """Return what `allocate` takes; `shapes` are (O, I) by name."""
        return {
            name: [Choice(f.stored_bits(shapes[name]), cost, f.bits, f.group_size) for f, cost in costs.items()]
            for name, costs in self.costs.items()
        }

    def total(self, formats: Mapping[str, LayerFormat]) -> float:
        """Return the sum of the costs of one format per linear."""
        return sum(costs[formats[name]] for name, costs in self.costs.items())


def layer_choices(
    plan: LayerPlan, shapes: Mapping[str, Shape], linears: Iterable[str], bits: Sequence[int],
    group_sizes: Sequence[int] = (),
) -> dict[str, tuple[LayerFormat, ...]]:  # fmt: skip
    """Return the formats each planned linear may take: every width, in its planned group and in `group_sizes`.

    A group size that does not divide a linear (rows of palettes, inputs of integers) is not offered there.
    """
    planned = plan.formats
    found = {}
    for name in linears:
        if name not in planned:
            continue
        layer = planned[name]
        extent = shapes[name][0 if layer.scheme == "palettize" else 1]
        groups = dict.fromkeys([layer.group_size, *(size for size in group_sizes if extent % size == 0)])
        found[name] = tuple(replace(layer, bits=width, group_size=group) for width in bits for group in groups)
    return found


def fisher_sensitivities(
    blocks: DecoderBlocks, ids: Tensor, choices: Mapping[str, Sequence[LayerFormat]], coder: Coder, seed: int = 0
) -> Sensitivities:
    """Return the second-order costs on windows ids [N, T]; `seed` draws the labels."""
    return Sensitivities("fisher", error_curvatures(blocks, ids, choices, coder, seed))


def kl_sensitivities(
    joint: JointKL, candidates: Candidates, base: Mapping[str, QuantizedWeight] | None = None
) -> Sensitivities:
    """Return the measured costs of replacing one linear at a time, all others as in `base` (float where not named)."""
    return Sensitivities("kl", joint.around(candidates, base))


def error_sensitivities(
    choices: Mapping[str, Sequence[LayerFormat]], weight_of: Callable[[str], Tensor], coder: Coder
) -> Sensitivities:
    """Return the relative squared errors; a large linear's from one group in four."""
    costs: dict[str, dict[LayerFormat, float]] = {}
    for name, formats in choices.items():
        dense = weight_of(name).detach().float()
        costs[name] = {layer: _relative_error(layer, dense, coder) for layer in formats}
    return Sensitivities("error", costs)


def _relative_error(layer: LayerFormat, dense: Tensor, coder: Coder) -> float:
    sample = _sampled(layer, dense)
    error = coder(layer, sample).dequantize().to(sample.device) - sample
    power = float(sample.square().sum())
    return float(error.square().sum()) / power if power else 0.0


def _sampled(layer: LayerFormat, dense: Tensor) -> Tensor:
    """Return a quarter of the rows of a large weight, whole groups of those that share a palette."""
    group = layer.group_size if layer.scheme == "palettize" else 1
    groups = len(dense) // group
    if dense.numel() < _SAMPLED_FROM or groups < _SAMPLED_STRIDE:
        return dense
    return dense.view(groups, group, -1)[::_SAMPLED_STRIDE].reshape(-1, dense.shape[1])
