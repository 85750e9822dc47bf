"""A saved Core ML package read from disk: its functions as plain Python, its constants as numpy arrays.

The specification is a protobuf message (Apple's MIL.proto): a program has functions, a function one block of
operations for its operator set, an operation named inputs, each a value computed before or an immediate one. Large
constants lie in weight.bin: at the offset that a value names stands a header of 64 bytes (uint32 0xDEADBEEF, uint32
type, uint64 size, uint64 offset of the data), and codes narrower than a byte are packed without gaps, the first in the
lowest bits. The file is mapped, so only what is used is read.

coremltools serves for the message's classes alone. Its own reader builds its compiler's objects: that takes seconds,
needs every operation to be one it knows, and loses which constants two functions share.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dwindle.bit_packing import unpack_bits
from dwindle.errors import OutputError
from dwindle.export.coreml_files import WEIGHTS_FILE, read_specification

__all__ = ["Constant", "MilFunction", "MilOperation", "Value", "read_functions"]

_TYPES: dict[str, tuple[str, int]] = {
    "FLOAT16": ("float16", 16), "FLOAT32": ("float32", 32), "FLOAT64": ("float64", 64),
    "INT8": ("int8", 8), "INT16": ("int16", 16), "INT32": ("int32", 32), "INT64": ("int64", 64), "INT4": ("int8", 4),
    "UINT8": ("uint8", 8), "UINT16": ("uint16", 16), "UINT32": ("uint32", 32), "UINT64": ("uint64", 64),
    "UINT1": ("uint8", 1), "UINT2": ("uint8", 2), "UINT3": ("uint8", 3), "UINT4": ("uint8", 4), "UINT6": ("uint8", 6),
    "BOOL": ("bool", 8),
}  # fmt: skip
"""A type's name in MIL -> numpy's type to hold it, and the bits a number has in the file."""
_LIST = "values"
"""The argument that is a list even of one (concat, stack)."""
_SENTINEL = 0xDEADBEEF
_HEADER = struct.Struct("<IIQQ")


@dataclass(frozen=True)
class Constant:
    """A value that stands in the package. Constants with equal keys are the same."""

    value: Any
    key: Hashable


class Value(str):
    """The name of a value that is computed, given, or a state."""


@dataclass(frozen=True)
class MilOperation:
    """One operation as it was saved."""

    kind: str
    inputs: Mapping[str, Any]
    """Name -> a `Constant`, a `Value`, or a list of them."""
    outputs: tuple[str, ...]
    is_float16: bool
    """Its first output is declared as float16."""


@dataclass(frozen=True)
class MilFunction:
    """One function of a package."""

    operations: tuple[MilOperation, ...]
    inputs: Mapping[str, tuple[int | None, ...]]
    """Name -> shape, with None for a length that is free."""
    states: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int | None, ...]]
    blocks: tuple[str, ...] = ()
    """Operations with blocks of their own (loops, branches), which nothing here computes."""


def read_functions(package: Path) -> dict[str, MilFunction]:
    """Return all functions of a saved .mlpackage.

    Raises OutputError if it is no readable mlprogram, MissingExtra without coremltools.
    """
    message = read_specification(package)
    if message.WhichOneof("Type") != "mlProgram":
        raise OutputError(f"{package} holds a {message.WhichOneof('Type') or 'damaged'} model, an mlprogram is needed. "
                          "Give one that a coreml export wrote.")  # fmt: skip
    weights = _WeightFile(package / WEIGHTS_FILE)
    try:
        functions = sorted(message.mlProgram.functions.items())  # a message's map has no order of its own
        return {name: _function(body, weights) for name, body in functions}
    except (KeyError, ValueError, IndexError, struct.error) as error:
        raise OutputError(f"{package} cannot be read ({type(error).__name__}: {error}). It is damaged or no "
                          "mlprogram; export it again.") from error  # fmt: skip


class _WeightFile:
    """weight.bin, mapped when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: memoryview | None = None

    def read(self, offset: int) -> NDArray[np.uint8]:
        """Return the bytes of the constant whose header stands at `offset`."""
        if self._mapped is None:
            if not self.path.is_file():
                raise ValueError(f"{self.path.name} is missing")
            with self.path.open("rb") as file:
                self._mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        sentinel, _, size, begin = _HEADER.unpack_from(self._mapped, offset)
        if sentinel != _SENTINEL or begin + size > len(self._mapped):
            raise ValueError(f"{self.path.name} holds no constant at {offset}")
        return np.frombuffer(self._mapped, np.uint8, size, begin)


def _function(body: Any, weights: _WeightFile) -> MilFunction:
    if body.opset not in body.block_specializations:
        raise ValueError(f"no operations for {body.opset!r}")
    block = body.block_specializations[body.opset]
    known: dict[str, Constant] = {}
    operations: list[MilOperation] = []
    shapes: dict[str, tuple[int | None, ...]] = {}
    nested = []
    for op in block.operations:
        shapes.update((output.name, _shape(output.type)) for output in op.outputs)
        if op.type == "const":
            known[op.outputs[0].name] = _constant(op.attributes["val"], weights)
            continue
        nested += [op.type] * bool(op.blocks)
        inputs = {name: _argument(name, argument, known, weights) for name, argument in op.inputs.items()}
        if op.type.startswith("constexpr_"):  # before iOS 18 their inputs were attributes
            inputs |= {name: _constant(value, weights) for name, value in op.attributes.items() if name != "name"}
        operations.append(MilOperation(op.type, inputs, tuple(str(output.name) for output in op.outputs),
                                       bool(op.outputs) and _type_name(op.outputs[0].type) == "FLOAT16"))  # fmt: skip
    given = {feature.name: feature.type for feature in body.inputs}
    shapes.update((name, _shape(kind)) for name, kind in given.items())
    states = {name: _sizes(kind.stateType.wrappedType) for name, kind in given.items() if _is_state(kind)}
    return MilFunction(
        operations=tuple(_constant_outputs(operations, known, block.outputs)), states=states,
        inputs={name: _shape(kind) for name, kind in given.items() if name not in states},
        outputs={str(name): shapes[name] for name in block.outputs}, blocks=tuple(sorted(set(nested))),
    )  # fmt: skip


def _constant_outputs(
    operations: list[MilOperation], known: Mapping[str, Constant], outputs: list[str]
) -> Iterator[MilOperation]:
    """Yield the operations, and one more for each output that is a constant itself."""
    yield from operations
    for name in outputs:
        if name in known:
            yield MilOperation("identity", {"x": known[name]}, (str(name),), is_float16=False)


def _argument(name: str, argument: Any, known: Mapping[str, Constant], weights: _WeightFile) -> Any:
    values = [
        (known.get(binding.name) or Value(binding.name)) if binding.WhichOneof("binding") == "name"
        else _constant(binding.value, weights)
        for binding in argument.arguments
    ]  # fmt: skip
    return values if len(values) != 1 or name == _LIST else values[0]


def _constant(value: Any, weights: _WeightFile) -> Constant:
    """Return a value as numpy or Python has it, with a key that tells equal ones."""
    kind, shape = _type_name(value.type), _sizes(value.type)
    if value.WhichOneof("value") == "blobFileValue":
        offset = int(value.blobFileValue.offset)
        return Constant(_numbers(weights.read(offset), kind, shape), (offset, kind, shape))
    immediate = value.immediateValue
    if immediate.WhichOneof("value") != "tensor":
        items = [_constant(item, weights) for item in immediate.list.values]
        return Constant([item.value for item in items], tuple(item.key for item in items))
    tensor = immediate.tensor
    field = tensor.WhichOneof("value") or "ints"
    stored = getattr(tensor, field).values
    if field == "strings":
        texts = [str(text) for text in stored]
        return Constant(texts[0] if not shape else texts, tuple(texts))
    if field == "bytes":
        numbers = _numbers(np.frombuffer(stored, np.uint8), kind, shape)
    else:
        numbers = np.array(list(stored), _TYPES[kind][0]).reshape(shape)
    plain = numbers if shape else numbers[()]
    return Constant(plain, (kind, shape, numbers.tobytes()))


def _numbers(stored: NDArray[np.uint8], kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return stored bytes as an array of that type and shape; codes are spread to one a byte."""
    dtype, bits = _TYPES[kind]
    count = int(np.prod(shape, dtype=np.int64))
    if bits < 8:
        codes: NDArray[Any] = unpack_bits(torch.from_numpy(stored.copy()), bits, count).numpy().reshape(shape)
        if dtype == "int8":
            codes = (codes.view(np.int8) ^ (1 << bits - 1)) - np.int8(1 << bits - 1)
        return codes
    if stored.nbytes * 8 < count * bits:
        raise ValueError(f"{stored.nbytes} bytes are stored for {count} numbers of {bits} bits")
    return stored[: count * bits // 8].view(dtype).reshape(shape)


def _is_state(kind: Any) -> bool:
    return bool(kind.WhichOneof("type") == "stateType")


def _tensor(kind: Any) -> Any:
    wrapped = kind.stateType.wrappedType if _is_state(kind) else kind
    return wrapped.tensorType


def _type_name(kind: Any) -> str:
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(_tensor(kind).dataType))


def _shape(kind: Any) -> tuple[int | None, ...]:
    return tuple(int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None
                 for d in _tensor(kind).dimensions)  # fmt: skip


def _sizes(kind: Any) -> tuple[int, ...]:
    return tuple(int(dimension.constant.size) for dimension in _tensor(kind).dimensions)
