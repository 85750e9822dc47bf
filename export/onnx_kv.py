"""The KV cache's type in an ONNX graph, and the scales of an int8 cache.

ONNX Runtime's GroupQueryAttention keeps keys and values in float32, float16 or int8 while it computes in float32. Its
int8 codes have one scale per KV head and dimension, the same for all tokens, code = round(x / scale), so the scales are
constants of the graph and have to hold for texts nobody has seen yet:

    key    scale[h, j] = scale[h, j + R/2] = m max_t sqrt(k[h, j]^2 + k[h, j + R/2]^2) / 127
    value  scale[h, j] = m max_t |v[h, j]| / 127                                              m = HEADROOM

over the tokens t of a calibration text. The rotation turns the pair (j, j + R/2) and keeps its length, so a key's
scale holds at every position, however short the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from onnx import TensorProto
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.export.options import ExportOptions
from dwindle.rope import Rope

__all__ = ["CACHE_TYPES", "HEADROOM", "KV_BYTES", "KVScales", "kv_scales", "minimum_runtime"]

CACHE_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
"""ExportOptions.kv_cache -> type of the cache inputs and outputs."""
KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}
"""ExportOptions.kv_cache -> bytes of one number of the cache."""
HEADROOM = 1.25
"""Largest value an int8 cache holds, over the largest that calibration saw."""
_LEVELS = 127
_TINY = 1e-6


class KVScales(NamedTuple):
    """Scales of one layer's cache, each float32 [K, 1, D]."""

    key: Tensor
    value: Tensor


def minimum_runtime(options: ExportOptions) -> str:
    """Return the oldest ONNX Runtime that computes such a graph right, as tried with 1.23.2, 1.24.1, 1.25.1 and 1.28.

    1.23's GroupQueryAttention counts one key too many in a window, 1.25's takes no int8 cache.
    """
    if options.operators == "plain":
        return "onnxruntime 1.23"
    return "onnxruntime 1.28" if options.kv_cache == "int8" else "onnxruntime 1.24"


@torch.no_grad()
def kv_scales(bundle: ModelBundle, texts: Sequence[Tensor]) -> dict[int, KVScales]:
    """Return the scales of every layer from the stock model's own cache over ids [B, T] without padding."""
    from transformers import DynamicCache

    anatomy, model = bundle.anatomy, cast(Any, bundle.model)
    peaks = [[torch.full((anatomy.kv_heads, anatomy.head_dim), _TINY) for _ in range(2)]
             for _ in range(anatomy.layers)]  # fmt: skip
    for ids in texts:
        cache = DynamicCache()
        model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, (peak, kept) in enumerate(zip(peaks, cache.layers, strict=True)):
            key, value = (states.float().cpu() for states in (kept.keys, kept.values))
            for index, lengths in enumerate((_pair_lengths(key, anatomy.traits.ropes[layer]), value.abs())):
                peak[index] = torch.maximum(peak[index], lengths.amax((0, 2)))
    return {layer: KVScales(*(HEADROOM / _LEVELS * part[:, None] for part in peak)) for layer, peak in enumerate(peaks)}


def _pair_lengths(keys: Tensor, rope: Rope | None) -> Tensor:
    """Return |x| of keys [B, K, T, D], where dimensions that a rotation mixes share the length of their pair."""
    lengths = keys.abs()
    if rope is not None:
        half = rope.rotary_dim // 2
        pair = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
        lengths[..., : 2 * half] = torch.cat((pair, pair), dim=-1)
    return lengths
