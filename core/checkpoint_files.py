"""Is this folder a checkpoint that can be trusted to load? Answered before a byte of weights is read. Torch-free.

A safetensors file is: 8 bytes little-endian header length, that many bytes of JSON naming each tensor's dtype, shape
and byte range, then the ranges one after the other, without holes (github.com/huggingface/safetensors, "Format").
So a truncated or padded file, overlapping ranges and a shape that does not match its bytes are all seen in the header.
Pickles (`*.bin`, `*.pt`) run code when opened and are never read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import UnsupportedModel, offenders
from dwindle.storage import read_json

__all__ = ["CheckpointFiles", "StoredTensor", "inspect_checkpoint", "read_config", "read_header"]

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
_LARGEST_HEADER_BYTES = 100_000_000
_LONGEST_NAME = 200
_MOST_AXES, _LARGEST_SIZE = 16, 1 << 50
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHER_FORMATS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.mlpackage", "*.npz")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@dataclass(frozen=True)
class CheckpointFiles:
    """The weight files of a checkpoint, all valid, and the tensors in them."""

    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]

    def float_dtype(self) -> str:
        """Return the dtype (as safetensors names it) that holds most bytes among F32, F16 and BF16; F32 if none."""
        held = dict.fromkeys(("F32", "F16", "BF16"), 0)
        for tensor in self.tensors.values():
            if tensor.dtype in held:
                held[tensor.dtype] += tensor.bytes
        return max(held, key=lambda name: held[name])


def inspect_checkpoint(folder: Path) -> CheckpointFiles:
    """Return the validated weight files of a checkpoint folder, or raise UnsupportedModel naming every offender."""
    files = _weight_files(folder)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            header = read_header(folder / file)
        except UnsupportedModel as error:
            problems.append(str(error))
            continue
        problems += [
            f"{file}: tensor {name} is also in {tensors[name].file}" for name in sorted(header.keys() & tensors.keys())
        ]
        tensors.update(header)
    if not problems:
        problems = _index_problems(folder, files, tensors)
    if problems:
        raise UnsupportedModel(
            f"{folder}: {len(problems)} problems with the weights: {offenders(problems)}. "
            "Copy or download the checkpoint again."
        )
    return CheckpointFiles(folder, tuple(files), tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint folder as a dict, or raise UnsupportedModel."""
    path = folder / "config.json"
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").exists()
        adapter = " It holds an adapter; give its base model instead." if is_adapter else ""
        raise UnsupportedModel(
            f"{folder} is no model folder: it has no config.json.{adapter} "
            "A Hugging Face folder with config.json, *.safetensors and a tokenizer is needed."
        )
    config = _read_json(path)
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{path} holds no JSON object. Copy or download the checkpoint again.")
    return config


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} is no valid JSON ({error}). Copy or download the checkpoint again.") from error


def _weight_files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UnsupportedModel(
            f"{folder} holds pickled weights only: {offenders(pickles)}. Pickles run code when opened, so they are "
            "never read. Convert them where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder, safe_serialization=True)."
        )
    found = sorted(p.name for pattern in (*_OTHER_FORMATS, "*.safetensors") for p in folder.glob(pattern))
    held = f" Found {offenders(found)}, which is no Hugging Face checkpoint." if found else ""
    raise UnsupportedModel(f"{folder} has neither {_SINGLE} nor {_INDEX}.{held} Give a folder with safetensors.")


def _indexed_files(folder: Path) -> list[str]:
    index = _read_json(folder / _INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModel(f"{folder / _INDEX} has no weight_map. Copy or download the checkpoint again.")
    names = sorted({str(file) for file in weight_map.values()})
    outside = [name for name in names if not _is_plain_name(name)]
    if outside:
        raise UnsupportedModel(
            f"{folder / _INDEX} names files outside the folder: {offenders(outside)}. "
            "Every shard must be a *.safetensors file beside the index; do not use this checkpoint."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnsupportedModel(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {offenders(missing)}. "
            "Copy or download the checkpoint again."
        )
    return names


def _is_plain_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and len(name) < _LONGEST_NAME
        and not any(c in name for c in "/\\\0")
        and not name.startswith(".")
    )


def _index_problems(folder: Path, files: list[str], tensors: Mapping[str, StoredTensor]) -> list[str]:
    if files == [_SINGLE] or not (folder / _INDEX).is_file():
        return []
    weight_map = _read_json(folder / _INDEX)["weight_map"]
    return [
        f"{_INDEX} places {name} in {file}, which does not hold it"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if twice:
        raise ValueError(f"names {offenders(twice)} twice")
    return dict(pairs)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file names, after checking that its bytes are exactly theirs."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
        if start.startswith(b"version "):
            raise UnsupportedModel(f"{path.name} is a Git LFS pointer, not weights (run: git lfs pull)")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER_BYTES):
            raise UnsupportedModel(
                f"{path.name} is truncated or no safetensors file ({size:,} bytes, header of {length:,} announced)"
            )
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path.name}: the header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise UnsupportedModel(f"{path.name}: the header is no JSON object")
    header.pop("__metadata__", None)
    ranges = {name: _entry_range(path.name, name, entry) for name, entry in header.items()}
    _require_contiguous(path.name, ranges, size - 8 - length)
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), ranges[name][1] - ranges[name][0], path.name)
        for name, entry in header.items()
    }


def _entry_range(file: str, name: str, entry: Any) -> tuple[int, int]:
    """Return a tensor's (begin, end) within the data, after checking them against its dtype and shape."""
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        whole = len(shape) <= _MOST_AXES and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST_SIZE for n in (*shape, begin, end)
        )
    except (TypeError, KeyError, ValueError) as error:
        raise UnsupportedModel(f"{file}: the header's entry for {name} is malformed") from error
    if not whole or dtype not in _BITS:
        raise UnsupportedModel(
            f"{file}: {name} has dtype {dtype!r:.40} and shape {shape!r:.80}, which is no known tensor"
        )
    if end - begin != math.prod(shape) * _BITS[dtype] // 8:
        raise UnsupportedModel(f"{file}: {name} is {dtype} {shape} but has {end - begin:,} bytes")
    return begin, end


def _require_contiguous(file: str, ranges: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != position:
            raise UnsupportedModel(f"{file}: {name} begins at byte {begin:,} where {position:,} is needed")
        position = end
    if position != data_bytes:
        kind = "truncated" if position > data_bytes else "padded"
        raise UnsupportedModel(f"{file} is {kind}: {position:,} bytes of weights announced, {data_bytes:,} found")
