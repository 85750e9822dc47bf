"""The one decoder that all runtimes are exported from.

Stock modelling code does not convert: its masks are built by data-dependent Python, its caches are classes. This is the
same arithmetic in a few small modules, with nothing but tensors going in and out and no decision that depends on their
values, so that `torch.jit.trace`, `torch.export` and `torch.onnx.export(dynamo=True)` all take it. Parameters bear the
stock model's names and load strictly; a test holds the logits of every family to transformers' within 1e-5.

The maths does not know where the cache lives: attention hands new keys and values to a `Cache` (`kv_cache.py`) and gets
all of them back. Positions and masks come from the caller too. `attention_bias` is added to the scores: 0 where a
token may look, `MASKED` where it may not; `causal_bias` makes one. Sliding windows are narrowed inside, from the slots'
distance, because only the decoder knows which layers have them.

Shapes: B batch, T new tokens, P past, S = P + T, V vocabulary, D head_dim, H heads, K KV heads, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.export.kv_cache import MASKED, Cache, ConcatenatedCache, causal_bias
from dwindle.export.rotary import Rotary, rotated

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy, Traits
    from dwindle.bundle import ModelBundle
    from dwindle.weights import AffineWeight, PalettizedWeight

__all__ = ["MASKED", "Attention", "Decoder", "RMSNorm", "causal_bias"]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), over the last dimension."""

    def __init__(self, width: int, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized x."""
        weight = self.weight + self.offset if self.offset else self.weight
        return weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        super().__init__()
        traits = anatomy.traits
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, anatomy.heads, anatomy.kv_heads, anatomy.head_dim
        self.fused, self.scale, self.softcap = anatomy.fused, traits.attention_scale, traits.attention_softcap
        self.full_norm = traits.qk_norm == "full"
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = (queries, keys, keys)
        if self.fused:
            self.qkv_proj = nn.Linear(anatomy.width, sum(self.widths), bias=traits.qkv_bias)
        else:
            self.q_proj = nn.Linear(anatomy.width, queries, bias=traits.qkv_bias)
            self.k_proj = nn.Linear(anatomy.width, keys, bias=traits.qkv_bias)
            self.v_proj = nn.Linear(anatomy.width, keys, bias=traits.qkv_bias)
        self.o_proj = nn.Linear(queries, anatomy.width, bias=traits.output_bias)
        if traits.qk_norm != "none":
            widths = (queries, keys) if self.full_norm else (self.head_dim, self.head_dim)
            self.q_norm = RMSNorm(widths[0], traits.norm_eps, traits.norm_offset)
            self.k_norm = RMSNorm(widths[1], traits.norm_eps, traits.norm_offset)
        self.head_norm = traits.qk_norm == "head"

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [B, H, T, D], k and v [B, K, T, D], normalized, not yet turned."""
        batch, tokens, _ = x.shape
        if self.fused:
            query, key, value = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.full_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = query.reshape(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        key = key.reshape(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        value = value.reshape(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.head_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T * scale + bias) v, [B, H, T, D].

        The H / K queries of a group stand as more rows of their KV head, so keys and values are never repeated.
        """
        batch, _, tokens, _ = query.shape
        grouped = query.reshape(batch, self.kv_heads, -1, self.head_dim)
        scores = torch.matmul(grouped, key.transpose(2, 3)).reshape(batch, self.heads, tokens, -1) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        shares = (scores + bias).softmax(dim=-1)
        mixed = torch.matmul(shares.reshape(batch, self.kv_heads, -1, key.shape[2]), value)
        return mixed.reshape(batch, self.heads, tokens, self.head_dim)

    def forward(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor] | None, bias: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return the layer's attention over x [B, T, width]; `cos_sin` None leaves positions out."""
        query, key, value = self._split(x)
        if cos_sin is not None:
            query, key = rotated(query, *cos_sin), rotated(key, *cos_sin)
        key, value = cache.update(self.layer, key, value)
        mixed = self.attend(query, key, value, bias).transpose(1, 2)
        out: torch.Tensor = self.o_proj(mixed.reshape(x.shape[0], x.shape[1], self.heads * self.head_dim))
        return out


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        super().__init__()
        width, units, bias = anatomy.width, anatomy.ffn_width[layer], anatomy.traits.mlp_bias
        self.fused, self.act = anatomy.fused, _ACTIVATIONS[anatomy.traits.activation]
        if self.fused:
            self.gate_up_proj = nn.Linear(width, 2 * units, bias=bias)
        else:
            self.gate_proj = nn.Linear(width, units, bias=bias)
            self.up_proj = nn.Linear(width, units, bias=bias)
        self.down_proj = nn.Linear(units, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's feed-forward half."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        out: torch.Tensor = self.down_proj(self.act(gate) * up)
        return out


class Layer(nn.Module):
    """One decoder layer; which norms it has, and where they stand, is the family's."""

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, anatomy: Anatomy, layer: int) -> None:
        super().__init__()
        self.layout = anatomy.traits.norm_layout
        self.self_attn, self.mlp = Attention(anatomy, layer), FeedForward(anatomy, layer)
        for name in anatomy.layer_norms(layer):
            if ".self_attn." not in name:
                norm = RMSNorm(anatomy.width, anatomy.traits.norm_eps, anatomy.traits.norm_offset)
                self.add_module(name.rpartition(".")[2], norm)

    def forward(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor] | None, bias: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return x after attention and feed-forward, each with its residual."""
        if self.layout == "pre":
            x = x + self.self_attn(self.input_layernorm(x), cos_sin, bias, cache)
            out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        else:
            before = self.input_layernorm(x) if self.layout == "sandwich" else x
            x = x + self.post_attention_layernorm(self.self_attn(before, cos_sin, bias, cache))
            before = self.pre_feedforward_layernorm(x) if self.layout == "sandwich" else x
            out = x + self.post_feedforward_layernorm(self.mlp(before))
        return out


class Body(nn.Module):
    """Embedding, layers and final norm: what stands under `model.` in a checkpoint."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(anatomy.vocab, anatomy.width)
        self.layers = nn.ModuleList(Layer(anatomy, layer) for layer in range(anatomy.layers))
        self.norm = RMSNorm(anatomy.width, anatomy.traits.norm_eps, anatomy.traits.norm_offset)


class Decoder(nn.Module):
    """The whole model. Make one with `from_bundle`."""

    def __init__(self, anatomy: Anatomy, context: int, *, computed_rotary: bool = False) -> None:
        super().__init__()
        _require_supported(anatomy, context)
        self.anatomy, self.context = anatomy, context
        self.quantized: Mapping[str, AffineWeight | PalettizedWeight] = {}
        with torch.device("meta"):
            self.model = Body(anatomy)
            self.lm_head = nn.Linear(anatomy.width, anatomy.vocab, bias=False)
        ropes = anatomy.traits.ropes
        distinct = [rope for i, rope in enumerate(ropes) if rope is not None and rope not in ropes[:i]]
        self.rotary = nn.ModuleList(Rotary(rope, context, computed_rotary) for rope in distinct)
        self.rotary_of = [None if rope is None else distinct.index(rope) for rope in ropes]
        # A window no shorter than the context never hides anything, and costs the graph nothing.
        self.windows = [w if w is not None and w < context else None for w in anatomy.traits.windows]
        self.slots = nn.Buffer(torch.arange(context, dtype=torch.int32), persistent=False)

    @classmethod
    def from_bundle(cls, bundle: ModelBundle, *, context: int | None = None, computed_rotary: bool = False) -> Decoder:
        """Return the decoder of a bundle, sharing its float weights and dequantizing its packed ones.

        `context` is the most tokens it will see (default: the model's own). Packed weights stay in `quantized`,
        by module name, for exporters that write the codes themselves.
        """
        decoder = cls(bundle.anatomy, context or bundle.anatomy.context, computed_rotary=computed_rotary)
        decoder.quantized = bundle.quantized_weights()
        decoder.load_state_dict(_float_weights(bundle, decoder.quantized), strict=True, assign=True)
        if bundle.anatomy.tied:
            decoder.lm_head.weight = decoder.model.embed_tokens.weight
        return decoder.eval().requires_grad_(False)

    def empty_cache(self, batch: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return (keys, values) with P = 0, the input of a first `forward`."""
        shape = (batch, self.anatomy.kv_heads, 0, self.anatomy.head_dim)
        return ([torch.zeros(shape) for _ in self.model.layers], [torch.zeros(shape) for _ in self.model.layers])

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_bias: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return logits [B, T, V]; the cache takes the new keys and values. What exporters wrap."""
        traits = self.anatomy.traits
        x = self.model.embed_tokens(input_ids)
        if traits.embedding_scale != 1.0:
            x = x * traits.embedding_scale
        turns = [rotary(position_ids) for rotary in self.rotary]
        biases = {window: self._narrowed(attention_bias, window) for window in dict.fromkeys(self.windows)}
        for layer, rotary, window in zip(self.model.layers, self.rotary_of, self.windows, strict=True):
            x = layer(x, None if rotary is None else turns[rotary], biases[window], cache)
        logits: torch.Tensor = self.lm_head(self.model.norm(x))
        cap = traits.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _narrowed(self, bias: torch.Tensor, window: int | None) -> torch.Tensor:
        """Return the bias with everything `window` slots or more before a token masked as well."""
        if window is None:
            return bias
        tokens, total = bias.shape[2], bias.shape[3]
        slots = self.slots[:total]
        distance = self.slots[total - tokens : total].unsqueeze(1) - slots.unsqueeze(0)
        return torch.where(distance >= window, torch.full_like(bias, MASKED), bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        attention_bias: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Return (logits [B, T, V], keys, values), the latter whole: L tensors [B, K, P + T, D], past first.

        input_ids and position_ids are [B, T]; keys and values L tensors [B, K, P, D]; attention_bias
        [B or 1, 1, T, P + T].
        """
        cache = ConcatenatedCache(keys, values)
        logits = self.logits(input_ids, position_ids, attention_bias, cache)
        return logits, cache.keys, cache.values


def _require_supported(anatomy: Anatomy, context: int) -> None:
    traits: Traits = anatomy.traits
    if traits.activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"activation {traits.activation!r} cannot be exported; supported: {', '.join(_ACTIVATIONS)}."
        )
    longest = min([anatomy.context, *(rope.longest_exact for rope in traits.ropes if rope is not None)])
    if not 1 <= context <= longest:
        raise RecipeError(
            f"context_length={context} is not within 1 to {longest}, the positions this model computes with one set of "
            f"rotary frequencies. Set context_length to at most {longest}."
        )


def _float_weights(
    bundle: ModelBundle, quantized: Mapping[str, AffineWeight | PalettizedWeight]
) -> dict[str, torch.Tensor]:
    """Return a full float32 state dict under the stock names."""
    anatomy = bundle.anatomy
    weights = {f"{name}.weight": weight.dequantize() for name, weight in quantized.items()}
    for name, tensor in bundle.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and (leaf == "bias" or owner not in quantized) and tensor.is_floating_point():
            weights.setdefault(name, tensor.detach().float().cpu())
    if anatomy.tied:
        weights[f"{anatomy.head}.weight"] = weights[f"{anatomy.embedding}.weight"]
    return weights
