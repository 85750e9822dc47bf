"""A PEFT adapter folder as plain tensors: adapter_config.json and adapter_model.safetensors, checked as a whole.

Low-rank adapters only (LoRA, rsLoRA, DoRA). Read without PEFT, so that merging needs torch and safetensors alone; the
tests hold the result to PEFT's own `merge_and_unload`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dwindle.adapter_card import CARD_FILE, require_whole
from dwindle.errors import UnsupportedModel, offenders
from dwindle.low_rank import LowRank
from dwindle.storage import read_json

__all__ = ["read_adapter"]

_PATTERN = re.compile(r"\^?(?:[\w.|-]|\\\.|\.\*){1,400}\$?")
_CONDITIONAL = ("alora_invocation_tokens", "arrow_config", "use_qalora")
"""Settings with which the change of a linear is no W + s B A for every token."""
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Starts that take from the base what they put into A and B: on the base as it was, such an adapter counts it twice."""
_MOST_STARS, _LARGEST_ALPHA = 3, 1e9
_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "magnitude",
             ".lora_magnitude_vector.weight": "magnitude"}  # fmt: skip


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """Return the low-rank changes by module name; raise UnsupportedModel naming everything that is none."""
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    if (folder / CARD_FILE).is_file():
        require_whole(folder, tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None or not name.startswith(_PREFIX):
            strange.append(name)
            continue
        parts.setdefault(name.removeprefix(_PREFIX).removesuffix(suffix), {})[_SUFFIXES[suffix]] = tensor.float()
    strange += [
        f"{name} (lora_A or lora_B is missing)" for name, found in parts.items() if not {"a", "b"} <= set(found)
    ]
    if strange or not parts:
        raise UnsupportedModel(
            f"{folder}: {len(strange)} tensors are no low-rank change of a linear: {offenders(strange)}. "
            "Only LoRA, rsLoRA and DoRA adapters of linear layers can be read."
        )
    return {name: LowRank(f["a"], f["b"], _scale(config, name, f["a"].shape[0]), f.get("magnitude"))
            for name, f in parts.items()}  # fmt: skip


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023); a module may have its own alpha."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = value
            break  # as in PEFT, the first that fits
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _wrong_alphas(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with the alphas. A pattern is a regular expression of a foreign file, and some of those take
    longer than the age of the universe: only names are read, joined by `|` or with `.*` between them."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return [f"alpha_pattern={patterns!r:.80} (needed: names and numbers)"]
    unread = [one for one in patterns if not _PATTERN.fullmatch(one) or one.count("*") > _MOST_STARS]
    wrong = [f"alpha_pattern has {pattern!r:.80} (needed: a module's name)" for pattern in unread]
    alphas = [config.get("lora_alpha", 1), *patterns.values()]
    return wrong + [f"an alpha of {alpha!r:.80} (needed: a number)" for alpha in alphas if not _is_alpha(alpha)]


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_ALPHA


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(read_json(folder / "adapter_config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise UnsupportedModel(f"{folder} is no PEFT adapter: adapter_config.json cannot be read ({error}).") from error
    wrong = [f"{key}={config.get(key)!r} (needed {needed!r})"
             for key, needed in (("peft_type", "LORA"), ("bias", "none"), ("modules_to_save", None))
             if config.get(key, needed) != needed]  # fmt: skip
    wrong += [f"{key}={config[key]!r:.80} (needed: none)" for key in _CONDITIONAL if config.get(key)]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        wrong.append(f"init_lora_weights={start!r:.80}, which changes the base as well (needed: an adapter that was "
                     "converted when it was saved)")  # fmt: skip
    wrong += _wrong_alphas(config)
    if config.get("fan_in_fan_out"):
        wrong.append("fan_in_fan_out=True (needed False)")
    if wrong:
        raise UnsupportedModel(f"{folder}: this adapter cannot be merged exactly: {'; '.join(wrong)}.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        hint = " A pickle (adapter_model.bin) is never loaded." if (folder / "adapter_model.bin").exists() else ""
        raise UnsupportedModel(f"{path} cannot be read as safetensors ({error}).{hint}") from error
