"""Budgets solved for what a model may cost: bytes it may weigh and read, operations it may do. Torch-free.

`estimate` goes from a model to its speed and memory. Whoever searches a model for a device needs the way back, and
since the cost model is a sum of products and of maxima it has one: every budget is a few straight lines over the
numbers of `Cost`, so the largest model along any axis is a division instead of a search. With r = share x bandwidth,
u = decode compute / 2 (where the unit has one and the weights are packed), v = attention compute and o = the overhead
of a layer (where it has them), T the prompt's length and A the attention width:

    seconds of a token   max(linear bytes / r, linear weights / u) + max(table bytes / r, table weights / u)
                         + max(KV bytes / r, 4 A / v) x cached tokens + other bytes / r + layers x o + overhead
    tokens/s >= R        seconds of a token <= 1 / R                      up to eight lines: the sides of the maxima
    first token <= t     2 N T + 2 T^2 A <= (t - overheads) x compute     and four lines without the cache
    memory <= M          weights + copies x context x KV <= M - logits of the prompt - fixed cost, and without the
                         logits for the weights while loading
    load <= s            package / storage + weights while loading / r + widened bytes x 7 ns <= s - fixed cost
    package <= P         stored <= P

Weights of a format that a runtime multiplies in several products (`PRODUCTS`) count as many times in u's lines. A
graph is taken to keep one KV cache (the fused form), and no processor's cache to hold the weights (where one does, the
estimate is the faster). Weights are loaded bytes times the copies of their use; a model is either small enough for one
file or keeps its weights apart (`Place.apart`), with other copies while it loads: a search asks for both. A test holds
these lines to `estimate`, budget by budget.

>>> from dwindle.devices.budgets import parse_budgets
>>> from dwindle.devices.device_profile import load_profile
>>> where = Place("coreml", vocabulary=49_152, prompt_tokens=128, context=4096)
>>> (line, *_) = headroom(load_profile("iphone-15-pro"), parse_budgets(["tokens_per_second >= 30"]), where)
>>> f"{line.bound / line.linear_bytes / 1e9:.3f} GB"
'1.343 GB'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from dwindle.devices.budgets import Budget
from dwindle.devices.cost_model import (
    LOAD_SECONDS,
    METRIC_UNITS,
    PRODUCTS,
    WIDENING_SECONDS,
)
from dwindle.devices.device_profile import FLOAT_FORMATS, ComputeUnit, DeviceProfile
from dwindle.devices.memory_cost import memory_cost
from dwindle.devices.workload import WeightUse
from dwindle.errors import RecipeError

__all__ = ["Cost", "End", "Limit", "Place", "headroom"]

End = Literal["value", "low"]
"""Which end of the profile's ranges counts: the middle, or the one that is unfavourable to the model."""


@dataclass(frozen=True)
class Cost:
    """What a workload costs; also the weights of a line over these."""

    stored: float = 0.0
    """Bytes of all weights in the file."""
    linear_bytes: float = 0.0
    """Loaded bytes of the linears."""
    linear_weights: float = 0.0
    table_bytes: float = 0.0
    """Loaded bytes of the table that every token reads: the head, or the embedding tied to it."""
    table_weights: float = 0.0
    looked_up_bytes: float = 0.0
    """Loaded bytes of an embedding that is no head."""
    other_bytes: float = 0.0
    """Loaded bytes of norms and biases."""
    other_weights: float = 0.0
    kv: float = 0.0
    """Bytes the KV cache grows by with each token."""
    attention_width: float = 0.0
    depth: float = 0.0
    """Decoder layers."""


@dataclass(frozen=True)
class Limit(Cost):
    """A budget as a line: the sum of costs, each times its weight here, is at most `bound`."""

    metric: str = ""
    bound: float = 0.0

    def of(self, cost: Cost) -> float:
        """Return the weighted sum; the budget holds while it is at most `bound`."""
        return (
            self.stored * cost.stored + self.looked_up_bytes * cost.looked_up_bytes
            + self.linear_bytes * cost.linear_bytes + self.linear_weights * cost.linear_weights
            + self.table_bytes * cost.table_bytes + self.table_weights * cost.table_weights
            + self.other_bytes * cost.other_bytes + self.other_weights * cost.other_weights
            + self.kv * cost.kv + self.attention_width * cost.attention_width + self.depth * cost.depth
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where and how a model is to run."""

    runtime: str
    vocabulary: int
    prompt_tokens: int
    context: int
    packed: bool = True
    """Its weights are integers or palettes."""
    static_shapes: bool = False
    end: End = "value"
    linear_format: str | None = None
    """Weight format of the linears, where it is one."""
    table_format: str | None = None
    """Weight format of the table that makes the logits, and of an embedding beside it."""
    tied: bool = False
    """Whether the embedding is the head, too."""
    apart: bool = False
    """Whether the weights are so large that they lie in a file of their own."""

    def products(self, form: str | None) -> int:
        """Return how many products the runtime makes of one with weights in this format."""
        return PRODUCTS.get(self.runtime, {}).get(form or "", 1)

    def resident(self, column: int, *, loading: bool) -> dict[str, float]:
        """Return the bytes in memory for each loaded byte, by the fields of `Cost`."""
        table = self.packed if self.table_format is None else self.table_format not in FLOAT_FORMATS
        weights: dict[str, tuple[WeightUse, bool]] = {
            "linear_bytes": ("linear", self.packed),
            "table_bytes": ("shared" if self.tied else "head", table),
            "looked_up_bytes": ("embedding", table),
            "other_bytes": ("linear", False),
        }
        cost = memory_cost(self.runtime)
        return {
            name: cost.weight_copies(use, packed=packed, loading=loading and not self.apart)[column]
            for name, (use, packed) in weights.items()
        }


def headroom(profile: DeviceProfile, budgets: Iterable[Budget], place: Place) -> tuple[Limit, ...]:
    """Return the lines that a workload has to stay under for all budgets to hold in `estimate`.

    Raises RecipeError for a budget on loading where the profile does not know the storage.
    """
    return tuple(limit for budget in budgets for limit in _limits(profile, budget, place))


def _limits(profile: DeviceProfile, budget: Budget, place: Place) -> Iterator[Limit]:
    if budget.metric not in METRIC_UNITS:
        raise RecipeError(f"{budget.metric} {budget.text}: a device says nothing about quality. Leave it to validate.")
    unit, end = profile.compute_units[profile.runtimes[place.runtime].unit], place.end
    rate = unit.bandwidth_share.at(end) * profile.bandwidth.at(end)
    overhead = unit.overhead.at("high" if end == "low" else "value")
    cost = memory_cost(place.runtime)
    column = 2 if end == "low" else 1
    prompt = min(place.prompt_tokens, place.context)
    name, limit = budget.metric, budget.limit
    if name in ("tokens_per_second", "tokens_per_second_sustained"):
        of_burst = unit.sustained.at(end) if name.endswith("sustained") else 1.0
        cached = place.context if place.static_shapes else prompt
        yield from _reading(name, of_burst / limit - overhead, unit, rate, place, cached)
    elif name == "time_to_first_token_seconds":
        each = 2 * prompt / unit.effective_compute.at(end)
        yield Limit(linear_weights=each, table_weights=each, other_weights=each, attention_width=each * prompt,
                    depth=_layer_overhead(unit, end), metric=name, bound=limit - overhead)  # fmt: skip
        yield from _reading(name, limit - overhead, unit, rate, place, 0)
    elif name == "peak_memory_bytes":
        copies = cost.logit_copies[column] + place.products(place.table_format) - 1
        logits = 4 * prompt * place.vocabulary * copies
        for loading, rest in ((False, logits), (True, 0)):
            yield Limit(**place.resident(column, loading=loading), kv=place.context * cost.cache_copies[column],
                        metric=name, bound=limit - rest - cost.fixed_bytes[column])  # fmt: skip
    elif name == "load_seconds":
        if profile.storage is None:
            raise RecipeError(f"{profile.title}: the profile has no storage, which load_seconds is estimated from.")
        grown = WIDENING_SECONDS[column]  # per byte widened = loaded - stored
        held = {name: copies / rate + grown for name, copies in place.resident(column, loading=True).items()}
        yield Limit(stored=1 / profile.storage.at(end) - grown, **held, metric=name,
                    bound=limit - LOAD_SECONDS[column])  # fmt: skip
    else:
        yield Limit(stored=1, metric=name, bound=limit)


def _layer_overhead(unit: ComputeUnit, end: End) -> float:
    return 0.0 if unit.layer_overhead is None else unit.layer_overhead.at("high" if end == "low" else "value")


def _reading(name: str, seconds: float, unit: ComputeUnit, rate: float, place: Place, cached: int) -> Iterator[Limit]:
    """Yield a line for each side of the maxima: weights read or unpacked, the KV cache read or attended to."""
    unpacks = place.packed and unit.decode_compute is not None
    each = 2 / unit.decode_compute.at(place.end) if unit.decode_compute is not None else 0.0
    attends = 4 * cached / unit.attention_compute.at(place.end) if unit.attention_compute is not None else 0.0
    sides = (False, True)
    for linears, table, attention in product(*(sides if both else sides[:1] for both in (unpacks, unpacks, attends))):
        yield Limit(
            linear_bytes=0.0 if linears else 1 / rate,
            linear_weights=each * place.products(place.linear_format) if linears else 0.0,
            table_bytes=0.0 if table else 1 / rate,
            table_weights=each * place.products(place.table_format) if table else 0.0,
            other_bytes=1 / rate,
            kv=0.0 if attention else cached / rate,
            attention_width=attends if attention else 0.0,
            depth=_layer_overhead(unit, place.end), metric=name, bound=seconds,
        )  # fmt: skip
