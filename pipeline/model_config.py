"""The config of a model that need not be there: a folder, a Hugging Face id, or a config.json alone.

A plan asks for shapes, not for weights, so a 6.4B teacher can be planned on a laptop that could not hold it: of an id
only config.json is fetched.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, UnsupportedModel

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["ModelConfig", "model_config"]

_CONFIG = "config.json"
_WIDTHS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class ModelConfig:
    """What a config says of a model."""

    config: Any
    anatomy: Anatomy
    float_bits: int
    """Width of the checkpoint's floats: 16 or 32; 16 where the config does not say."""


def model_config(name: str) -> ModelConfig:
    """Return the config of a folder (weights or not), a Hugging Face id, or a JSON file.

    Raises UnsupportedModel for what is no decoder of the table, RecipeError for a model that is quantized.
    """
    given = Path(name).expanduser() if name.startswith("~") else Path(name)
    if given.is_dir():
        return _read(given)
    if given.is_file() and given.suffix == ".json":
        return _read_file(given)
    return _read(_fetched(name) if not given.exists() else given)


def _read_file(path: Path) -> ModelConfig:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copyfile(path, folder / _CONFIG)
        return _read(folder, path)


def _read(folder: Path, shown: Path | None = None) -> ModelConfig:
    """Return the config in a folder; errors speak of `shown`, where the folder is a copy."""
    from dwindle.anatomy import anatomy_of
    from dwindle.checkpoint_files import inspect_checkpoint, read_config
    from dwindle.model_source import load_config

    shown = shown or folder
    if not folder.is_dir():
        raise UnsupportedModel(f"{folder} is neither a model folder nor a config.json. Give one of them.")
    try:
        config, raw = load_config(folder), read_config(folder)
    except UnsupportedModel as error:
        told = str(error).replace(str(folder / _CONFIG), str(shown)).replace(str(folder), str(shown))
        raise UnsupportedModel(told if str(shown) in told else f"{shown}: {told}") from error
    if raw.get("quantization_config") is not None:
        raise RecipeError(f"{shown} is quantized already. Plan from the float model that it was made from.")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float16")
    width = _WIDTHS.get(dtype, 16)
    if any(folder.glob("*.safetensors")):
        width = 32 if inspect_checkpoint(folder).float_dtype() == "F32" else 16
    return ModelConfig(config, anatomy_of(config), width)


def _fetched(hub_id: str) -> Path:
    """Return the folder of the config.json of a Hugging Face id, from the cache or fetched without the weights."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from dwindle.model_source import quiet_transformers

    try:
        with quiet_transformers():
            return Path(huggingface_hub.hf_hub_download(hub_id, _CONFIG)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(
            f"{hub_id} is no folder or config.json here, and no config.json could be had from Hugging Face "
            f"({type(error).__name__}: {first_line}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error
