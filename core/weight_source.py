"""The tensors of a (sharded) safetensors checkpoint, one at a time or some rows of one; never more than was asked for.

Names and shapes come from the headers, which are checked against config.json before any weight is read. Weights are
read through ordinary file calls: a mapped file, as `safetensors.safe_open` gives, counts each page it has touched as
resident memory until it is closed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dwindle.anatomy import anatomy_of
from dwindle.checkpoint_files import inspect_checkpoint
from dwindle.errors import RecipeError, UnsupportedModel, offenders
from dwindle.model_source import compare_tensors, load_config
from dwindle.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STREAMED_PARAMETERS", "StoredTensors", "WeightSource"]

STREAMED_PARAMETERS = 500_000_000
"""From so many parameters on, the command line works block by block."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_ELEMENTS = 1 << 23
"""Elements looked at together when extremes are sought."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes stand."""

    path: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredTensors:
    """The float tensors of a checkpoint folder of any architecture; others (masks, codes) are not seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = inspect_checkpoint(folder)
        self.storage_dtype = _DTYPES[self.files.float_dtype()]
        self._places = {name: place for file in self.files.files for name, place in _places(folder / file)}

    @property
    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return sorted(self._places)

    def __contains__(self, name: object) -> bool:
        """Return whether a tensor of that name is stored."""
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return self._places[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or its rows from `start` to `stop`, in its stored dtype and in memory of its own."""
        place = self._places[name]
        stop = place.shape[0] if stop is None else stop
        row = math.prod(place.shape[1:])
        size = place.dtype.itemsize
        found = np.fromfile(place.path, dtype=np.uint8, count=(stop - start) * row * size,
                            offset=place.begin + start * row * size)  # fmt: skip
        return torch.from_numpy(found).view(place.dtype).view(stop - start, *place.shape[1:])

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Return float32 [n, D]: the rows [n] of a table."""
        place = self._places[name]
        row = math.prod(place.shape[1:]) * place.dtype.itemsize
        with place.path.open("rb") as file:
            parts = []
            for index in rows.tolist():
                file.seek(place.begin + index * row)
                parts.append(file.read(row))
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=place.dtype).view(len(rows), -1).float()


class WeightSource(StoredTensors):
    """An unquantized checkpoint folder of a family in the table; raises UnsupportedModel or RecipeError for others."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise RecipeError(
                f"{folder} is quantized already, and codes are rounded once. Start from the float checkpoint "
                "that it was made from."
            )
        super().__init__(folder)
        compare_tensors(folder, self.config, self.files)
        odd = [f"{name} ({t.dtype})" for name, t in self.files.tensors.items() if t.dtype not in _DTYPES]
        if odd:
            raise UnsupportedModel(
                f"{folder}: {len(odd)} tensors are stored in types that are no plain floats: {offenders(odd)}. "
                f"Needed: {', '.join(_DTYPES)}. Give the unquantized checkpoint."
            )
        self.anatomy = anatomy_of(self.config)

    @property
    def names(self) -> list[str]:
        """Return the names of the stored tensors that the model has a place for, in the order of its layers.

        A tied head's copy of the embedding is left out.
        """
        anatomy = self.anatomy
        head = f"{anatomy.head}.weight"
        paths = [anatomy.embedding, *map(anatomy.layer_path, range(anatomy.layers)), anatomy.final_norm, anatomy.head]
        known = sorted(name for name in self._places if name.endswith((".weight", ".bias")))  # old ones hold inv_freq
        found = {path: [name for name in known if name.startswith(f"{path}.")] for path in paths}
        return [name for names in found.values() for name in names if not (anatomy.tied and name == head)]

    @property
    def parameters(self) -> int:
        """Return the number of stored parameters, a tied head's once."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the checkpoint's tokenizer; none of its own code is run."""
        return load_tokenizer(self.folder, trust_remote_code=False, vocab=self.anatomy.vocab)

    def extremes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor's name and its largest magnitude (NaN if it holds one): one pass over all bytes."""
        for name in self.names:
            shape = self.shape(name)
            step = max(1, _CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
            yield name, torch.stack([self.read(name, i, min(i + step, shape[0])).abs().max().float()
                                     for i in range(0, shape[0], step)]).max()  # fmt: skip


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    """Yield name and place of the float tensors in a file whose header was found valid."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if (dtype := _DTYPES.get(entry["dtype"])) is not None:
            yield name, _Place(path, 8 + length + entry["data_offsets"][0], dtype, tuple(entry["shape"]))
