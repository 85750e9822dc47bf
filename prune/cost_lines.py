"""What a shape costs under every budget, as lines over layers and FFN: the arithmetic inside `fit`. Torch-free.

For one width, number of KV groups and way to store, each line of `devices.headroom` is

    a + layers x (b + FFN x c)  <=  bound

with a from the embedding and the head, b and c from one layer at two sizes of the FFN. So the largest FFN within all
budgets is the least of a few quotients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dwindle.devices.headroom import Cost, Limit
from dwindle.prune.shape import Shape
from dwindle.prune.stored_size import Storage, layer_bits

__all__ = ["CostLines", "Pricing"]


@dataclass(frozen=True)
class Pricing:
    """What is the same for all shapes of a search that are stored alike."""

    limits: tuple[Limit, ...]
    storage: Storage
    full: Shape
    """What is cut: the model, its vocabulary already at the size that was asked for."""
    original: Shape
    """The model as it is."""
    multiple: int
    """Multiple of FFN and width; one of 32, so that all tables grow in proportion to the FFN."""
    kv_number_bytes: int
    reads_float32: bool
    """The runtime holds floats as float32."""
    tied: bool
    """Whether the limits are those of a model whose embedding is the head, too."""
    least_bytes: int = 0
    """The limits hold for models of more bytes than this."""


@dataclass(frozen=True)
class CostLines:
    """What a width with so many groups costs under each limit."""

    lines: tuple[tuple[float, float, float, float], ...]
    """(bound less a, b, c, cost of a layer at the FFN this was made for) of every limit."""
    fixed_parameters: int
    parameters_per_unit: int

    @classmethod
    def of(cls, shape: Shape, pricing: Pricing) -> CostLines:
        """Return the lines through a one-layer shape and the next larger FFN."""
        step = pricing.multiple
        larger = replace(shape, ffn_width=shape.ffn_width + step)
        here, there, ends = _layer_cost(shape, pricing), _layer_cost(larger, pricing), _end_cost(shape, pricing)
        lines = []
        for limit in pricing.limits:
            at = limit.of(here)
            slope = (limit.of(there) - at) / step
            lines.append((limit.bound - limit.of(ends), at - slope * shape.ffn_width, slope, at))
        per_unit = (larger.layer_parameters - shape.layer_parameters) // step
        fixed = shape.layer_parameters - per_unit * shape.ffn_width
        if shape.tied != pricing.full.tied:  # `turning_refusal`: a head of its own may not cost more than the cut saves
            left = pricing.original.parameters - (2 * pricing.original.vocab + 1) * shape.width
            lines.append((left, fixed, per_unit, shape.layer_parameters))
        return cls(tuple(lines), fixed, per_unit)

    def holds(self, layers: int) -> bool:
        """Return whether so many layers of the FFN this was made for meet all limits."""
        return all(layers * at <= room for room, _, _, at in self.lines)

    def largest_ffn(self, layers: int, multiple: int, full: int) -> int:
        """Return the largest multiple below the full FFN that meets all limits, or 0."""
        most = float(full - 1)
        for room, fixed, slope, _ in self.lines:
            left = room / layers - fixed
            if left < slope * multiple:
                return 0
            if slope * most > left:
                most = left / slope
        return int(most) // multiple * multiple

    def parameters(self, ffn: int) -> int:
        """Return the parameters of a layer."""
        return self.fixed_parameters + self.parameters_per_unit * ffn


def _layer_cost(shape: Shape, pricing: Pricing) -> Cost:
    storage = pricing.storage
    linear_bits, other_bits = layer_bits(shape, storage)
    others = other_bits // storage.float_bits
    weights = shape.layer_parameters - others
    stored = (linear_bits + other_bits) / 8
    linear, other = linear_bits / 8, other_bits / 8
    if pricing.reads_float32:
        linear, other = (4.0 * weights if storage.scheme == "float" else linear), 4.0 * others
    return Cost(
        stored=stored, linear_bytes=linear, linear_weights=weights,
        other_bytes=other, other_weights=others, kv=2 * shape.kv_heads * shape.head_dim * pricing.kv_number_bytes,
        attention_width=shape.heads * shape.head_dim, depth=1,
    )  # fmt: skip


def _end_cost(shape: Shape, pricing: Pricing) -> Cost:
    """Return the cost of embedding, head and last norm."""
    storage, weights = pricing.storage, shape.vocab * shape.width
    table, norm = storage.table_bits(shape.vocab, shape.width) / 8, shape.width * storage.float_bits / 8
    count = 1 if shape.tied else 2
    stored = count * table + norm
    if pricing.reads_float32:
        table, norm = (4.0 * weights if storage.scheme == "float" else table), 4.0 * shape.width
    return Cost(
        stored=stored, table_bytes=table, table_weights=weights, looked_up_bytes=(count - 1) * table,
        other_bytes=norm, other_weights=shape.width,
    )  # fmt: skip
