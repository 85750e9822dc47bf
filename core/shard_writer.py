"""A safetensors checkpoint written tensor by tensor, so that no more than one need be in memory.

`safetensors.torch.save_file` wants all tensors of a file at once and copies each. The format itself is simple: the
length of a JSON header, the header, the bytes. Here the header's place is left free, the tensors are appended as they
come, and the header, padded with spaces as the format allows, is written when a file is full. Tensors whose bytes are
no multiple of 8 come last, smallest type last, so that all stand at multiples of their type's size, as readers that
map the file need.

Files are named as transformers names them: `model.safetensors` if there is one, else `model-00001-of-0000n.safetensors`
with an index.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dwindle.storage import write_json

__all__ = ["SHARD_BYTES", "ShardWriter"]

SHARD_BYTES = 5_000_000_000
"""A file is full when the next tensor would take it beyond this."""
_BYTES_PER_ENTRY = 192
"""Room per tensor in the header: a name of up to 80 characters, type, shape and offsets."""
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}


class ShardWriter:
    """Writes into an empty folder; the files have their names at the end of the `with`."""

    def __init__(self, folder: Path, most_tensors: int, shard_bytes: int = SHARD_BYTES) -> None:
        """`most_tensors`: no more are ever added, with names of at most 80 characters."""
        self._folder, self._shard_bytes = folder, shard_bytes
        self._header_bytes = -(-(most_tensors + 1) * _BYTES_PER_ENTRY // 8) * 8
        self._shards: list[list[str]] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, Any] = {}
        self._held_back: dict[str, Tensor] = {}
        self._end = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        assert name not in self._entries, name
        held = sum(other.nbytes for other in self._held_back.values())
        if self._file is not None and self._end + held + tensor.nbytes > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = self._partial(len(self._shards)).open("wb")
            self._file.seek(8 + self._header_bytes)
        if tensor.nbytes % 8:
            self._held_back[name] = tensor.detach().cpu().clone()
            self._entries[name] = None
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        begin, self._end = self._end, self._end + tensor.nbytes
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, self._end],
        }  # fmt: skip
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def _close_shard(self) -> None:
        """Append what was held back and write the header into its place."""
        assert self._file is not None
        for name, tensor in sorted(self._held_back.items(), key=lambda item: -item[1].dtype.itemsize):
            self._append(name, tensor)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes, (len(header), self._header_bytes)
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))
        self._file.close()
        self._shards.append(list(self._entries))
        self._total += self._end
        self._file, self._entries, self._held_back, self._end = None, {}, {}, 0

    def _partial(self, number: int) -> Path:
        return self._folder / f"{number}.unfinished"

    def _finish(self) -> None:
        if self._file is not None:
            self._close_shard()
        count = len(self._shards)
        if count == 1:
            os.replace(self._partial(0), self._folder / "model.safetensors")
            return
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            os.replace(self._partial(number), self._folder / name)
        weight_map = {tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._folder / "model.safetensors.index.json", index)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()
