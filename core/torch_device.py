"""The device that a user names, held against what this machine has, before anything long begins."""

from __future__ import annotations

import torch

from dwindle.errors import RecipeError

__all__ = ["usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """Return the torch device of a name such as `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises RecipeError, naming what there is, for one that torch does not know or this machine does not have.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--torch-device {name}: torch knows no such device. {_there_is()}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        built = "sees" if torch.version.cuda else "was built without CUDA and sees"
        raise RecipeError(f"--torch-device {name}: this torch ({torch.__version__}) {built} {_gpus()}. {_there_is()}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError(f"--torch-device {name}: no Apple GPU here. {_there_is()}")
    return device


def _gpus() -> str:
    count = torch.cuda.device_count()
    return f"{count} GPU{'' if count == 1 else 's'}" if count else "no GPU"


def _there_is() -> str:
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    return f"Take {' or '.join(found)}."
