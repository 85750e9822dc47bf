"""The ONNX form of a decoder with KV cache: float, or with our integer codes in block-quantized operators.

Inputs and outputs bear the names that optimum, transformers.js and ONNX Runtime GenAI expect (B batch, T new tokens,
P past, K KV heads, D head_dim):

    input_ids [B, T]   attention_mask [B, P+T]   position_ids [B, T]   past_key_values.{i}.key / .value [B, K, P, D]
    logits [B, T, V]   present.{i}.key / .value [B, K, P+T, D]

Batch, T and P are dynamic. A key is seen if attention_mask allows it, it is not later in the row, and it lies within
the layer's window; masked scores get -1e9 and not -inf, so that the rows of left padding, which see nothing, stay
finite. Keys are cached after rotation. Cosines are computed from position_ids, so no table limits the context.

All arithmetic is float32. Float weights are stored in the checkpoint's own type, quantized ones as their codes (see
`onnx_quantized`): what was measured is what the graph computes, up to the order of float32 sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from onnx import TensorProto
from torch import Tensor

from dwindle.anatomy import Part
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError, offenders
from dwindle.export.onnx_builder import Dims, GraphBuilder
from dwindle.export.onnx_quantized import BLOCKS, block_size, gather, matmul
from dwindle.export.options import Activations, ExportOptions
from dwindle.quantized_model import QuantizedEmbedding, QuantizedLinear, TiedHead
from dwindle.rope import Rope
from dwindle.weights import AffineWeight

__all__ = ["MODEL_FILE", "DecoderGraph", "export_onnx", "onnx_problems"]

MODEL_FILE = "model.onnx"
_MASKED = -1e9
_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64


def onnx_problems(bundle: ModelBundle) -> list[str]:
    """Return one line per thing in this bundle that ONNX Runtime cannot carry; empty is good."""
    palettes, groups = [], []
    for name, module in bundle.model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            spec = module.spec
            if spec["kind"] != AffineWeight.kind:
                palettes.append(name)
            elif block_size(spec["shape"][1], spec["group_size"], spec["bits"]) is None:
                groups.append(f"{name} ({spec['group_size']})")
    problems = []
    if palettes:
        problems.append(f"onnx: {len(palettes)} weights are palettes: {offenders(palettes, 6)}. ONNX Runtime runs "
                        "integers. Quantize a variant with scheme=integer for it, or export to coreml.")  # fmt: skip
    if groups:
        problems.append(f"onnx: {len(groups)} weights have a group_size that is neither their input width nor a "
                        f"multiple of {BLOCKS[-1]}: {offenders(groups, 6)}. Set group_size=32.")  # fmt: skip
    if bundle.anatomy.traits.activation not in _ACTIVATIONS:
        problems.append(f"onnx: activation {bundle.anatomy.traits.activation!r} has no graph; known: "
                        f"{', '.join(_ACTIVATIONS)}.")  # fmt: skip
    return problems


def export_onnx(bundle: ModelBundle, folder: Path, options: ExportOptions) -> Path:
    """Write `model.onnx` (and `model.onnx.data` for large weights) into an existing folder; return its path.

    Raises RecipeError if `onnx_problems` finds any.
    """
    problems = onnx_problems(bundle)
    if problems:
        raise RecipeError(" ".join(problems))
    external = bundle.size().bytes > options.external_data_above_bytes
    with GraphBuilder(folder / MODEL_FILE, external_data=external) as graph, torch.no_grad():
        DecoderGraph(bundle, graph, options.activations).author()
        context = options.resolved(bundle.anatomy).context_length
        graph.save({"dwindle.context_length": str(context), "dwindle.source_sha256": bundle.content_sha256})
    return folder / MODEL_FILE


def _silu(graph: GraphBuilder, x: str, name: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x, name=name), name=name)


_ACTIVATIONS: dict[str, Any] = {
    "silu": _silu,
    "gelu": lambda graph, x, name: graph.op("Gelu", x, name=name),
    "gelu_pytorch_tanh": lambda graph, x, name: graph.op("Gelu", x, name=name, approximate="tanh"),
    "relu": lambda graph, x, name: graph.op("Relu", x, name=name),
}


class DecoderGraph:
    """Authors one decoder's graph, layer by layer, with the names of the checkpoint."""

    def __init__(self, bundle: ModelBundle, graph: GraphBuilder, activations: Activations) -> None:
        self.bundle, self.graph, self.activations = bundle, graph, activations
        self.anatomy, self.traits = bundle.anatomy, bundle.anatomy.traits
        self._rotations: dict[int, tuple[str, str]] = {}
        self._masks: dict[int | None, str] = {}

    def author(self) -> None:
        """Write the whole graph onto the tape."""
        graph, anatomy = self.graph, self.anatomy
        ids = graph.input("input_ids", _INT, ["batch", "tokens"])
        self._attention_mask = graph.input("attention_mask", _INT, ["batch", "total"])
        self._positions = graph.input("position_ids", _INT, ["batch", "tokens"])
        cache: Dims = ["batch", anatomy.kv_heads, "past", anatomy.head_dim]
        self._past = [(graph.input(f"past_key_values.{i}.key", _FLOAT, cache),
                       graph.input(f"past_key_values.{i}.value", _FLOAT, cache))
                      for i in range(anatomy.layers)]  # fmt: skip
        self._ids = ids
        hidden = self._embed(ids)
        presents = []
        for layer in range(anatomy.layers):
            hidden, key, value = self._layer(hidden, layer)
            presents.append((key, value))
        logits = self._head(self._norm(hidden, anatomy.final_norm))
        graph.output(logits, "logits", _FLOAT, ["batch", "tokens", anatomy.vocab])
        grown: Dims = ["batch", anatomy.kv_heads, "total", anatomy.head_dim]
        for layer, (key, value) in enumerate(presents):
            graph.output(key, f"present.{layer}.key", _FLOAT, grown)
            graph.output(value, f"present.{layer}.value", _FLOAT, grown)

    def _layer(self, hidden: str, layer: int) -> tuple[str, str, str]:
        """Return (hidden, key cache, value cache) after one layer; the norms stand where the family has them."""
        path, layout = self.anatomy.layer_path(layer), self.traits.norm_layout
        before_ffn = "pre_feedforward_layernorm" if layout == "sandwich" else "post_attention_layernorm"
        pre, post = layout != "post", layout != "pre"
        inner = self._norm(hidden, f"{path}.input_layernorm") if pre else hidden
        attended, key, value = self._attention(inner, layer)
        attended = self._norm(attended, f"{path}.post_attention_layernorm") if post else attended
        hidden = self.graph.op("Add", hidden, attended, name=f"{path}.self_attn")
        inner = self._norm(hidden, f"{path}.{before_ffn}") if pre else hidden
        fed = self._feed_forward(inner, layer)
        fed = self._norm(fed, f"{path}.post_feedforward_layernorm") if post else fed
        return self.graph.op("Add", hidden, fed, name=f"{path}.mlp"), key, value

    def _attention(self, x: str, layer: int) -> tuple[str, str, str]:
        graph, anatomy, traits = self.graph, self.anatomy, self.traits
        name, parts = f"{anatomy.layer_path(layer)}.self_attn", anatomy.parts(layer)
        if anatomy.fused:
            widths = [count * anatomy.head_dim for count in (anatomy.heads, anatomy.kv_heads, anatomy.kv_heads)]
            query, key, value = graph.ops("Split", 3, self._linear(x, parts["qkv"]), graph.ints(*widths), name=name,
                                          axis=-1)  # fmt: skip
        else:
            query, key, value = (self._linear(x, parts[part]) for part in cast(tuple[Part, ...], ("q", "k", "v")))
        if traits.qk_norm != "none":
            query = self._qk_norm(query, f"{name}.q_norm", anatomy.heads)
            key = self._qk_norm(key, f"{name}.k_norm", anatomy.kv_heads)
        rope = traits.ropes[layer]
        if rope is not None:
            query = self._rotate(query, rope, anatomy.heads, name)
            key = self._rotate(key, rope, anatomy.kv_heads, name)
        attended, new_key, new_value = graph.ops(
            "Attention", 3, query, key, value, self._mask(traits.windows[layer]), *self._past[layer], name=name,
            q_num_heads=anatomy.heads, kv_num_heads=anatomy.kv_heads, scale=traits.attention_scale,
            softcap=traits.attention_softcap or 0.0,
        )  # fmt: skip
        return self._linear(attended, parts["o"]), new_key, new_value

    def _feed_forward(self, x: str, layer: int) -> str:
        graph, parts = self.graph, self.anatomy.parts(layer)
        name, width = f"{self.anatomy.layer_path(layer)}.mlp", self.anatomy.ffn_width[layer]
        if self.anatomy.fused:
            gate, up = graph.ops("Split", 2, self._linear(x, parts["gate_up"]), graph.ints(width, width), name=name,
                                 axis=-1)  # fmt: skip
        else:
            gate, up = self._linear(x, parts["gate"]), self._linear(x, parts["up"])
        activated = _ACTIVATIONS[self.traits.activation](graph, gate, name)
        return self._linear(graph.op("Mul", activated, up, name=name), parts["down"])

    def _embed(self, ids: str) -> str:
        graph, name = self.graph, self.anatomy.embedding
        module = self.bundle.model.get_submodule(name)
        if isinstance(module, QuantizedEmbedding):
            tied = isinstance(self.bundle.model.get_submodule(self.anatomy.head), TiedHead)
            rows = gather(graph, ids, name, _affine(module), self.activations, tied=tied)
        else:
            table, narrow = self._stored_table(name)
            rows = graph.op("Gather", table, ids, name=name)
            rows = graph.op("Cast", rows, name=name, to=_FLOAT) if narrow else rows
        scale = self.traits.embedding_scale
        return rows if scale == 1.0 else graph.op("Mul", rows, graph.scalar(scale), name=name)

    def _head(self, x: str) -> str:
        graph, anatomy = self.graph, self.anatomy
        module = self.bundle.model.get_submodule(anatomy.head)
        if isinstance(module, TiedHead):
            embedding = self.bundle.model.get_submodule(anatomy.embedding)
            logits = matmul(graph, x, anatomy.embedding, _affine(embedding), self.activations)
        elif anatomy.tied:
            table, narrow = self._stored_table(anatomy.embedding)
            table = graph.op("Cast", table, name=anatomy.head, to=_FLOAT) if narrow else table
            logits = graph.op("MatMul", x, graph.op("Transpose", table, name=anatomy.head, perm=[1, 0]),
                              name=anatomy.head)  # fmt: skip
        else:
            logits = self._linear(x, anatomy.head)
        cap = self.traits.logit_softcap
        if cap is None:
            return logits
        bounded = graph.op("Tanh", graph.op("Div", logits, graph.scalar(cap), name=anatomy.head), name=anatomy.head)
        return graph.op("Mul", bounded, graph.scalar(cap), name=anatomy.head)

    def _stored_table(self, name: str) -> tuple[str, bool]:
        """Return (name of a float table in its stored type, whether that needs a Cast to float32)."""
        table, storage = self._parameter(f"{name}.weight"), self.bundle.storage_dtype
        narrow = storage != torch.float32 and torch.equal(table.to(storage).to(torch.float32), table)
        return self.graph.weight(f"{name}.weight", lambda: table.to(storage) if narrow else table), narrow

    def _linear(self, x: str, name: str) -> str:
        graph, module = self.graph, self.bundle.model.get_submodule(name)
        given = getattr(module, "bias", None)
        bias = "" if given is None else graph.weight(f"{name}.bias", lambda: given)
        if isinstance(module, QuantizedLinear):
            return matmul(graph, x, name, _affine(module), self.activations, bias)
        weight = self._parameter(f"{name}.weight")
        y = graph.op("MatMul", x, graph.float_weight(f"{name}.weight", lambda: weight.T, self.bundle.storage_dtype),
                     name=name)  # fmt: skip
        return graph.op("Add", y, bias, name=name) if bias else y

    def _norm(self, x: str, name: str) -> str:
        weight = self.graph.weight(f"{name}.weight",
                                   lambda: self._parameter(f"{name}.weight") + self.traits.norm_offset)  # fmt: skip
        return self.graph.op("RMSNormalization", x, weight, name=name, axis=-1, epsilon=self.traits.norm_eps)

    def _qk_norm(self, x: str, name: str, heads: int) -> str:
        """Normalize [B, T, heads * D] per head, or as one vector."""
        if self.traits.qk_norm == "full":
            return self._norm(x, name)
        graph = self.graph
        split = graph.op("Reshape", x, graph.ints(0, 0, heads, self.anatomy.head_dim), name=name)
        return graph.op("Reshape", self._norm(split, name), graph.ints(0, 0, heads * self.anatomy.head_dim), name=name)

    def _rotate(self, x: str, rope: Rope, heads: int, name: str) -> str:
        cos, sin = self._rotation(rope)
        partial: dict[str, Any] = (
            {} if rope.rotary_dim == self.anatomy.head_dim else {"rotary_embedding_dim": rope.rotary_dim}
        )
        return self.graph.op("RotaryEmbedding", x, cos, sin, name=name, num_heads=heads, **partial)

    def _rotation(self, rope: Rope) -> tuple[str, str]:
        """Return the names of (cos, sin), each [B, T, R/2]; layers with one rope share them."""
        graph, ropes = self.graph, self.traits.ropes
        index = ropes.index(rope)
        if index not in self._rotations:
            name, (frequencies, factor) = f"rope.{index}", rope.frequencies()
            position = graph.op("Unsqueeze", graph.op("Cast", self._positions, name=name, to=_FLOAT), graph.ints(2),
                                name=name)  # fmt: skip
            angle = graph.op("Mul", position, graph.weight(f"{name}.frequencies", lambda: frequencies), name=name)
            turned = [graph.op(kind, angle, name=name) for kind in ("Cos", "Sin")]
            if factor != 1.0:
                turned = [graph.op("Mul", value, graph.scalar(factor), name=name) for value in turned]
            self._rotations[index] = (turned[0], turned[1])
        return self._rotations[index]

    def _mask(self, window: int | None) -> str:
        """Return the name of the additive mask [B, 1, T, P+T] of layers with this window."""
        if window not in self._masks:
            graph, name = self.graph, "mask" if window is None else f"mask.{window}"
            zero, one = graph.ints(0), graph.ints(1)
            past = graph.op("Shape", self._past[0][0], name=name, start=2, end=3)
            total = graph.op("Add", past, graph.op("Shape", self._ids, name=name, start=1, end=2), name=name)
            everything = graph.op("Range", self._zero_dim(zero), self._zero_dim(total), self._zero_dim(one), name=name)
            key = graph.op("Unsqueeze", everything, zero, name=name)
            query = graph.op("Unsqueeze", graph.op("Slice", everything, past, total, name=name), one, name=name)
            seen = graph.op("LessOrEqual", key, query, name=name)
            if window is not None:
                near = graph.op("Greater", key, graph.op("Sub", query, graph.ints(window), name=name), name=name)
                seen = graph.op("And", seen, near, name=name)
            allowed = graph.op("Greater", self._attention_mask, zero, name=name)
            allowed = graph.op("Unsqueeze", allowed, graph.ints(1, 2), name=name)
            seen = graph.op("And", allowed, seen, name=name)
            self._masks[window] = graph.op("Where", seen, graph.scalar(0.0), graph.scalar(_MASKED), name=name)
        return self._masks[window]

    def _zero_dim(self, vector: str) -> str:
        return self.graph.op("Squeeze", vector, name="mask")

    def _parameter(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return cast(Tensor, getattr(self.bundle.model.get_submodule(owner), leaf)).detach().to("cpu", torch.float32)


def _affine(module: Any) -> AffineWeight:
    return cast(AffineWeight, module.quantized_weight())
