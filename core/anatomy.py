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
from dwindle.families import FAMILIES, ExpertKeys, Family, NormLayout, QKNorm, family_of

if TYPE_CHECKING:
    from torch import nn

    from dwindle.rope import Rope

__all__ = ["FAMILIES", "Anatomy", "Experts", "Part", "Traits", "anatomy_of", "check_model", "family_of", "module",
           "require_dense", "set_module", "shape_problems"]  # fmt: skip

Part = Literal["q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up"]

_SEPARATE: dict[Part, str] = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_FUSED: dict[Part, str] = {
    "qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_FFN: tuple[Part, ...] = ("gate", "up", "down")
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
class Experts:
    """The mixture of experts of one layer: of `count` FFNs the router chooses `top_k` for every token.

    Their names are those in checkpoint files; how a loaded model holds them depends on transformers' version, see
    `dwindle.experts`. A shared expert, which every token passes, is the layer's FFN: its gate, up and down are `parts`.
    """

    count: int
    width: int
    """Units of every expert."""
    top_k: int
    normalized: bool
    """The weights of the chosen are divided by their sum."""
    shared: bool
    """A shared expert is added, weighed by the sigmoid of a gate."""


@dataclass(frozen=True)
class Anatomy:
    """Names and shapes of one concrete model. H heads, K KV heads, D width, V vocabulary."""

    model_type: str
    layers: int
    width: int
    ffn_width: tuple[int, ...]
    """Per layer: units between gate/up and down; with experts those of the shared one, 0 if there is none."""
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
    experts: tuple[Experts | None, ...] = ()
    """Per layer, None for a dense one; empty for a dense family."""

    @property
    def has_experts(self) -> bool:
        """Return whether any layer has a mixture of experts."""
        return any(self.experts)

    def experts_of(self, layer: int) -> Experts | None:
        """Return the mixture of experts of a layer, or None."""
        return self.experts[layer] if self.experts else None

    def mixture_path(self, layer: int) -> str:
        """Return the name, in checkpoint files, of what holds a layer's router and experts."""
        return f"{self.layer_path(layer)}.{self._expert_keys.block}"

    def router(self, layer: int) -> str:
        """Return the name, in checkpoint files, of the linear [experts, D] that scores the experts."""
        return f"{self.mixture_path(layer)}.gate"

    def shared_gate(self, layer: int) -> str:
        """Return the name, in checkpoint files, of the linear [1, D] that weighs a shared expert."""
        return f"{self.mixture_path(layer)}.shared_expert_gate"

    def expert_parts(self, layer: int, expert: int) -> dict[Part, str]:
        """Return the names, in checkpoint files, of an expert's linears."""
        keys, path = self._expert_keys, f"{self.mixture_path(layer)}.experts.{expert}"
        return {"gate": f"{path}.{keys.gate}", "up": f"{path}.{keys.up}", "down": f"{path}.{keys.down}"}

    @property
    def _expert_keys(self) -> ExpertKeys:
        keys = family_of(self.model_type).experts
        assert keys is not None, f"{self.model_type} has no experts"
        return keys

    def layer_path(self, layer: int) -> str:
        """Return the full name of a decoder layer's module."""
        return f"model.layers.{layer}"

    def parts(self, layer: int) -> dict[Part, str]:
        """Return the full names of a layer's linears by the part they play (fused families have qkv and gate_up).

        With experts, gate, up and down are those of the shared one, or missing: the experts are no `parts`.
        """
        names = _FUSED if self.fused else _SEPARATE
        experts = self.experts_of(layer)
        if experts is not None:
            path = f"{self._expert_keys.block}.shared_expert"
            names = {part: name for part, name in names.items() if part not in _FFN}
            names |= {part: f"{path}.{part}_proj" for part in _FFN if experts.shared}
        return {part: f"{self.layer_path(layer)}.{name}" for part, name in names.items()}

    def linear_names(self) -> list[str]:
        """Return the full names of all `parts` of all layers; never the embedding, the head, a router or an expert."""
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
    experts = _experts(config, family)
    shared = family.experts.shared_width_key if family.experts else None
    shared_width = int(getattr(config, shared)) if shared else 0
    return Anatomy(
        model_type=config.model_type,
        layers=layers,
        width=int(config.hidden_size),
        ffn_width=tuple(
            shared_width if mixed else int(config.intermediate_size) for mixed in experts or (None,) * layers
        ),
        heads=int(config.num_attention_heads),
        kv_heads=kv_heads_of(config),
        head_dim=head_dim_of(config),
        vocab=int(config.vocab_size),
        context=int(config.max_position_embeddings),
        tied=bool(config.tie_word_embeddings),
        fused=family.fused,
        traits=_traits(config, family),
        experts=experts,
    )


def require_dense(anatomy: Anatomy, step: str) -> None:
    """Raise UnsupportedModel for a model with experts, in the name of a step that does not carry them."""
    if anatomy.has_experts:
        mixtures = [found for found in anatomy.experts if found]
        raise UnsupportedModel(
            f"{step}: {anatomy.model_type} has mixtures of {mixtures[0].count} experts in {len(mixtures)} of "
            f"{anatomy.layers} layers, which {step} does not carry. Models with experts can be pruned, distilled and "
            "measured; distill into a dense student to go on from there."
        )


def _experts(config: Any, family: Family) -> tuple[Experts | None, ...]:
    keys = family.experts
    if keys is None:
        return ()
    found = Experts(
        count=int(getattr(config, keys.count_key)),
        width=int(getattr(config, keys.width_key)),
        top_k=int(config.num_experts_per_tok),
        normalized=keys.normalizes == "always" or bool(config.norm_topk_prob),
        shared=keys.shared_width_key is not None,
    )
    if not keys.in_some_layers:
        return (found,) * int(config.num_hidden_layers)
    dense, step = set(config.mlp_only_layers or ()), int(config.decoder_sparse_step)
    return tuple(
        None if layer in dense or (layer + 1) % step else found for layer in range(int(config.num_hidden_layers))
    )


def _traits(config: Any, family: Family) -> Traits:
    attention_bias = bool(getattr(config, family.qkv_bias_key, False))
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
