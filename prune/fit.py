r"""The shape and bits that serve a model best within a device's budgets: an exact search over all legal ones.

The space: FFN and hidden width in multiples of 32, KV groups with their queries, layers, and ways to store the
linears; a 6.4B model has some 10^8 points. For given bits, width, groups and layers, every cost of a device is a
straight line over the FFN (`devices.headroom`), and more FFN is always better (`capacity`), so the best FFN is one
division and what is left to enumerate are some 10^5 points. Nothing is sampled and nothing is guessed: the answer is
the maximum of the prior over all shapes that meet all budgets.

Kept on the way, at no extra cost: the best for each way to store and each set of axes that are cut. The runners-up
come from there, each the best of its kind rather than the neighbour of the winner.

Legal are shapes that transformers loads (`shape_refusals`), with whole groups, and states of Core ML whose sizes are
multiples of 32 (the context is rounded to it; head_dim never changes, and is told where it is none).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dwindle.devices import estimate
from dwindle.devices.budgets import Budget
from dwindle.devices.headroom import Limit, Place, headroom
from dwindle.devices.memory_cost import READS_FLOAT32
from dwindle.devices.workload import WEIGHTS_APART_ABOVE_BYTES
from dwindle.errors import DoesNotFit, RecipeError, UnsupportedModel
from dwindle.prune.capacity import DEPTH_COST, SQUARE_COSTS, bits_factor, effective_parameters
from dwindle.prune.cost_lines import CostLines, Pricing
from dwindle.prune.fit_plan import STATIC_PLACE, Candidate, FitPlan, worth
from dwindle.prune.shape import Shape, shape_refusals
from dwindle.prune.stored_choices import storages
from dwindle.prune.stored_size import Storage, model_bytes, planned_workload
from dwindle.prune.vocabulary_options import VocabularyOptions

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.devices.device_profile import DeviceProfile
    from dwindle.prune.fit_options import FitOptions

__all__ = ["KV_NUMBER_BYTES", "fit"]

KV_NUMBER_BYTES = {"onnx": 4}
"""Bytes of a number in the KV cache as exported by default; 2 for all others."""

_FFN, _WIDTH, _GROUPS, _LAYERS = 1, 2, 4, 8


@dataclass(frozen=True)
class _Point:
    """A shape and how it is stored. Ordered by worth, then by size, so that equals are broken the same way always."""

    score: float
    ffn: int
    width: int
    groups: int
    layers: int
    turned: bool

    def better(self, other: _Point | None) -> bool:
        return other is None or self._key() > other._key()

    def _key(self) -> tuple[float, int, int, int, int]:
        return self.score, self.layers, self.width, self.groups, self.ffn


def fit(
    anatomy: Anatomy, config: Any, profile: DeviceProfile, options: FitOptions, *, model: str, float_bits: int = 16
) -> FitPlan:
    """Return the best plan within all budgets, and the best of other kinds.

    A config is enough: no weights are read. Raises RecipeError for a runtime, bits, vocabulary or context that cannot
    be meant, DoesNotFit with the smallest reachable model where no shape meets the budgets.
    """
    search = _Search(anatomy, config, profile, options, float_bits)
    found = search.best()
    if not found:
        raise DoesNotFit(search.refusal())
    chosen = max(found, key=lambda key: found[key]._key())
    picked = [("best", chosen), *_kinds(found, chosen, search.storages)][: options.runners_up + 1]
    candidates = [search.candidate(kind, found[key], search.storages[key[0]]) for kind, key in picked]
    return FitPlan(
        model=model, full=search.original, target=options.target, title=profile.title, runtime=search.runtime,
        unit=profile.runtimes[search.runtime].unit, budgets=search.budgets, prompt_tokens=options.prompt_tokens,
        context=search.context, pessimistic=options.pessimistic, multiple=options.multiple, searched=search.visited,
        notes=search.notes(), chosen=candidates[0], runners_up=tuple(candidates[1:]),
    )  # fmt: skip


class _Search:
    """One model on one device."""

    def __init__(
        self, anatomy: Anatomy, config: Any, profile: DeviceProfile, options: FitOptions, float_bits: int
    ) -> None:
        self.config, self.profile, self.options = config, profile, options
        self.runtime = options.runtime or next(iter(profile.runtimes))
        self.storages = storages(profile, self.runtime, options.bits, float_bits)
        self.context = options.context_for(anatomy.context)
        self.budgets = _with_memory(options.parsed_budgets(), profile)
        self.original = _dense(anatomy)
        self.full = _with_vocabulary(self.original, options)
        self.turns = options.rotate is not False and self._can_turn(anatomy)
        self.kv_number_bytes = KV_NUMBER_BYTES.get(self.runtime, 2)
        self.static = (self.runtime, profile.runtimes[self.runtime].unit) == STATIC_PLACE
        self.pricings = [tuple(self._pricings(storage)) for storage in self.storages]
        self.bases = tuple(self._bases())
        self.visited = 0

    def _pricings(self, storage: Storage) -> Iterator[Pricing]:
        """Yield what models stored so cost: with a tied head or their own, in one file or with their weights apart."""
        options = self.options
        large = model_bytes(replace(self.full, tied=False), storage) > WEIGHTS_APART_ABOVE_BYTES
        for tied, apart in itertools.product({self.full.tied, self.full.tied and not self.turns}, {False, large}):
            place = Place(
                self.runtime, self.full.vocab, options.prompt_tokens, self.context, storage.scheme != "float",
                self.static, "low" if options.pessimistic else "value", storage.weight_format, storage.table_format,
                tied, apart,
            )  # fmt: skip
            limits = headroom(self.profile, self.budgets, place)
            if large and not apart:
                limits += (Limit(stored=1, metric="package_bytes", bound=WEIGHTS_APART_ABOVE_BYTES),)
            yield Pricing(limits, storage, self.full, self.original, options.multiple, self.kv_number_bytes,
                          self.runtime in READS_FLOAT32, tied, WEIGHTS_APART_ABOVE_BYTES if apart else 0)  # fmt: skip

    def _can_turn(self, anatomy: Anatomy) -> bool:
        from dwindle.prune.rotation import turning_refusal

        refusal = turning_refusal(anatomy, replace(self.original, layers=1, ffn_width=1, vocab=1))
        if refusal and self.options.rotate:
            raise RecipeError(f"fit: {refusal}. Leave rotate out.")
        return refusal is None

    def best(self) -> dict[tuple[int, int], _Point]:
        """Return (number of the storage, axes cut) -> the best point that meets all budgets."""
        found: dict[tuple[int, int], _Point] = {}
        for (number, pricings), base in itertools.product(enumerate(self.pricings), self.bases):
            tied = self.full.tied and not base[2]
            for pricing in (one for one in pricings if one.tied == tied):
                for point, axes in self._points(pricing, *base):
                    if point.better(found.get((number, axes))):
                        found[number, axes] = point
        return found

    def shape(self, ffn: int, width: int, groups: int, layers: int, turned: bool) -> Shape:
        """Return the full shape with these sizes."""
        full = self.full
        return replace(full, ffn_width=ffn, width=width, kv_heads=groups, heads=groups * full.queries_per_group,
                       layers=layers, tied=full.tied and not turned)  # fmt: skip

    def _bases(self) -> Iterator[tuple[int, int, bool]]:
        """Yield (width, KV groups, turned) of all that transformers loads."""
        full, axes = self.full, self.options.axes
        for width in _sizes(full.width, self.options.multiple if "width" in axes else 0):
            turned = self.turns and width < full.width
            for groups in range(full.kv_heads, 0 if "heads" in axes else full.kv_heads - 1, -1):
                same = (width, groups) == (full.width, full.kv_heads)
                if same or not shape_refusals(self.shape(full.ffn_width, width, groups, 1, turned), self.config):
                    yield width, groups, turned

    def _points(self, pricing: Pricing, width: int, groups: int, turned: bool) -> Iterator[tuple[_Point, int]]:
        """Yield the best FFN for every number of layers that meets the budgets, with the axes it cuts."""
        full, multiple = self.full, self.options.multiple
        costs = CostLines.of(self.shape(multiple, width, groups, 1, turned), pricing)
        at_full = CostLines.of(self.shape(full.ffn_width, width, groups, 1, turned), pricing)
        spent = SQUARE_COSTS["width"] * math.log(width / full.width) ** 2
        spent += SQUARE_COSTS["groups"] * math.log(groups / full.kv_heads) ** 2
        worth_of_bits = math.log(bits_factor(pricing.storage.code_bits))
        axes = _WIDTH * (width < full.width) | _GROUPS * (groups < full.kv_heads)
        for layers in range(full.layers, 0 if "layers" in self.options.axes else full.layers - 1, -1):
            self.visited += 1
            ffn = full.ffn_width
            if not at_full.holds(layers):
                ffn = costs.largest_ffn(layers, multiple, full.ffn_width) if "ffn" in self.options.axes else 0
            if not ffn:
                continue
            if pricing.least_bytes and model_bytes(self.shape(ffn, width, groups, layers, turned),
                                                   pricing.storage) <= pricing.least_bytes:  # fmt: skip
                continue
            score = (
                math.log(layers * costs.parameters(ffn)) - spent + worth_of_bits
                - SQUARE_COSTS["ffn"] * math.log(ffn / full.ffn_width) ** 2
                - DEPTH_COST * math.log(full.layers / layers)
            )  # fmt: skip
            cut = axes | _FFN * (ffn < full.ffn_width) | _LAYERS * (layers < full.layers)
            yield _Point(score, ffn, width, groups, layers, turned), cut

    def candidate(self, kind: str, point: _Point, storage: Storage) -> Candidate:
        """Return a point with its predictions; bytes are whole, so the last step may have to be taken back."""
        shape = self.shape(point.ffn, point.width, point.groups, point.layers, point.turned)
        made = self._predicted(kind, shape, storage, point.turned)
        while not made.holds and shape.ffn_width > self.options.multiple:
            shape = replace(shape, ffn_width=(shape.ffn_width - 1) // self.options.multiple * self.options.multiple)
            made = self._predicted(kind, shape, storage, point.turned)
        return made

    def _predicted(self, kind: str, shape: Shape, storage: Storage, turned: bool) -> Candidate:
        workload = planned_workload(shape, storage, self.context, self.kv_number_bytes, self.static)
        metrics = estimate(self.profile, workload, self.options.prompt_tokens, self.context, self.runtime).metrics
        judged = tuple(
            replace(metrics[b.metric], budget=b.text,
                    passed=b.holds(worth(metrics[b.metric], self.options.pessimistic)))
            for b in self.budgets
        )  # fmt: skip
        margins = {b.metric: b.limit / worth(metrics[b.metric], self.options.pessimistic) for b in self.budgets}
        rates = ("tokens_per_second", "tokens_per_second_sustained")
        slack = {name: (1 / ratio if name in rates else ratio) for name, ratio in margins.items()}
        return Candidate(
            kind=kind, shape=shape, storage=storage, rotated=turned, bytes=model_bytes(shape, storage),
            effective_parameters=effective_parameters(shape, self.full, storage.code_bits),
            streamed_bytes=workload.streamed_bytes, kv_bytes_per_token=workload.kv_bytes_per_token,
            metrics=metrics, judged=judged, binding=min(slack, key=lambda name: (slack[name], name)),
        )  # fmt: skip

    def smallest(self) -> Candidate:
        """Return the smallest legal model, stored in the fewest bytes."""
        full, axes = self.full, self.options.axes
        ffn = min(self.options.multiple, full.ffn_width) if "ffn" in axes else full.ffn_width
        shapes = [self.shape(ffn, width, groups, 1 if "layers" in axes else full.layers, turned)
                  for width, groups, turned in self.bases]  # fmt: skip
        storage, shape = min(
            ((storage, shape) for storage in self.storages for shape in shapes),
            key=lambda pair: model_bytes(*pair[::-1]),
        )
        return self._predicted("smallest", shape, storage, False)

    def refusal(self) -> str:
        """Return why nothing fits: the smallest reachable model, and what it misses by how much."""
        least = self.smallest()
        shape = least.shape
        missed = [
            f"{m.name} {worth(m, self.options.pessimistic):,.4g} {m.unit} where {m.budget} is needed"
            for m in least.judged if not m.passed
        ]  # fmt: skip
        return (
            f"fit: no shape meets the targets on {self.profile.title} ({self.runtime}). The smallest reachable has "
            f"{shape.parameters:,} parameters and {least.bytes:,} bytes ({shape.layers} layers, width {shape.width:,}, "
            f"FFN {shape.ffn_width:,}, {shape.kv_heads} KV groups, {least.storage}) and misses "
            f"{'; '.join(missed) or 'them only together'}. Relax that, or let more be cut (axes, bits, vocabulary)."
        )

    def notes(self) -> tuple[str, ...]:
        """Return what a reader should know."""
        found = []
        head_dim = self.full.head_dim
        if self.runtime == "coreml" and head_dim % 32:
            found.append(f"head_dim={head_dim} is no multiple of 32: Core ML states of such a size are reported to "
                         "fail on the Neural Engine (coremltools issue 2631), and no cut changes it")  # fmt: skip
        default = self.profile.memory.default.at()
        found += [f"{b.metric} {b.text} is more than the {default / 1e9:.2f} GB that one app may use by default"
                  for b in self.budgets if b.metric == "peak_memory_bytes" and b.limit > default]  # fmt: skip
        return tuple(found)


def _sizes(full: int, multiple: int) -> list[int]:
    """Return the sizes an axis may have, largest first; multiple 0: the axis may not be cut."""
    if not multiple:
        return [full]
    return [full, *range((full - 1) // multiple * multiple, 0, -multiple)]


def _with_memory(budgets: tuple[Budget, ...], profile: DeviceProfile) -> tuple[Budget, ...]:
    """Return the budgets with the memory that one app may use, where they name none."""
    if any(budget.metric == "peak_memory_bytes" for budget in budgets):
        return budgets
    allowed = profile.memory.default.at()
    return (*budgets, Budget("peak_memory_bytes", "<=", allowed, f"<= {allowed / 1e9:g} GB"))


def _dense(anatomy: Anatomy) -> Shape:
    shape = Shape.of(anatomy)
    if shape.experts:
        raise UnsupportedModel(
            f"fit: {shape.model_type} is a mixture of {shape.experts} experts; fit plans dense decoders. Cut experts "
            "to a size with `dwindle prune --keep experts=SHARE`."
        )
    return shape


def _with_vocabulary(shape: Shape, options: FitOptions) -> Shape:
    if options.vocabulary is None:
        return shape
    size = VocabularyOptions(size=options.vocabulary, multiple=options.multiple).limit(shape.vocab)
    if size >= shape.vocab:
        raise RecipeError(f"fit: vocabulary={options.vocabulary:,} cuts nothing; the model has {shape.vocab:,} tokens.")
    return replace(shape, vocab=size)


def _kinds(
    found: dict[tuple[int, int], _Point], chosen: tuple[int, int], ways: tuple[Storage, ...]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (kind, key) of plans unlike the chosen one and unlike each other, the first kinds first."""
    axes, bits = chosen[1], ways[chosen[0]].code_bits
    fewer = max((way.code_bits for way in ways if way.code_bits < bits), default=None)
    more = min((way.code_bits for way in ways if way.code_bits > bits), default=None)
    others = [key for key in found if key[1] != axes]
    same = [key for key in found if key[1] == axes]
    kinds = [
        ("FFN alone", [k for k in others if k[1] == _FFN]),
        ("all layers kept", [k for k in others if not k[1] & _LAYERS and axes & _LAYERS]),
        ("fewer layers", [k for k in others if k[1] & _LAYERS and not axes & _LAYERS]),
        ("width kept", [k for k in others if not k[1] & _WIDTH and axes & _WIDTH]),
        ("fewer bits", [k for k in same if ways[k[0]].code_bits == fewer]),
        ("more bits", [k for k in same if ways[k[0]].code_bits == more]),
        ("fewer KV groups", [k for k in others if k[1] & _GROUPS and not axes & _GROUPS]),
        ("all KV groups kept", [k for k in others if not k[1] & _GROUPS and axes & _GROUPS]),
        ("smaller width", [k for k in others if k[1] & _WIDTH and not axes & _WIDTH]),
        ("layers alone", [k for k in others if k[1] == _LAYERS]),
    ]
    told = {chosen}
    for kind, keys in kinds:
        left = [key for key in keys if key not in told]
        if left:
            key = max(left, key=lambda key: found[key]._key())
            told.add(key)
            yield kind, key
