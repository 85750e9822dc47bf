"""genai_config.json: what ONNX Runtime GenAI needs to generate text from a folder of ours.

The names are those of `onnx_graph`. In the fused form the runtime hands in one buffer of `max_length` tokens as past
and present (`past_present_share_buffer`), so a step copies no cache; the plain form returns a grown cache and also
wants position_ids.
"""

from __future__ import annotations

from typing import Any

from dwindle.bundle import ModelBundle
from dwindle.export.onnx_attention import is_fused
from dwindle.export.onnx_graph import MODEL_FILE
from dwindle.export.options import ExportOptions

__all__ = ["genai_config"]

_TYPES = {"olmo2": "olmo"}
"""Families that the runtime knows under another name; to it, both are decoders with these inputs and outputs."""


def genai_config(bundle: ModelBundle, options: ExportOptions) -> dict[str, Any]:
    """Return the object of genai_config.json for resolved options; greedy search by default."""
    anatomy, special = bundle.anatomy, _special_tokens(bundle)
    context_length, shared = options.context_length, is_fused(anatomy, options)
    positions = {} if shared else {"position_ids": "position_ids"}
    return {
        "model": {
            "type": _TYPES.get(anatomy.model_type, anatomy.model_type),
            "vocab_size": anatomy.vocab,
            "context_length": context_length,
            **special,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": anatomy.width,
                "head_size": anatomy.head_dim,
                "num_attention_heads": anatomy.heads,
                "num_key_value_heads": anatomy.kv_heads,
                "num_hidden_layers": anatomy.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **positions,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": context_length, "do_sample": False, "past_present_share_buffer": shared},
    }


def _special_tokens(bundle: ModelBundle) -> dict[str, Any]:
    """Return the ids of BOS, EOS (a list where there are several) and padding; EOS pads where nothing else does."""
    sources = (bundle.model.generation_config, bundle.tokenizer, bundle.model.config)

    def first(name: str) -> Any:
        found = (getattr(source, name, None) for source in sources if source is not None)
        return next((value for value in found if value is not None), None)

    end, pad = first("eos_token_id"), first("pad_token_id")
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    given = {"bos_token_id": first("bos_token_id"), "eos_token_id": end, "pad_token_id": pad}
    return {name: value for name, value in given.items() if value is not None}
