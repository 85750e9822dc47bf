"""Attention in an exported graph, in two forms that give the same numbers.

`FusedAttention` is ONNX Runtime's `GroupQueryAttention` (com.microsoft): rotation, cache, causal mask, window and soft
cap in one kernel that needs no mask tensor, and that writes new keys into the caller's own buffer where past and
present share one (ONNX Runtime GenAI's `past_present_share_buffer`). A row's keys lie at the slots 0, 1, 2 ... of its
cache, so left padding is taken out first: the tokens of each row move left by their padding, the kernel gets each row's
true length, and the rows move back before the head. A padded batch thus has exactly the positions and the numbers of
its single rows, and its inputs need no position_ids. The kernel's own limits:

- head_dim must be a multiple of 8, and of 16 to be rotated inside; else rotation is an operator of its own;
- several new tokens after a past need a batch of one;
- a float16 cache wants queries in float16 as well (they are rotated in float32 first); an int8 cache does not;
- old runtimes lack things (`onnx_kv.minimum_runtime`).

`StandardAttention` is `Attention` and `RotaryEmbedding` of opset 23, from the standard domain: an additive mask
[B, 1, T, P+T], positions as an input, a cache that grows. A key is seen if attention_mask allows it, it is not later in
the row, and it lies within the layer's window; masked scores get -1e9 and not -inf, so that the rows of left padding,
which see nothing, stay finite. It carries what the kernel does not take.

Keys are cached after rotation. Shapes: B batch, T new tokens, P past, K KV heads, D head_dim, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from onnx import TensorProto

from dwindle.anatomy import Anatomy
from dwindle.export.onnx_builder import MICROSOFT, Dims, GraphBuilder
from dwindle.export.onnx_kv import CACHE_TYPES, KVScales
from dwindle.export.options import ExportOptions
from dwindle.rope import Rope

__all__ = ["FusedAttention", "GraphAttention", "StandardAttention", "attention_for", "is_fused"]

_MASKED = -1e9
_FLOAT, _INT, _INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


class GraphAttention(Protocol):
    """What the rest of the graph asks of either form."""

    def begin(self) -> str:
        """Declare the inputs; return the ids [B, T] in the order the layers work in."""

    def takes_packed(self, layer: int) -> bool:
        """Return whether `attend` also takes queries, keys and values side by side in one tensor."""

    def attend(self, layer: int, projected: Sequence[str]) -> str:
        """Return [B, T, H * D] from [query, key, value], each [B, T, heads * D], or from the one packed tensor."""

    def end(self, hidden: str) -> str:
        """Return the hidden states [B, T, width] in the caller's order."""

    def outputs(self) -> None:
        """Declare the cache outputs."""


def is_fused(anatomy: Anatomy, options: ExportOptions) -> bool:
    """Return whether this model's graph uses GroupQueryAttention."""
    return options.operators == "fused" and anatomy.head_dim % 8 == 0


def attention_for(
    graph: GraphBuilder, anatomy: Anatomy, options: ExportOptions, scales: Mapping[int, KVScales]
) -> GraphAttention:
    """Return the form these options ask for; `options` are resolved, `scales` are those of an int8 cache by layer."""
    if is_fused(anatomy, options):
        return FusedAttention(graph, anatomy, options, scales)
    return StandardAttention(graph, anatomy, options)


class _Cache:
    """The cache inputs and outputs that both forms have."""

    def __init__(self, graph: GraphBuilder, anatomy: Anatomy, options: ExportOptions) -> None:
        self.graph, self.anatomy, self.traits = graph, anatomy, anatomy.traits
        self.kind, self.context = CACHE_TYPES[options.kv_cache], options.context_length or 0
        self.narrow = self.kind == TensorProto.FLOAT16
        self.present: dict[int, tuple[str, str]] = {}

    def _inputs(self, positions: bool) -> None:
        graph, anatomy = self.graph, self.anatomy
        self.ids = graph.input("input_ids", _INT, ["batch", "tokens"])
        self.mask = graph.input("attention_mask", _INT, ["batch", "total"])
        self.positions = graph.input("position_ids", _INT, ["batch", "tokens"]) if positions else ""
        shape: Dims = ["batch", anatomy.kv_heads, "past", anatomy.head_dim]
        self.past = [
            tuple(graph.input(f"past_key_values.{i}.{part}", self.kind, shape) for part in ("key", "value"))
            for i in range(anatomy.layers)
        ]

    def outputs(self) -> None:
        """Declare the cache outputs, in layer order."""
        shape: Dims = ["batch", self.anatomy.kv_heads, "present", self.anatomy.head_dim]
        for layer, (key, value) in sorted(self.present.items()):
            self.graph.output(key, f"present.{layer}.key", self.kind, shape)
            self.graph.output(value, f"present.{layer}.value", self.kind, shape)


class FusedAttention(_Cache):
    """GroupQueryAttention over rows without left padding."""

    def __init__(
        self, graph: GraphBuilder, anatomy: Anatomy, options: ExportOptions, scales: Mapping[int, KVScales]
    ) -> None:
        super().__init__(graph, anatomy, options)
        self._scales = scales
        self._tables: dict[int, tuple[str, str]] = {}
        self._row_positions = ""

    def begin(self) -> str:
        """Declare the inputs; return the ids with each row's left padding moved to its end."""
        self._inputs(positions=False)
        graph, name = self.graph, "rows"
        zero, one = graph.ints(0), graph.ints(1)
        tokens = graph.op("Shape", self.ids, name=name, start=1, end=2)
        total = graph.op("Shape", self.mask, name=name, start=1, end=2)
        self._total = graph.op("Cast", graph.op("Squeeze", total, name=name), name=name, to=_INT32)
        self._count = graph.op("ReduceSum", self.mask, one, name=name, keepdims=1)
        last = graph.op("Max", graph.op("Sub", self._count, one, name=name), zero, name=name)
        self._last = graph.op("Cast", graph.op("Squeeze", last, one, name=name), name=name, to=_INT32)
        self._new = graph.op("Slice", self.mask, graph.op("Sub", total, tokens, name=name), total, one, name=name)
        padding = graph.op("ArgMax", self._new, name=name, axis=1, keepdims=1)
        end = graph.op("Squeeze", tokens, name=name)
        self._slots = graph.op("Range", graph.integer(0), end, graph.integer(1), name=name)
        moved = graph.op("Add", self._slots, padding, name=name)
        moved = graph.op("Min", moved, graph.op("Sub", tokens, one, name=name), name=name)
        back = graph.op("Max", graph.op("Sub", self._slots, padding, name=name), zero, name=name)
        self._back = graph.op("Unsqueeze", back, graph.ints(2), name=name)
        return graph.op("GatherElements", self.ids, moved, name=name, axis=1)

    def end(self, hidden: str) -> str:
        """Move the rows back; a padded position gets its row's first token, so that it stays a number."""
        return self.graph.op("GatherND", hidden, self._back, name="rows", batch_dims=1)

    def attend(self, layer: int, projected: Sequence[str]) -> str:
        """Return the attended values of one layer."""
        anatomy, traits, name = self.anatomy, self.traits, f"{self.anatomy.layer_path(layer)}.self_attn"
        rope, inside = traits.ropes[layer], self._rotates_inside(layer)
        query, key, value = projected if len(projected) == 3 else (projected[0], "", "")
        if rope is not None and not inside:
            query, key = (self._rotated(x, rope, heads, name)
                          for x, heads in ((query, anatomy.heads), (key, anatomy.kv_heads)))  # fmt: skip
        if self.narrow:
            query, key, value = (self.graph.op("Cast", x, name=name, to=self.kind) for x in (query, key, value))
        cos, sin = self._table(rope) if rope is not None and inside else ("", "")
        inputs = [query, key, value, *self.past[layer], self._last, self._total, cos, sin]
        attributes: dict[str, Any] = {
            "num_heads": anatomy.heads, "kv_num_heads": anatomy.kv_heads, "scale": traits.attention_scale,
            "do_rotary": int(bool(cos)), "local_window_size": traits.windows[layer] or -1,
            "softcap": traits.attention_softcap or 0.0,
        }  # fmt: skip
        if layer in self._scales:
            names = [self.graph.weight(f"{name}.{part}_scale", lambda scale=scale: scale)  # type: ignore[misc]
                     for part, scale in zip("kv", self._scales[layer], strict=True)]  # fmt: skip
            inputs += ["", "", "", *names]
            attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        while not inputs[-1]:
            inputs.pop()
        attended, *present = self.graph.ops("GroupQueryAttention", 3, *inputs, name=name, domain=MICROSOFT,
                                            **attributes)  # fmt: skip
        self.present[layer] = (present[0], present[1])
        return self.graph.op("Cast", attended, name=name, to=_FLOAT) if self.narrow else attended

    def takes_packed(self, layer: int) -> bool:
        """Return whether one layer may hand over queries, keys and values in one tensor."""
        return not self.narrow and (self.traits.ropes[layer] is None or self._rotates_inside(layer))

    def _rotates_inside(self, layer: int) -> bool:
        rope = self.traits.ropes[layer]
        wide = rope is not None and self.anatomy.head_dim % 16 == 0 and rope.rotary_dim % 16 == 0
        return wide and not self.narrow

    def _rotated(self, x: str, rope: Rope, heads: int, name: str) -> str:
        partial = _partial(rope, self.anatomy)
        if not self._row_positions:
            new = self.graph.op("ReduceSum", self._new, self.graph.ints(1), name="rows", keepdims=1)
            past = self.graph.op("Sub", self._count, new, name="rows")
            self._row_positions = self.graph.op("Add", past, self._slots, name="rows")
        return self.graph.op("RotaryEmbedding", x, *self._table(rope), self._row_positions, name=name,
                             num_heads=heads, **partial)  # fmt: skip

    def _table(self, rope: Rope) -> tuple[str, str]:
        """Return the names of (cos, sin) [context, R/2], computed when a session is made: no bytes in the file."""
        graph, index = self.graph, self.traits.ropes.index(rope)
        if index not in self._tables:
            name, (frequencies, factor) = f"rope.{index}", rope.frequencies()
            slots = graph.op(
                "Range", graph.scalar(0.0), graph.scalar(float(self.context)), graph.scalar(1.0), name=name
            )
            self._tables[index] = _cos_sin(graph, graph.op("Unsqueeze", slots, graph.ints(1), name=name), frequencies,
                                           factor, name)  # fmt: skip
        return self._tables[index]


class StandardAttention(_Cache):
    """Attention and RotaryEmbedding of the standard domain."""

    def __init__(self, graph: GraphBuilder, anatomy: Anatomy, options: ExportOptions) -> None:
        super().__init__(graph, anatomy, options)
        self._rotations: dict[int, tuple[str, str]] = {}
        self._masks: dict[int | None, str] = {}

    def begin(self) -> str:
        """Declare the inputs; return the ids as they come."""
        self._inputs(positions=True)
        return self.ids

    def end(self, hidden: str) -> str:
        """Return the hidden states as they are."""
        return hidden

    def takes_packed(self, layer: int) -> bool:
        """Return False: the operator takes three tensors."""
        return False

    def attend(self, layer: int, projected: Sequence[str]) -> str:
        """Return the attended values of one layer."""
        graph, anatomy, traits = self.graph, self.anatomy, self.traits
        name, rope = f"{anatomy.layer_path(layer)}.self_attn", traits.ropes[layer]
        query, key, value = projected
        if rope is not None:
            query = self._rotated(query, rope, anatomy.heads, name)
            key = self._rotated(key, rope, anatomy.kv_heads, name)
        past = self.past[layer]
        if self.narrow:
            past = tuple(graph.op("Cast", x, name=name, to=_FLOAT) for x in past)
            # What is seen now is what later steps will see.
            key, value = (graph.op("Cast", graph.op("Cast", x, name=name, to=self.kind), name=name, to=_FLOAT)
                          for x in (key, value))  # fmt: skip
        attended, *present = graph.ops(
            "Attention", 3, query, key, value, self._mask(traits.windows[layer]), *past, name=name,
            q_num_heads=anatomy.heads, kv_num_heads=anatomy.kv_heads, scale=traits.attention_scale,
            softcap=traits.attention_softcap or 0.0,
        )  # fmt: skip
        if self.narrow:
            present = [graph.op("Cast", x, name=name, to=self.kind) for x in present]
        self.present[layer] = (present[0], present[1])
        return attended

    def _rotated(self, x: str, rope: Rope, heads: int, name: str) -> str:
        partial = _partial(rope, self.anatomy)
        return self.graph.op("RotaryEmbedding", x, *self._rotation(rope), name=name, num_heads=heads, **partial)

    def _rotation(self, rope: Rope) -> tuple[str, str]:
        """Return the names of (cos, sin), each [B, T, R/2]; layers with one rope share them."""
        graph, index = self.graph, self.traits.ropes.index(rope)
        if index not in self._rotations:
            name, (frequencies, factor) = f"rope.{index}", rope.frequencies()
            position = graph.op("Cast", self.positions, name=name, to=_FLOAT)
            self._rotations[index] = _cos_sin(graph, graph.op("Unsqueeze", position, graph.ints(2), name=name),
                                              frequencies, factor, name)  # fmt: skip
        return self._rotations[index]

    def _mask(self, window: int | None) -> str:
        """Return the name of the additive mask [B, 1, T, P+T] of layers with this window."""
        if window not in self._masks:
            graph, name = self.graph, "mask" if window is None else f"mask.{window}"
            zero, one = graph.ints(0), graph.ints(1)
            total = graph.op("Shape", self.mask, name=name, start=1, end=2)
            past = graph.op("Sub", total, graph.op("Shape", self.ids, name=name, start=1, end=2), name=name)
            end = graph.op("Squeeze", total, name=name)
            everything = graph.op("Range", graph.integer(0), end, graph.integer(1), name=name)
            key = graph.op("Unsqueeze", everything, zero, name=name)
            query = graph.op("Unsqueeze", graph.op("Slice", everything, past, total, name=name), one, name=name)
            seen = graph.op("LessOrEqual", key, query, name=name)
            if window is not None:
                near = graph.op("Greater", key, graph.op("Sub", query, graph.ints(window), name=name), name=name)
                seen = graph.op("And", seen, near, name=name)
            allowed = graph.op(
                "Unsqueeze", graph.op("Greater", self.mask, zero, name=name), graph.ints(1, 2), name=name
            )
            seen = graph.op("And", allowed, seen, name=name)
            self._masks[window] = graph.op("Where", seen, graph.scalar(0.0), graph.scalar(_MASKED), name=name)
        return self._masks[window]


def _partial(rope: Rope, anatomy: Anatomy) -> dict[str, Any]:
    """Return the attribute of a rotation that leaves some dimensions alone."""
    return {} if rope.rotary_dim == anatomy.head_dim else {"rotary_embedding_dim": rope.rotary_dim}


def _cos_sin(
    graph: GraphBuilder, position: str, frequencies: torch.Tensor, factor: float, name: str
) -> tuple[str, str]:
    """Return the names of cos and sin of `position` [..., 1] times the frequencies [R/2]."""
    angle = graph.op("Mul", position, graph.weight(f"{name}.frequencies", lambda: frequencies), name=name)
    turned = [graph.op(kind, angle, name=name) for kind in ("Cos", "Sin")]
    if factor != 1.0:
        turned = [graph.op("Mul", value, graph.scalar(factor), name=name) for value in turned]
    return turned[0], turned[1]
