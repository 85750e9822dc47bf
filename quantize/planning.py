"""Which bits every linear gets: the plan that `run` applies and `--dry-run` shows.

Without a target all linears get `bits`. With one, the plan is the best within it:

    small models, calibrated     costs by replacing one linear at a time, then a search by measured joint KL
    large or streamed ones       second-order costs from one run forward and one back (`sensitivity`, fisher)
    no calibration text          relative squared errors (error)

One calibration window in eight is kept from the codes of the candidates; half of those measure costs, half judge plans.
Candidates are coded on the unquantized model's inputs, each for itself: a plan is wanted before anything is coded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.decoder_blocks import DecoderBlocks, InMemoryBlocks
from dwindle.quantize.allocation import Choice, Target, reachable_bits
from dwindle.quantize.bit_plan import BitPlan, rest_of
from dwindle.quantize.bit_search import allocated_formats, search_plan
from dwindle.quantize.calibration import backward_walk, forward_walk
from dwindle.quantize.coded_walk import row_curvatures
from dwindle.quantize.formats import carried_bits
from dwindle.quantize.joint_kl import JointKL
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan, ModelShapes, plan_layers
from dwindle.quantize.layer_statistics import LayerStatistics
from dwindle.quantize.methods import layer_coder, layerwise_method, walk_of
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.sensitivity import (
    Sensitivities,
    error_sensitivities,
    fisher_sensitivities,
    kl_sensitivities,
    layer_choices,
)
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.token_set import TokenSet

__all__ = ["MEASURED_WEIGHTS", "ModelToPlan", "plan"]

MEASURED_WEIGHTS = 100_000_000
"""Up to so many weights in linears, costs and plans are measured; above, second order has to do."""
_JUDGES = 8
"""One window in so many is kept from the candidates' codes."""
_FEWER, _MORE = 2, 3
"""How far from the target the bits of a linear may lie, where none were named: further ones cost time and are hardly
ever taken."""

Choices = Mapping[str, Sequence[LayerFormat]]


class ModelToPlan:
    """What planning reads of a model, in memory or streamed."""

    def __init__(
        self, known: ModelShapes, weight_of: Callable[[str], Tensor], parameters: Iterable[tuple[str, int]],
        blocks: DecoderBlocks,
    ) -> None:  # fmt: skip
        self.known, self.weight_of, self.parameters, self.blocks = known, weight_of, list(parameters), blocks

    @classmethod
    def of(cls, bundle: ModelBundle) -> ModelToPlan:
        """Return that of a bundle."""

        def weight_of(name: str) -> Tensor:
            weight: Tensor = bundle.model.get_submodule(name).weight
            return weight.detach()

        sizes = ((name, parameter.numel()) for name, parameter in bundle.model.named_parameters())
        return cls(ModelShapes.of(bundle), weight_of, sizes, InMemoryBlocks(bundle))

    @property
    def linears(self) -> list[str]:
        """Return the names of the decoder's linears."""
        return self.known.anatomy.linear_names()


def plan(model: ModelBundle | ModelToPlan, options: QuantizeOptions, calibration: TokenSet | None = None) -> BitPlan:
    """Return the plan. Raises RecipeError if a layer cannot have its format, or no allocation reaches the target."""
    ready = model if isinstance(model, ModelToPlan) else ModelToPlan.of(model)
    known = ready.known
    base = plan_layers(known if isinstance(model, ModelToPlan) else model, options)
    width = torch.finfo(known.storage_dtype).bits
    rest = rest_of(ready.parameters, base, known.shapes, set(ready.linears), width)
    if not options.mixed:
        uniform = BitPlan.from_layer_plan(base, known.shapes, ready.linears)
        return replace(uniform, rest=rest, notes=base.notes)
    made = _Planning(ready, base, options, rest)
    return made.without_text() if calibration is None else made.with_text(calibration.ids)


class _Planning:
    """One target, and the ways to it."""

    def __init__(self, model: ModelToPlan, base: LayerPlan, options: QuantizeOptions, rest: tuple[int, int]) -> None:
        self.model, self.base, self.options, self.rest = model, base, options, rest
        self.shapes = model.known.shapes
        planned = [name for name in model.linears if name in base.formats]
        self.weights = sum(math.prod(self.shapes[name]) for name in planned)
        self.target = Target(self.weights, options.target_bits_per_weight, options.target_bytes, rest[0])
        self.bits = options.allowed_bits or self._near_bits(carried_bits(options))

    def _near_bits(self, carried: tuple[int, ...]) -> tuple[int, ...]:
        """Return the carried bits around the target; all of them if those, tables included, do not reach it."""
        asked = self.target.budget_bits / self.weights
        near = [bits for bits in carried if asked - _FEWER <= bits <= asked + _MORE]
        return tuple(near) if near and self._stored_bits(min(near)) <= self.target.budget_bits else carried

    def _stored_bits(self, bits: int) -> int:
        """Return what all planned linears take with so many bits."""
        forms = [self.base.formats[name] for name in self.model.linears if name in self.base.formats]
        return sum(replace(form, bits=bits).stored_bits(self.shapes[form.name]) for form in forms)

    def without_text(self) -> BitPlan:
        """Return the plan by relative errors."""
        choices = self._choices()
        coder = layer_coder(self.options, "kmeans" if self.options.scheme == "palettize" else "rtn")
        costs = error_sensitivities(choices, self.model.weight_of, lambda form, dense: coder(form, dense, None))
        return self._made(allocated_formats(costs.costs, self.shapes, self.target.budget_bits), costs)

    def with_text(self, ids: Tensor) -> BitPlan:
        """Return the plan by measured KL, or by second order where the model is large."""
        if self.weights > MEASURED_WEIGHTS:
            return self._by_second_order(ids)
        choices = self._choices()
        seen, probes, judges = _parted(ids)
        candidates = self._candidates(choices, seen)
        probe, judge = JointKL(self.model.blocks, probes), JointKL(self.model.blocks, judges)
        costs = kl_sensitivities(probe, candidates)
        found = search_plan(costs, candidates, self.shapes, self.target.budget_bits, probe, judge)
        return self._made(
            found.formats, costs, predicted_kl=found.predicted_kl, measured_kl=found.measured_kl,
            joint_curve=found.curve.anchors,
        )  # fmt: skip

    def _by_second_order(self, ids: Tensor) -> BitPlan:
        choices = self._choices()
        coder = layer_coder(self.options, "kmeans" if self.options.scheme == "palettize" else "rtn")
        costs = fisher_sensitivities(
            self.model.blocks, ids, choices, lambda form, dense: coder(form, dense, None), self.options.seed
        )
        formats = allocated_formats(costs.costs, self.shapes, self.target.budget_bits)
        return self._made(formats, costs, predicted_kl=costs.total(formats))

    def _choices(self) -> dict[str, tuple[LayerFormat, ...]]:
        """Return what every linear may take. Raises RecipeError if no allocation of them reaches the target."""
        choices = layer_choices(self.base, self.shapes, self.model.linears, self.bits)
        sizes = {name: [self._choice(form) for form in forms] for name, forms in choices.items()}
        self.target.require_reachable(*reachable_bits(sizes))
        return choices

    def _choice(self, form: LayerFormat) -> Choice:
        return Choice(form.stored_bits(self.shapes[form.name]), 0.0, form.bits, form.group_size)

    def _candidates(self, choices: Choices, ids: Tensor) -> dict[str, dict[LayerFormat, QuantizedWeight]]:
        """Return the codes of every choice, by the layer-by-layer method on the unquantized model's inputs."""
        method = layerwise_method(self.options, self.options.method_used(True))
        coder, walk = layer_coder(self.options, method), walk_of(self.options, method, True)
        found: dict[str, dict[LayerFormat, QuantizedWeight]] = {}

        def code(statistics: Mapping[str, LayerStatistics | None]) -> None:
            for name in [name for name in statistics if name in choices]:
                dense = self.model.weight_of(name)
                found[name] = {form: coder(form, dense, statistics[name]) for form in choices[name]}

        if walk.direction == "backward":
            blocks = self.model.blocks
            for _, told in backward_walk(blocks, ids, hessian=walk.hessian, fisher=walk.fisher, seed=self.options.seed):
                code(told)
        elif walk.direction == "none":
            code(dict.fromkeys(choices))
        else:
            rows = row_curvatures(self.model.blocks, ids, self.options.seed) if walk.rows else {}
            for block in forward_walk(self.model.blocks, ids, hessian=walk.hessian):
                told = {name: replace(s, row_curvature=rows.get(name)) for name, s in block.statistics.items()}
                code(told)
        return found

    def _made(self, formats: Mapping[str, LayerFormat], costs: Sensitivities, **known: Any) -> BitPlan:
        notes = list(self.base.notes)
        most = sum(max(self._choice(f).stored_bits for f in costs.costs[name]) for name in costs.costs)
        if most <= self.target.budget_bits:
            notes.append("the target is met with the most bits allowed everywhere; it asks for nothing")
        return BitPlan.from_formats(
            formats, self.shapes, costs, rest=self.rest, notes=tuple(notes),
            target_bits_per_weight=self.options.target_bits_per_weight, target_bytes=self.options.target_bytes, **known,
        )  # fmt: skip


def _parted(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows for the candidates' codes, for the costs, and for the joint KL; very few serve all."""
    if len(ids) < 2 * _JUDGES:
        return ids, ids, ids
    held = torch.arange(len(ids)) % _JUDGES == _JUDGES - 1
    return ids[~held], ids[held][0::2], ids[held][1::2]
