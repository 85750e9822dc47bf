"""Several saved programs as the functions of one package, constants that are equal stored once.

`coremltools.utils.save_multifunction` does the same through its compiler's objects: it reads all weights of all
programs back into memory, 7 bytes a weight at its peak for 4-bit palettes, and takes a third of a conversion's time.
The message needs neither. A function is copied as it stands; its constants name places in its own weight.bin, and those
are looked up in the first program's file, where decode finds every weight of prefill. A test holds the result to that
of coremltools.

weight.bin: a header of 64 bytes (uint32 count, uint32 version), then for each constant a header of 64 bytes
(uint32 0xDEADBEEF, uint32 type, uint64 size, uint64 offset of the data, uint64 unused bits at its end) and its data,
each begun at a multiple of 64.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dwindle.export.coreml_files import SPECIFICATION_FILE, WEIGHTS_FILE, read_specification

__all__ = ["merge_functions"]

_MAIN = "main"
_ALIGNMENT = 64
_FILE_HEADER, _HEADER = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x")
_COUNT = struct.Struct("<I")
_CHUNK_BYTES = 1 << 22


def merge_functions(packages: Mapping[str, Path], merged: Path, default: str) -> None:
    """Make one package of several: each one's only function under its new name.

    The first package's folder becomes the merged one; the others are left as they are.
    """
    first, *others = packages
    shutil.copytree(packages[first], merged, copy_function=_moved)
    message = read_specification(merged)
    functions = message.mlProgram.functions
    described = message.description
    entries = [_described(described, first)]
    if first != _MAIN:
        functions[first].CopyFrom(functions[_MAIN])
        del functions[_MAIN]
    with (merged / WEIGHTS_FILE).open("r+b") as weights:
        places = {digest: offset for offset, digest in _constants(weights)}
        for name in others:
            other = read_specification(packages[name])
            body = functions[name]
            body.CopyFrom(other.mlProgram.functions[_MAIN])
            with (packages[name] / WEIGHTS_FILE).open("rb") as source:
                moved = {offset: places.get(digest) or places.setdefault(digest, _appended(weights, source, offset))
                         for offset, digest in _constants(source)}  # fmt: skip
            for value in _file_values(body):
                value.blobFileValue.offset = moved[value.blobFileValue.offset]
            entries.append(_described(other.description, name))
    described.ClearField("input")
    described.ClearField("output")
    described.ClearField("state")
    described.functions.extend(entries)
    described.defaultFunctionName = default
    (merged / SPECIFICATION_FILE).write_bytes(message.SerializeToString(deterministic=True))


def _moved(source: str, target: str) -> str:
    """Move a file: the first package is not needed again, and its weights may be large."""
    return str(shutil.move(source, target))


def _described(description: Any, name: str) -> Any:
    """Return the inputs, outputs and states of a program as those of a function."""
    from coremltools.proto import Model_pb2

    return Model_pb2.FunctionDescription(name=name, input=description.input, output=description.output,
                                         state=description.state)  # fmt: skip


def _file_values(function: Any) -> Iterator[Any]:
    """Yield every value of a function that names a place in the weight file."""
    for block in function.block_specializations.values():
        for op in block.operations:
            bound = [binding.value for argument in op.inputs.values() for binding in argument.arguments
                     if binding.WhichOneof("binding") == "value"]  # fmt: skip
            for value in (*op.attributes.values(), *bound):
                if value.WhichOneof("value") == "blobFileValue":
                    yield value


def _constants(weights: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset of its header, hash of its type and data) of each constant of a weight file."""
    weights.seek(0)
    count, _ = _FILE_HEADER.unpack(weights.read(_FILE_HEADER.size))
    offset = _FILE_HEADER.size
    for _ in range(count):
        weights.seek(offset)
        _, kind, size, begin, unused = _HEADER.unpack(weights.read(_HEADER.size))
        digest = hashlib.sha256(struct.pack("<IQQ", kind, size, unused))
        weights.seek(begin)
        for left in range(size, 0, -_CHUNK_BYTES):
            digest.update(weights.read(min(left, _CHUNK_BYTES)))
        yield offset, digest.digest()
        offset = _aligned(begin + size)


def _appended(weights: IO[bytes], source: IO[bytes], offset: int) -> int:
    """Copy a constant of another file to the end of `weights`; return the offset of its header."""
    source.seek(offset)
    sentinel, kind, size, begin, unused = _HEADER.unpack(source.read(_HEADER.size))
    place = _aligned(weights.seek(0, 2))
    weights.write(bytes(place - weights.tell()))
    weights.write(_HEADER.pack(sentinel, kind, size, place + _HEADER.size, unused))
    source.seek(begin)
    for left in range(size, 0, -_CHUNK_BYTES):
        weights.write(source.read(min(left, _CHUNK_BYTES)))
    weights.write(bytes(_aligned(weights.tell()) - weights.tell()))
    weights.seek(0)
    (count,) = _COUNT.unpack(weights.read(_COUNT.size))
    weights.seek(0)
    weights.write(_COUNT.pack(count + 1))
    return place


def _aligned(offset: int) -> int:
    """Return the next multiple of 64.

    >>> _aligned(64), _aligned(65)
    (64, 128)
    """
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
