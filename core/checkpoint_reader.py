"""Reads the tensors of a training checkpoint without running what stands in it.

`torch.distributed.checkpoint` keeps its index (`.metadata`) as a pickle, and a pickle can name any function to be
called when it is opened. Here an unpickler opens it that knows the dozen types such an index is made of and refuses
every other name; tensors are read with torch's own `weights_only`. So a checkpoint that came from elsewhere can be
damaged or wrong, but it runs no code.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dwindle.errors import UnsupportedModel

__all__ = ["TensorReader"]

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                                     "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}  # fmt: skip
"""`BytesStorageMetadata` is left out on purpose: such an entry would be a pickle of its own."""


class _IndexUnpickler(pickle.Unpickler):
    """Finds the types of an index by name, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return the named type if an index may hold it."""
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if (module_name, global_name) in _KNOWN or is_dtype:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no index of tensors needs")


class TensorReader(FileSystemReader):
    """A `FileSystemReader` whose index cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of the checkpoint. Raises UnsupportedModel for one that is damaged, or holds more."""
        place = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(place, "rb") as stream:
            content = io.BytesIO(stream.read())
        try:
            metadata = _IndexUnpickler(content).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
        except Exception as error:  # a damaged pickle raises whatever its bytes make it run into
            raise UnsupportedModel(f"{place}: the index of this checkpoint cannot be trusted ({error})") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
