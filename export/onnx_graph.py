"""The ONNX form of a decoder with KV cache: float, or with our integer codes in block-quantized operators.

Inputs and outputs bear the names that optimum, transformers.js and ONNX Runtime GenAI expect (B batch, T new tokens,
P past, K KV heads, D head_dim):

    input_ids [B, T]   attention_mask [B, P+T]   past_key_values.{i}.key / .value [B, K, P, D]
    logits [B, T, V]   present.{i}.key / .value [B, K, P+T, D]

Batch, T and P are dynamic. `operators="plain"` adds the input position_ids [B, T]; the fused form counts positions from
attention_mask, and takes a past that is longer than what is used of it, so that past and present may be one buffer (see
`onnx_attention`).

All arithmetic is float32 (keys and values between steps in `kv_cache`'s type, products of codes in `activations`'):
what was measured is what the graph computes, up to the order of float32 sums.

The fused form adds a residual and takes the norm that follows in one operator, SkipSimplifiedLayerNormalization; SiLU
is QuickGelu with alpha = 1, x sigmoid(x). Norms stand where the family has them: before attention and MLP, after, or
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from onnx import TensorProto

from dwindle.anatomy import Part
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError, offenders
from dwindle.export.onnx_adapters import AdapterProducts
from dwindle.export.onnx_attention import attention_for, is_fused
from dwindle.export.onnx_builder import MICROSOFT, GraphBuilder
from dwindle.export.onnx_kv import KVScales, kv_scales, minimum_runtime
from dwindle.export.onnx_linears import Linears, parameter
from dwindle.export.onnx_quantized import BLOCKS, block_size
from dwindle.export.options import ExportOptions
from dwindle.export.parity import parity_prompts
from dwindle.quantized_model import QuantizedEmbedding, QuantizedLinear
from dwindle.weights import AffineWeight

__all__ = ["MODEL_FILE", "DecoderGraph", "export_onnx", "onnx_problems"]

MODEL_FILE = "model.onnx"
_FLOAT = TensorProto.FLOAT
_CALIBRATION_TOKENS = 256
"""Longest texts whose keys and values set the scales of an int8 cache."""


def onnx_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    """Return one line per thing in this bundle that ONNX Runtime cannot carry as asked; empty is good."""
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
    if options.kv_cache == "int8" and not is_fused(bundle.anatomy, options):
        problems.append(f"onnx: kv_cache=int8 needs operators=fused (found {options.operators}) and a head_dim that is "
                        f"a multiple of 8 (found {bundle.anatomy.head_dim}). Set kv_cache=float16.")  # fmt: skip
    return problems


def export_onnx(bundle: ModelBundle, folder: Path, options: ExportOptions) -> dict[str, dict[str, Any]]:
    """Write `model.onnx` (and `model.onnx.data` for large weights) into an existing folder.

    Returns the products with inputs for adapters (`AdapterProducts.products`).

    Raises RecipeError if `onnx_problems` finds any.
    """
    problems = onnx_problems(bundle, options)
    if problems:
        raise RecipeError(" ".join(problems))
    options = options.resolved(bundle.anatomy)
    scales = kv_scales(bundle, _calibration_texts(bundle, options)) if options.kv_cache == "int8" else {}
    external = bundle.size().bytes > options.external_data_above_bytes
    with GraphBuilder(folder / MODEL_FILE, external_data=external) as graph, torch.no_grad():
        authored = DecoderGraph(bundle, graph, options, scales)
        authored.author()
        graph.save({
            "dwindle.context_length": str(options.context_length),
            "dwindle.source_sha256": bundle.content_sha256,
            "dwindle.operators": "fused" if is_fused(bundle.anatomy, options) else "plain",
            "dwindle.kv_cache": options.kv_cache,
            "dwindle.activations": options.activations,
            "dwindle.adapter_inputs": options.adapter_inputs,
            "dwindle.minimum_runtime": minimum_runtime(options),
        })  # fmt: skip
    return authored.adapters.products


def _calibration_texts(bundle: ModelBundle, options: ExportOptions) -> list[torch.Tensor]:
    """Return a text, and tokens drawn from the whole vocabulary: rare ones have keys of their own."""
    length = min(_CALIBRATION_TOKENS, options.context_length or _CALIBRATION_TOKENS)
    drawn = torch.randint(0, bundle.anatomy.vocab, (2, length), generator=torch.Generator().manual_seed(0))
    return [*parity_prompts(bundle, 1, length), drawn]


def _silu(graph: GraphBuilder, x: str, name: str, fused: bool) -> str:
    if fused:
        return graph.op("QuickGelu", x, name=name, domain=MICROSOFT, alpha=1.0)
    return graph.op("Mul", x, graph.op("Sigmoid", x, name=name), name=name)


_ACTIVATIONS: dict[str, Any] = {
    "silu": _silu,
    "gelu": lambda graph, x, name, fused: graph.op("Gelu", x, name=name),
    "gelu_pytorch_tanh": lambda graph, x, name, fused: graph.op("Gelu", x, name=name, approximate="tanh"),
    "relu": lambda graph, x, name, fused: graph.op("Relu", x, name=name),
}


class DecoderGraph:
    """Authors one decoder's graph, layer by layer, with the names of the checkpoint."""

    def __init__(
        self, bundle: ModelBundle, graph: GraphBuilder, options: ExportOptions, scales: Mapping[int, KVScales]
    ) -> None:
        self.bundle, self.graph = bundle, graph
        self.anatomy, self.traits = bundle.anatomy, bundle.anatomy.traits
        self.fused = is_fused(self.anatomy, options)
        self.attention = attention_for(graph, self.anatomy, options, scales)
        self.adapters = AdapterProducts(graph, options.adapter_inputs, self.anatomy.linear_names())
        self.linears = Linears(bundle, graph, options.activations, self.adapters)

    def author(self) -> None:
        """Write the whole graph onto the tape."""
        graph, anatomy = self.graph, self.anatomy
        ids = self.attention.begin()
        hidden = self.linears.embedding(ids)
        if self.traits.embedding_scale != 1.0:
            hidden = graph.op("Mul", hidden, graph.scalar(self.traits.embedding_scale), name=anatomy.embedding)
        update = ""
        for layer in range(anatomy.layers):
            hidden, update = self._layer(hidden, update, layer)
        hidden = self._added(hidden, update, anatomy.final_norm, f"{anatomy.layer_path(anatomy.layers - 1)}.mlp")[1]
        logits = self.linears.head(self.attention.end(hidden))
        cap, name = self.traits.logit_softcap, anatomy.head
        if cap is not None:
            bounded = graph.op("Tanh", graph.op("Div", logits, graph.scalar(cap), name=name), name=name)
            logits = graph.op("Mul", bounded, graph.scalar(cap), name=name)
        graph.output(logits, "logits", _FLOAT, ["batch", "tokens", anatomy.vocab])
        self.attention.outputs()

    def _layer(self, hidden: str, update: str, layer: int) -> tuple[str, str]:
        """Return (hidden states, what its MLP adds to them); `update` is what the layer before adds to `hidden`."""
        path, layout = self.anatomy.layer_path(layer), self.traits.norm_layout
        before_ffn = "pre_feedforward_layernorm" if layout == "sandwich" else "post_attention_layernorm"
        pre, post = layout != "post", layout != "pre"
        label = f"{self.anatomy.layer_path(layer - 1)}.mlp"
        hidden, inner = self._added(hidden, update, f"{path}.input_layernorm" if pre else "", label)
        attended = self._attention(inner, layer)
        attended = self._norm(attended, f"{path}.post_attention_layernorm") if post else attended
        hidden, inner = self._added(hidden, attended, f"{path}.{before_ffn}" if pre else "", f"{path}.self_attn")
        fed = self._feed_forward(inner, layer)
        return hidden, self._norm(fed, f"{path}.post_feedforward_layernorm") if post else fed

    def _added(self, hidden: str, update: str, norm: str, label: str) -> tuple[str, str]:
        """Return (hidden + update, its norm); no update: hidden alone; no norm: the sum twice."""
        if update and norm and self.fused:
            normed, _, _, total = self.graph.ops(
                "SkipSimplifiedLayerNormalization", 4, hidden, update, self._norm_weight(norm), name=norm,
                domain=MICROSOFT, unused=(1, 2), epsilon=self.traits.norm_eps,
            )  # fmt: skip
            return total, normed
        total = self.graph.op("Add", hidden, update, name=label) if update else hidden
        return total, self._norm(total, norm) if norm else total

    def _attention(self, x: str, layer: int) -> str:
        anatomy, linears, parts = self.anatomy, self.linears, self.anatomy.parts(layer)
        name = f"{anatomy.layer_path(layer)}.self_attn"
        widths = [heads * anatomy.head_dim for heads in (anatomy.heads, anatomy.kv_heads, anatomy.kv_heads)]
        names = [parts["qkv"]] if anatomy.fused else [parts[part] for part in cast(tuple[Part, ...], ("q", "k", "v"))]
        takes_packed = self.attention.takes_packed(layer) and self.traits.qk_norm == "none"
        if takes_packed and linears.alike(names):
            projected = [linears.packed(x, names, names[0] if anatomy.fused else f"{name}.qkv_proj")]
        elif anatomy.fused:
            projected = linears.split(linears.product(x, names[0]), widths, name)
        else:
            projected = linears.products(x, names, f"{name}.qkv_proj")
        if self.traits.qk_norm != "none":
            projected[0] = self._qk_norm(projected[0], f"{name}.q_norm", anatomy.heads)
            projected[1] = self._qk_norm(projected[1], f"{name}.k_norm", anatomy.kv_heads)
        return linears.product(self.attention.attend(layer, projected), parts["o"])

    def _feed_forward(self, x: str, layer: int) -> str:
        graph, parts = self.graph, self.anatomy.parts(layer)
        name, width = f"{self.anatomy.layer_path(layer)}.mlp", self.anatomy.ffn_width[layer]
        if self.anatomy.fused:
            gate, up = self.linears.split(self.linears.product(x, parts["gate_up"]), [width, width], name)
        else:
            gate, up = self.linears.products(x, [parts["gate"], parts["up"]], f"{name}.gate_up_proj")
        activated = _ACTIVATIONS[self.traits.activation](graph, gate, name, self.fused)
        return self.linears.product(graph.op("Mul", activated, up, name=name), parts["down"])

    def _norm(self, x: str, name: str) -> str:
        weight = self._norm_weight(name)
        return self.graph.op("RMSNormalization", x, weight, name=name, axis=-1, epsilon=self.traits.norm_eps)

    def _norm_weight(self, name: str) -> str:
        full = f"{name}.weight"
        return self.graph.weight(full, lambda: parameter(self.bundle, full) + self.traits.norm_offset)

    def _qk_norm(self, x: str, name: str, heads: int) -> str:
        """Normalize [B, T, heads * D] per head, or as one vector."""
        if self.traits.qk_norm == "full":
            return self._norm(x, name)
        graph = self.graph
        split = graph.op("Reshape", x, graph.ints(0, 0, heads, self.anatomy.head_dim), name=name)
        return graph.op("Reshape", self._norm(split, name), graph.ints(0, 0, heads * self.anatomy.head_dim), name=name)
