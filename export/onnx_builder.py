"""A small tape that writes an ONNX graph: operators, named weights, inputs and outputs.

Why the graph is authored here and not traced with torch.onnx.export: authoring a decoder takes a second instead of
11 to 16, does not change with the exporter's version, keeps the names of the checkpoint, puts our codes into
MatMulNBits unchanged (a trace turns them into Cast, Sub, Mul), and streams weights to disk one by one.

Opset 23 (ONNX 1.18, ONNX Runtime 1.23 and later) has the three operators a decoder is made of: `Attention` with
grouped heads, mask, soft cap and KV cache, `RotaryEmbedding` and `RMSNormalization`.

No copy of the model is ever held: a tensor is written when it is made. With external data its bytes go into the data
file. Without, it becomes a message of its own in the model file, `ModelProto{graph{initializer}}`, and the nodes follow
at the end: by protobuf's rules a concatenation of messages reads as their merge.
(https://protobuf.dev/programming-guides/encoding/#last-one-wins)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

import dwindle
from dwindle.errors import ExportFailed

__all__ = ["MICROSOFT", "OPSETS", "Dims", "GraphBuilder"]

MICROSOFT = "com.microsoft"
OPSETS = {"": 23, MICROSOFT: 1}
IR_VERSION = 11
_ALIGNMENT_BYTES = 4096
_SMALL_BYTES = 1024
"""Tensors up to this size stay inside the graph file even with external data."""
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}

Dims = Sequence[int | str]
"""Fixed sizes, and the names of dynamic ones."""


class GraphBuilder:
    """Collects nodes and writes weights; `save` ends the model file. A context manager, so that files get closed."""

    def __init__(self, path: Path, *, external_data: bool) -> None:
        self.path = path
        self._data_path = path.with_name(path.name + ".data")
        self._file = path.open("wb")
        self._data = self._data_path.open("wb") if external_data else None
        self._nodes: list[Any] = []
        self._stored: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._overridable: set[str] = set()
        self._outputs: list[Any] = []
        self._counts: dict[str, int] = {}

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._file.close()
        if self._data is not None:
            self._data.close()

    def input(self, name: str, kind: int, dims: Dims) -> str:
        """Declare a graph input; return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def overridable(self, name: str, dims: Dims, default: Tensor) -> str:
        """Declare a graph input that a caller may leave out: it is then `default`. Return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[default.dtype], dims))
        self._overridable.add(name)
        return self.weight(name, lambda: default)

    def output(self, value: str, name: str, kind: int, dims: Dims) -> None:
        """Declare `value` as a graph output of that name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, kind, dims))

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        return self.ops(kind, 1, *inputs, name=name, domain=domain, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, name: str = "", domain: str = "",
            unused: tuple[int, ...] = (), **attributes: Any) -> list[str]:  # fmt: skip
        """Add a node with several outputs; return their names, empty for those that nobody wants."""
        label = self._unique(f"{name}/{kind}" if name else kind)
        found = ["" if i in unused else f"{label}:{i}" if i else label for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), found, name=label, domain=domain, **attributes))
        return found

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        name = "ints/" + "_".join(map(str, values))
        return self.weight(name, lambda: torch.tensor(values, dtype=torch.int64))

    def integer(self, value: int) -> str:
        """Return the name of a constant int64 scalar."""
        return self.weight(f"integers/{value}", lambda: torch.tensor(value, dtype=torch.int64))

    def scalar(self, value: float) -> str:
        """Return the name of a constant float32 scalar."""
        return self.weight(f"floats/{value!r}", lambda: torch.tensor(value, dtype=torch.float32))

    def filled(self, name: str, shape: tuple[int, ...], value: float) -> str:
        """Return the name of a tensor of one value that takes no bytes in the file: uint8 for an int, else float32."""
        kind = TensorProto.UINT8 if isinstance(value, int) else TensorProto.FLOAT
        return self.op("ConstantOfShape", self.ints(*shape), name=name,
                       value=helper.make_tensor("value", kind, [1], [value]))  # fmt: skip

    def weight(self, name: str, make: Callable[[], Tensor]) -> str:
        """Return `name` after storing the tensor that `make` gives; a name already stored is not made again."""
        if name not in self._stored:
            tensor = make().detach().cpu().contiguous()
            self._stored[name] = helper.make_tensor_value_info(name, _TYPES[tensor.dtype], list(tensor.shape))
            self._store(name, tensor)
        return name

    def float_weight(self, name: str, make: Callable[[], Tensor], storage: torch.dtype) -> str:
        """Return the name of a float32 value whose tensor is stored in `storage` where that loses nothing.

        A checkpoint kept in 16 bits so stays at two bytes a weight; the Cast is folded when a session is made.
        """
        if f"{name}/Cast" in self._counts:
            return f"{name}/Cast"
        tensor = make().detach().cpu()
        narrow = tensor.to(storage)
        if storage == torch.float32 or not torch.equal(narrow.to(torch.float32), tensor):
            return self.weight(name, lambda: tensor.to(torch.float32))
        return self.op("Cast", self.weight(name, lambda: narrow), name=name, to=TensorProto.FLOAT)

    def save(self, metadata: dict[str, str]) -> None:
        """Check the graph, then write nodes, inputs, outputs and `metadata` behind the weights.

        Raises ExportFailed, with the operator and its module's name, if the graph is not valid ONNX.
        """
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]

        def model(inputs: list[Any]) -> Any:
            graph = helper.make_graph(self._nodes, "decoder", inputs, self._outputs)
            return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dwindle",
                                     producer_version=dwindle.__version__)  # fmt: skip

        try:
            stored = [value for name, value in self._stored.items() if name not in self._overridable]
            onnx.checker.check_model(model([*self._inputs, *stored]))
        except onnx.checker.ValidationError as error:  # names the node, which bears its module's name
            raise ExportFailed(f"onnx {onnx.__version__} refuses the graph of {self.path.name}: {error}") from error
        whole = model(self._inputs)
        helper.set_model_props(whole, metadata)
        self._file.write(whole.SerializeToString(deterministic=True))
        self._file.flush()
        if self._data is not None:
            self._data.flush()

    def _unique(self, label: str) -> str:
        count = self._counts.get(label, 0)
        self._counts[label] = count + 1
        return f"{label}_{count}" if count else label

    def _store(self, name: str, tensor: Tensor) -> None:
        array = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=list(tensor.shape))
        if self._data is None or array.nbytes <= _SMALL_BYTES:
            proto.raw_data = array.tobytes()
        else:
            self._data.write(bytes(-self._data.tell() % _ALIGNMENT_BYTES))
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": self._data_path.name, "offset": self._data.tell(), "length": array.nbytes}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            self._data.write(np.ascontiguousarray(array).data.cast("B"))
        message = onnx.ModelProto(graph=onnx.GraphProto(initializer=[proto]))
        self._file.write(message.SerializeToString(deterministic=True))
