"""Who plays which part in a model: names, shapes and traits, read from its config by the table in `families.py`.

Every step that touches weights asks an `Anatomy` instead of guessing names. It is made from a config alone, so a plan
can be drawn for a model that was never loaded; `check_model` holds a loaded model to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dwindle.config_problems import head_dim_of, kv_heads_of, shape_problems
from dwindle.errors import UnsupportedModel, offenders
from dwindle.families import FAMILIES, Family, NormLayout, QKNorm, family_of

if TYPE_CHECKING:
    from torch import nn

    from dwindle.rope import Rope

__all__ = ["FAMILIES", "Anatomy", "Part", "Traits", "anatomy_of", "check_model", "family_of", "module", "set_module",
           "shape_problems"]  # fmt: skip

Part = Literal["q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up"]

_SEPARATE: dict[Part, str] = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_FUSED: dict[Part, str] = {
    "qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_NORMS: dict[NormLayout, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "sandwich": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """What a family computes differently: all that `export/decoder.py` needs beyond names and shapes."""

    activation: str
    norm_eps: float
    norm_offset: float
    norm_layout: NormLayout
    qk_norm: QKNorm
    embedding_scale: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    windows: tuple[int | None, ...]
    """Per layer: a position sees itself and the window - 1 before it; None: all before it."""
    ropes: tuple[Rope | None, ...]
    """Per layer; None: no position embedding."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


@dataclass(frozen=True)
class Anatomy:
    """Names and shapes of one concrete model. H heads, K KV heads, D width, V vocabulary."""

    model_type: str
    layers: int
    width: int
    ffn_width: tuple[int, ...]
    """Per layer: units between gate/up and down."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    """The head's weight is the embedding's."""
    fused: bool
    traits: Traits
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"

    def layer_path(self, layer: int) -> str:
        """Return the full name of a decoder layer's module."""
        return f"model.layers.{layer}"

    def parts(self, layer: int) -> dict[Part, str]:
        """Return the full names of a layer's linears by the part they play (fused families have qkv and gate_up)."""
        names = _FUSED if self.fused else _SEPARATE
        return {part: f"{self.layer_path(layer)}.{name}" for part, name in names.items()}

    def linear_names(self) -> list[str]:
        """Return the full names of all linears of all layers; never the embedding or the head."""
        return [name for layer in range(self.layers) for name in self.parts(layer).values()]

    def layer_norms(self, layer: int) -> list[str]:
        """Return the full names of a layer's norms, those of queries and keys last."""
        names = list(_NORMS[self.traits.norm_layout])
        if self.traits.qk_norm != "none":
            names += ["self_attn.q_norm", "self_attn.k_norm"]
        return [f"{self.layer_path(layer)}.{name}" for name in names]

    def norm_names(self) -> list[str]:
        """Return the full names of all norms, the final one last."""
        return [name for layer in range(self.layers) for name in self.layer_norms(layer)] + [self.final_norm]

    def linear_shape(self, layer: int, part: Part) -> tuple[int, int]:
        """Return (O, I) of the linear that plays `part` in `layer`."""
        queries, keys, ffn = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn_width[layer]
        shapes: dict[Part, tuple[int, int]] = {
            "q": (queries, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, queries),
            "gate": (ffn, self.width), "up": (ffn, self.width), "down": (self.width, ffn),
            "qkv": (queries + 2 * keys, self.width), "gate_up": (2 * ffn, self.width),
        }  # fmt: skip
        return shapes[part]


def module(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that full name."""
    return model.get_submodule(name)


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule of that full name, which must exist."""
    model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def anatomy_of(config: Any) -> Anatomy:
    """Return the anatomy of a transformers config.

    Raises UnsupportedModel for a family outside the table, impossible shapes, and options no row describes.
    """
    family = family_of(getattr(config, "model_type", None))
    problems = shape_problems(config)
    if problems:
        raise UnsupportedModel(f"{config.model_type} config: {'; '.join(problems)}. Mend config.json.")
    layers = int(config.num_hidden_layers)
    return Anatomy(
        model_type=config.model_type,
        layers=layers,
        width=int(config.hidden_size),
        ffn_width=(int(config.intermediate_size),) * layers,
        heads=int(config.num_attention_heads),
        kv_heads=kv_heads_of(config),
        head_dim=head_dim_of(config),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        tied=bool(config.tie_word_embeddings),
        fused=family.fused,
        traits=_traits(config, family),
    )


def _traits(config: Any, family: Family) -> Traits:
    attention_bias = bool(getattr(config, "attention_bias", False))
    scale_over = getattr(config, family.attention_scale_key) if family.attention_scale_key else head_dim_of(config)
    return Traits(
        activation=str(getattr(config, family.activation_key)),
        norm_eps=float(config.rms_norm_eps),
        norm_offset=family.norm_offset,
        norm_layout=family.norm_layout,
        qk_norm=family.qk_norm,
        embedding_scale=float(config.hidden_size) ** 0.5 if family.scales_embedding else 1.0,
        attention_scale=float(scale_over) ** -0.5,
        attention_softcap=config.attn_logit_softcapping if family.attention_softcap else None,
        logit_softcap=config.final_logit_softcapping if family.logit_softcap else None,
        windows=_windows(config, family),
        ropes=_ropes(config, family),
        qkv_bias=attention_bias if family.qkv_bias == "config" else family.qkv_bias == "always",
        output_bias=attention_bias and family.output_bias == "config",
        mlp_bias=family.mlp_bias == "config" and bool(getattr(config, "mlp_bias", False)),
    )


def _sliding(config: Any) -> list[bool]:
    kinds = getattr(config, "layer_types", None) or []
    return [kind == "sliding_attention" for kind in kinds] or [False] * int(config.num_hidden_layers)


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    slides = {
        "none": [False] * int(config.num_hidden_layers),
        "all": [True] * int(config.num_hidden_layers),
        "layer_types": _sliding(config),
    }[family.windows]
    return tuple(int(window) if window is not None and sliding else None for sliding in slides)


def _ropes(config: Any, family: Family) -> tuple[Rope | None, ...]:
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if family.local_theta:
        whole = _rope(config, given.get("full_attention") or given, getattr(config, "rope_scaling", None))
        local_theta = {"rope_theta": getattr(config, "rope_local_base_freq", None)}
        local = _rope(config, given.get("sliding_attention") or local_theta, None)
        return tuple(local if sliding else whole for sliding in _sliding(config))
    rope = _rope(config, given, getattr(config, "rope_scaling", None))
    if family.skips_rope:
        return tuple(rope if uses else None for uses in config.no_rope_layers)
    return (rope,) * int(config.num_hidden_layers)


def _rope(config: Any, given: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> Rope:
    """Return the rope of transformers 5's dict (theta inside), or of 4.57's separate theta and scaling."""
    from dwindle.rope import Rope

    merged = {**(scaling or {}), **given}
    theta = merged.pop("rope_theta", None) or getattr(config, "rope_theta", None)
    if not isinstance(theta, int | float) or theta <= 1:
        raise UnsupportedModel(f"{config.model_type} config: rope_theta={theta!r} is not a number above 1.")
    share = merged.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
    kind = merged.pop("rope_type", None) or merged.get("type") or "default"
    merged.pop("type", None)
    if kind == "su":
        kind = "longrope"
    if kind == "longrope" and getattr(config, "original_max_position_embeddings", None):
        merged["original_max_position_embeddings"] = config.original_max_position_embeddings
    return Rope(theta=float(theta), rotary_dim=int(head_dim_of(config) * share),
                context=int(config.max_position_embeddings), kind=str(kind), scaling=merged or None)  # fmt: skip


def check_model(model: nn.Module, anatomy: Anatomy) -> None:
    """Raise UnsupportedModel unless every named linear is there with the shape the config says."""
    wrong = []
    for layer in range(anatomy.layers):
        for part, name in anatomy.parts(layer).items():
            found, needed = model.get_submodule(name), anatomy.linear_shape(layer, part)
            shape = (getattr(found, "out_features", None), getattr(found, "in_features", None))
            if shape != needed:
                wrong.append(f"{name} {shape} where the config says {needed}")
    if wrong:
        raise UnsupportedModel(
            f"{len(wrong)} linears do not have the config's shape: {offenders(wrong)}. Mend config.json or the weights."
        )
