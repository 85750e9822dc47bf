"""The table of model families: everything that differs between them, and nothing else.

A row says how transformers' class for that `model_type` is built and which config key holds which number. Together
with `anatomy.py`, which applies a row to a concrete config, this is the only file that knows families. Rows were
read off transformers 4.57 and 5.23; a test builds a tiny random model of each and compares names, shapes and logits.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from dwindle.errors import UnsupportedModel

__all__ = ["FAMILIES", "MIXTURES", "ExpertKeys", "Family", "NormLayout", "QKNorm", "Windows", "family_of"]

NormLayout = Literal["pre", "sandwich", "post"]
"""Where the norms of a layer stand: before each half, before and after, or after only."""
QKNorm = Literal["none", "head", "full"]
"""Queries and keys are not normalized, per head (over head_dim), or over all heads at once."""
Windows = Literal["none", "all", "layer_types"]
"""Which layers attend to a sliding window: none, all (if config.sliding_window is set), or those in layer_types."""


@dataclass(frozen=True)
class ExpertKeys:
    """What a family calls its mixture of experts, in checkpoint files and in its config; the defaults are Qwen's."""

    block: str = "mlp"
    """The part of a layer that holds the router (`gate`) and `experts`."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count_key: str = "num_experts"
    width_key: str = "moe_intermediate_size"
    shared_width_key: str | None = None
    """Config key of the width of `shared_expert`, which every token passes; None: there is none."""
    normalizes: Literal["always", "config"] = "config"
    """The weights of the chosen experts are divided by their sum; "config" reads `norm_topk_prob`."""
    in_some_layers: bool = True
    """`decoder_sparse_step` and `mlp_only_layers` say which layers have experts; the others have a plain FFN."""


@dataclass(frozen=True)
class Family:
    """How one family differs from Llama; the defaults describe Llama without options."""

    norm_layout: NormLayout = "pre"
    qk_norm: QKNorm = "none"
    windows: Windows = "none"
    fused: bool = False
    """q, k and v are one linear (`qkv_proj`), gate and up another (`gate_up_proj`)."""
    qkv_bias: Literal["never", "always", "config"] = "config"
    """Bias of q, k and v; "config" reads `qkv_bias_key`."""
    qkv_bias_key: str = "attention_bias"
    output_bias: Literal["never", "config"] = "config"
    """Bias of o."""
    mlp_bias: Literal["never", "config"] = "never"
    """Bias of gate, up and down; "config" reads `mlp_bias`."""
    norm_offset: float = 0.0
    """Norms multiply by offset + weight."""
    scales_embedding: bool = False
    """The embedding is multiplied by sqrt(width)."""
    activation_key: str = "hidden_act"
    attention_scale_key: str | None = None
    """Config key of s where scores are scaled by s^-1/2; None: s is head_dim."""
    attention_softcap: bool = False
    """Scores go through c * tanh(x / c) where `attn_logit_softcapping` is set (Gemma 3 has the key, not the code)."""
    logit_softcap: bool = False
    """Logits do where `final_logit_softcapping` is set."""
    local_theta: bool = False
    """Sliding layers have a rope base of their own (`rope_local_base_freq`)."""
    skips_rope: bool = False
    """Layers with a 0 in `no_rope_layers` have no positions at all."""
    width_divides_into_heads: bool = False
    """transformers 5 refuses a width that is no multiple of the number of heads, whatever head_dim says."""
    heads_fill_width: bool = False
    """transformers 4.57 refuses a width other than heads times head_dim."""
    experts: ExpertKeys | None = None
    """The FFN is a mixture of experts."""


FAMILIES: dict[str, Family] = {
    "llama": Family(mlp_bias="config", width_divides_into_heads=True),
    "mistral": Family(qkv_bias="never", output_bias="never", windows="all"),
    "qwen2": Family(qkv_bias="always", output_bias="never", windows="layer_types"),
    "qwen3": Family(qk_norm="head", windows="layer_types"),
    "gemma2": Family(
        norm_layout="sandwich", windows="layer_types", norm_offset=1.0, scales_embedding=True,
        activation_key="hidden_activation", attention_scale_key="query_pre_attn_scalar", attention_softcap=True,
        logit_softcap=True, width_divides_into_heads=True,
    ),
    "gemma3_text": Family(
        norm_layout="sandwich", qk_norm="head", windows="layer_types", norm_offset=1.0, scales_embedding=True,
        activation_key="hidden_activation", attention_scale_key="query_pre_attn_scalar", logit_softcap=True,
        local_theta=True, width_divides_into_heads=True,
    ),
    "phi3": Family(fused=True, qkv_bias="never", output_bias="never", windows="all"),
    "smollm3": Family(mlp_bias="config", windows="layer_types", skips_rope=True),
    "olmo2": Family(norm_layout="post", qk_norm="full"),
}  # fmt: skip
"""The dense families: every step carries them."""

MIXTURES: dict[str, Family] = {
    "mixtral": Family(
        qkv_bias="never", output_bias="never", windows="all",
        experts=ExpertKeys(block="block_sparse_moe", gate="w1", up="w3", down="w2", count_key="num_local_experts",
                           width_key="intermediate_size", normalizes="always", in_some_layers=False),
    ),
    "qwen2_moe": Family(
        qkv_bias_key="qkv_bias", output_bias="never", heads_fill_width=True,
        experts=ExpertKeys(shared_width_key="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Family(qk_norm="head", windows="all", experts=ExpertKeys()),
}  # fmt: skip
"""The families with mixtures of experts: they are pruned, distilled and measured; `anatomy.require_dense` guards the
steps that do not carry them. Sliding windows of qwen2_moe are refused: 4.57 and 5 give them to different layers."""


def family_of(model_type: object) -> Family:
    """Return the table's row, or raise UnsupportedModel with the nearest and all supported names."""
    known = {**FAMILIES, **MIXTURES}
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    near = difflib.get_close_matches(str(model_type), known, n=1)
    hint = f" The nearest supported one is {near[0]}." if near else ""
    raise UnsupportedModel(
        f"model family {model_type!r} is not supported.{hint} Supported: {', '.join(sorted(known))}."
    )
