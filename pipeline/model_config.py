"""The config of a model that need not be there: a folder, a Hugging Face id, or a config.json alone.

A plan asks for shapes, not for weights, so a 6.4B teacher can be planned on a laptop that could not hold it: of an id
only config.json is fetched.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, UnsupportedModel

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["ModelConfig", "decoder_config", "model_config", "teacher_config"]

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
    from dwindle.model_source import load_config

    with _place(name) as (folder, shown):
        return _read(folder, shown, load_config)


def decoder_config(name: str) -> Any:
    """Return the config of a decoder of the table, float or quantized, known by a folder, an id or a JSON file."""
    from dwindle.model_source import load_config

    with _place(name) as (folder, shown):
        return _config(folder, shown, load_config)


def teacher_config(name: str) -> Any:
    """Return the config of a teacher, known by a folder, an id or a JSON file: any causal language model's.

    Raises as `model_config` does, but for models outside the table.
    """
    from dwindle.causal_model import causal_config

    with _place(name) as (folder, shown):
        return _config(folder, shown, causal_config)


@contextlib.contextmanager
def _place(name: str) -> Iterator[tuple[Path, Path]]:
    """Yield the folder that holds a config.json, and what errors are to call it."""
    given = Path(name).expanduser() if name.startswith("~") else Path(name)
    if given.is_file() and given.suffix == ".json":
        with tempfile.TemporaryDirectory() as place:
            shutil.copyfile(given, Path(place) / _CONFIG)
            yield Path(place), given
        return
    folder = given if given.exists() else _fetched(name)
    if not folder.is_dir():
        raise UnsupportedModel(f"{folder} is neither a model folder nor a config.json. Give one of them.")
    yield folder, folder


def _config(folder: Path, shown: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(folder)
    except UnsupportedModel as error:
        told = str(error).replace(str(folder / _CONFIG), str(shown)).replace(str(folder), str(shown))
        raise UnsupportedModel(told if str(shown) in told else f"{shown}: {told}") from error


def _read(folder: Path, shown: Path, load: Callable[[Path], Any]) -> ModelConfig:
    """Return the config in a folder; errors speak of `shown`, where the folder is a copy."""
    from dwindle.anatomy import anatomy_of
    from dwindle.checkpoint_files import inspect_checkpoint, read_config

    config = _config(folder, shown, load)
    raw = read_config(folder)
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
