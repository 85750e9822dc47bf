"""What is wrong with a model config, all at once: values that transformers would refuse or misread. Torch-free.

transformers 4.57 takes nearly any value and fails deep inside a model, or allocates what a damaged file asks for; 5.x
checks types and a few ratios. A config that passes here is built by both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from dwindle.families import Family, family_of

__all__ = ["head_dim_of", "kv_heads_of", "shape_problems"]

_LARGEST: dict[str, int] = {
    "num_hidden_layers": 1_000, "hidden_size": 131_072, "intermediate_size": 1_048_576, "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096, "head_dim": 8_192, "vocab_size": 16_777_216, "max_position_embeddings": 1 << 30,
}  # fmt: skip
"""Sizes no published model comes near: a larger one is a damaged or hostile config, refused before it is allocated."""

_LAYER_TYPES = ("full_attention", "sliding_attention")


def kv_heads_of(config: Any) -> int:
    """Return the number of KV heads: as many as heads where the config does not say."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim_of(config: Any) -> int:
    """Return the width of a head: an even share of the model's where the config does not say."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def shape_problems(config: Any) -> list[str]:
    """Return one line per value that transformers 4.57 or 5.x would refuse or misread; an empty list is good."""
    family = family_of(getattr(config, "model_type", None))
    problems = list(_size_problems(config))
    if not problems:  # the ratios below need sizes that are numbers
        problems += _ratio_problems(config, family)
    problems += _layer_problems(config, family)
    problems += _value_problems(config, family)
    problems += _expert_problems(config, family)
    return problems


def _size_problems(config: Any) -> Iterator[str]:
    optional = ("head_dim", "num_key_value_heads")
    for key, largest in _LARGEST.items():
        value = getattr(config, key, None)
        if value is None and key in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            yield f"{key}={value!r} is not a whole number from 1 to {largest:,}"


def _ratio_problems(config: Any, family: Family) -> Iterator[str]:
    heads, kv_heads, width = config.num_attention_heads, kv_heads_of(config), config.hidden_size
    if heads % kv_heads:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
    if width % heads and (family.width_divides_into_heads or not getattr(config, "head_dim", None)):
        yield f"hidden_size={width} is no multiple of num_attention_heads={heads}"
    if family.heads_fill_width and heads * head_dim_of(config) != width:
        yield f"hidden_size={width} is not num_attention_heads={heads} times head_dim={head_dim_of(config)}"
    if head_dim_of(config) % 2:
        yield f"head_dim={head_dim_of(config)} is odd; rotary embeddings turn pairs"


def _layer_problems(config: Any, family: Family) -> Iterator[str]:
    layers, window = getattr(config, "num_hidden_layers", None), getattr(config, "sliding_window", None)
    for key in ("layer_types", "no_rope_layers"):
        listed = getattr(config, key, None)
        if listed is None:
            continue
        if not isinstance(listed, list | tuple) or len(listed) != layers:
            count = len(listed) if isinstance(listed, list | tuple) else repr(listed)
            yield f"{key} has {count} entries for num_hidden_layers={layers}"
        elif key == "layer_types" and not set(map(str, listed)) <= set(_LAYER_TYPES):
            yield f"layer_types={listed!r} has other entries than {', '.join(_LAYER_TYPES)}"
        elif key == "layer_types" and "sliding_attention" in listed and window is None and family.windows != "none":
            yield "layer_types has sliding_attention, but sliding_window is not set"
    if window is not None and family.windows != "none" and not _is_whole(window, 1):
        yield f"sliding_window={window!r} is not a whole number above 0"


def _value_problems(config: Any, family: Family) -> Iterator[str]:
    positive = ["rms_norm_eps"] + ([family.attention_scale_key] if family.attention_scale_key else [])
    optional = ["attn_logit_softcapping"] if family.attention_softcap else []
    optional += ["final_logit_softcapping"] if family.logit_softcap else []
    optional += ["rope_local_base_freq"] if family.local_theta else []
    for key in positive + optional:
        value = getattr(config, key, None)
        if not _is_positive(value) and (value is not None or key in positive):
            yield f"{key}={value!r} is not a number above 0"
    share = getattr(config, "partial_rotary_factor", None)
    if share is not None and (not _is_positive(share) or share > 1):
        yield f"partial_rotary_factor={share!r} is not a share above 0 and up to 1"
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "norm_topk_prob"):
        value = getattr(config, key, False)
        if not isinstance(value, bool):
            yield f"{key}={value!r} is neither true nor false"
    if not isinstance(getattr(config, family.activation_key, None), str):
        yield f"{family.activation_key}={getattr(config, family.activation_key, None)!r} is no name of a function"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention makes an encoder of the decoder"


def _expert_problems(config: Any, family: Family) -> Iterator[str]:
    keys = family.experts
    if keys is None:
        return
    shared = [keys.shared_width_key] if keys.shared_width_key else []
    for key in (keys.count_key, keys.width_key, *shared, "num_experts_per_tok"):
        value = getattr(config, key, None)
        if not _is_whole(value, 1) or value > _LARGEST["intermediate_size"]:
            yield f"{key}={value!r} is not a whole number from 1 to {_LARGEST['intermediate_size']:,}"
    count, chosen = getattr(config, keys.count_key, None), getattr(config, "num_experts_per_tok", None)
    if _is_whole(count, 1) and _is_whole(chosen, 1) and chosen > count:
        yield f"num_experts_per_tok={chosen} of {keys.count_key}={count}"
    if keys.in_some_layers:
        step, dense = getattr(config, "decoder_sparse_step", None), getattr(config, "mlp_only_layers", None)
        if not _is_whole(step, 1):
            yield f"decoder_sparse_step={step!r} is not a whole number above 0"
        if not isinstance(dense or [], list | tuple) or not all(_is_whole(layer, 0) for layer in dense or []):
            yield f"mlp_only_layers={dense!r} is no list of layers"
    if family.windows == "none" and getattr(config, "use_sliding_window", False):
        yield "use_sliding_window gives other layers a window in transformers 4.57 than in 5"


def _is_whole(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
