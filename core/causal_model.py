"""Any causal language model that transformers has a class for, to be read from: what a teacher needs to be.

The family table (`families`) is for models that are taken apart: it says which linear is which. A model that is only
asked what it predicts needs a class, whole weights and a tokenizer. So families outside the table (GPT-2, GPT-NeoX,
OPT, Falcon, Cohere ...) load here, with the same refusals: safetensors alone, no code from a checkpoint, no weight
missing, left over, of another shape, or no number.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwindle.checkpoint_files import inspect_checkpoint, read_config
from dwindle.errors import UnsupportedModel, offenders
from dwindle.families import FAMILIES, MIXTURES
from dwindle.model_source import load_config, load_model, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["causal_config", "causal_model", "context_of", "in_table"]

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def in_table(config: Any) -> bool:
    """Return whether a config is of a family of the table."""
    return getattr(config, "model_type", None) in {**FAMILIES, **MIXTURES}


def causal_config(folder: Path) -> PretrainedConfig:
    """Return the config of a checkpoint folder of any causal language model; raise UnsupportedModel for others."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw = read_config(folder)
    kind = raw.get("model_type")
    if kind in {**FAMILIES, **MIXTURES} or isinstance(raw.get("text_config"), dict):
        return load_config(folder)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        hint = f" The nearest one that is: {near[0]}." if near else ""
        raise UnsupportedModel(
            f"{folder / 'config.json'}: model_type {kind!r} is no causal language model of transformers "
            f"{transformers.__version__}.{hint} A teacher of a class of its own is not run: its code is not read."
        )
    if raw.get("quantization_config") is not None:
        raise UnsupportedModel(f"{folder} is quantized. Give the unquantized checkpoint of {kind!r}.")
    for key in ("_name_or_path", "auto_map", "dtype", "torch_dtype"):
        raw.pop(key, None)
    try:
        with quiet_transformers():
            return transformers.CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:  # config classes raise whatever a nonsensical value makes them run into
        raise UnsupportedModel(
            f"{folder / 'config.json'}: {error}. Mend it or download the checkpoint again."
        ) from error


def causal_model(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a config from `causal_config`, in float32 and eval mode; raise UnsupportedModel."""
    if in_table(config):
        return load_model(folder, config)[0]
    from transformers import AutoModelForCausalLM

    inspect_checkpoint(folder)
    try:
        with quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # modelling code raises whatever a nonsensical value makes it run into
        raise UnsupportedModel(f"{folder} cannot be loaded ({type(error).__name__}: {error}).") from error
    wrong = [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{name} has no place in the model" for name in found["unexpected_keys"]]
    wrong += [f"{one[0] if isinstance(one, tuple) else one} has another shape" for one in found["mismatched_keys"]]
    wrong += [f"{name} holds NaN or infinity" for name, p in model.named_parameters() if not p.isfinite().all()]
    if wrong:
        raise UnsupportedModel(
            f"{folder}: {len(wrong)} tensors are wrong: {offenders(sorted(wrong))}. "
            "Use the config.json that belongs to these weights, or download them again."
        )
    made: PreTrainedModel = model.eval()
    return made


def context_of(config: Any) -> int | None:
    """Return how many tokens a model reads at most, None where its config names no bound."""
    found = [getattr(config, key, None) for key in _CONTEXT_KEYS]
    return next((value for value in found if isinstance(value, int) and value > 0), None)
