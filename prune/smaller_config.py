"""The config of the pruned model, in keys that transformers 4.57 and 5 both read.

Every number of the new shape is written out, `head_dim` always: most families would else divide the new width by the
new number of heads. Lists per layer (`layer_types`, `no_rope_layers`) keep the entries of the layers that stay. A width
cut from D to D' scales eps by D / D'; see `surgery`. Where only some layers have experts, `mlp_only_layers` lists the
others.

transformers 5 refuses a Llama whose width is no multiple of its heads, although `head_dim` makes the rule moot. Such a
model is written as an architecture with the same mathematics: Mistral without a sliding window, or, with biases,
SmolLM3 with rotary positions in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dwindle.families import family_of
from dwindle.model_source import quiet_transformers, separate_rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dwindle.bundle import ModelBundle
    from dwindle.prune.keep_plan import KeepPlan
    from dwindle.prune.shape import Shape

__all__ = ["smaller_config", "written_as"]

_PER_LAYER = ("layer_types", "no_rope_layers")
_CARRIED = (
    "vocab_size", "hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "attention_dropout", "attention_bias", "mlp_bias",
)  # fmt: skip
"""What Llama's config says beside its shape and rope, under the same names where it is written as another."""


def written_as(shape: Shape) -> str:
    """Return the model_type a shape is written as."""
    if shape.model_type != "llama" or shape.width % shape.heads == 0:
        return shape.model_type
    return "smollm3" if shape.qkv_bias or shape.output_bias or shape.mlp_bias else "mistral"


def smaller_config(bundle: ModelBundle, plan: KeepPlan) -> PretrainedConfig:
    """Return the transformers config of the pruned model."""
    import transformers

    config, after = bundle.model.config, plan.after
    kind = written_as(after)
    raw = _same_kind(bundle, plan) if kind == after.model_type else _other_kind(bundle, kind, after.layers)
    raw.update(
        model_type=kind, num_hidden_layers=after.layers, hidden_size=after.width, intermediate_size=after.ffn_width,
        num_attention_heads=after.heads, num_key_value_heads=after.kv_heads, head_dim=after.head_dim,
        tie_word_embeddings=after.tied, rms_norm_eps=config.rms_norm_eps * plan.shape.width / after.width,
    )  # fmt: skip
    raw.update(_expert_keys(after, config.intermediate_size))
    with quiet_transformers():
        made: PretrainedConfig = transformers.CONFIG_MAPPING[kind].from_dict(raw)
    return made


def _expert_keys(after: Shape, ffn_width: int) -> dict[str, Any]:
    """Return what the config says of experts; which layers have none is listed, whatever the full model's rule was.

    The full model's `ffn_width` stays where no layer has such an FFN: a number is needed there.
    """
    keys = family_of(after.model_type).experts
    if keys is None:
        return {}
    found: dict[str, Any] = {"intermediate_size": after.ffn_width if after.dense_layers else ffn_width}
    found |= {keys.count_key: after.experts, keys.width_key: after.expert_width}
    if keys.shared_width_key:
        found[keys.shared_width_key] = after.shared_width
    if keys.in_some_layers:
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": list(after.dense_layers)}
    return found


def _same_kind(bundle: ModelBundle, plan: KeepPlan) -> dict[str, Any]:
    raw = {**bundle.config_json()}
    for key in ("dtype", "architectures"):
        raw.pop(key, None)
    for key in _PER_LAYER:
        listed = getattr(bundle.model.config, key, None)
        if listed is not None:
            raw[key] = [listed[keep.layer] for keep in plan.layers]
    return raw


def _other_kind(bundle: ModelBundle, kind: str, layers: int) -> dict[str, Any]:
    config = bundle.model.config
    whole = separate_rope(config.to_dict())
    raw = {key: whole[key] for key in (*_CARRIED, "rope_theta", "rope_scaling") if key in whole}
    if kind == "mistral":
        del raw["attention_bias"], raw["mlp_bias"]
        return {**raw, "sliding_window": None}
    return {**raw, "use_sliding_window": False, "no_rope_layers": [1] * layers,
            "layer_types": ["full_attention"] * layers}  # fmt: skip
