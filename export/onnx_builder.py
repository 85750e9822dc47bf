"""A small tape that writes an ONNX graph: operators, named weights, inputs and outputs.

Why the graph is authored here and not traced with torch.onnx.export: authoring a decoder takes a second instead of
11 to 16, does not change with the exporter's version, keeps the names of the checkpoint, puts our codes into
MatMulNBits unchanged (a trace turns them into Cast, Sub, Mul), and streams weights to disk one by one.

Opset 23 (ONNX 1.18, ONNX Runtime 1.23 and later) has the three operators a decoder is made of: `Attention` with
grouped heads, mask, soft cap and KV cache, `RotaryEmbedding` and `RMSNormalization`.
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
    torch.int64: TensorProto.INT64,
}

Dims = Sequence[int | str]
"""Fixed sizes, and the names of dynamic ones."""


class GraphBuilder:
    """Collects nodes and weights; `save` writes the model. A context manager, so that the data file gets closed."""

    def __init__(self, path: Path, *, external_data: bool) -> None:
        self.path = path
        self._data_path = path.with_name(path.name + ".data")
        self._data = self._data_path.open("wb") if external_data else None
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._counts: dict[str, int] = {}

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._data is not None:
            self._data.close()

    def input(self, name: str, kind: int, dims: Dims) -> str:
        """Declare a graph input; return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def output(self, value: str, name: str, kind: int, dims: Dims) -> None:
        """Declare `value` as a graph output of that name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, kind, dims))

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        return self.ops(kind, 1, *inputs, name=name, domain=domain, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, name: str = "", domain: str = "",
            **attributes: Any) -> list[str]:  # fmt: skip
        """Add a node with several outputs; return their names."""
        label = self._unique(f"{name}/{kind}" if name else kind)
        found = [label if i == 0 else f"{label}:{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), found, name=label, domain=domain, **attributes))
        return found

    def ints(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        name = "ints/" + "_".join(map(str, values))
        return self.weight(name, lambda: torch.tensor(values, dtype=torch.int64))

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
        if name not in self._initializers:
            self._initializers[name] = self._tensor(name, make().detach().cpu().contiguous())
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
        """Write the model, check it, and record `metadata` in it."""
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs,
                                  list(self._initializers.values()))  # fmt: skip
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dwindle",
                                  producer_version=dwindle.__version__)  # fmt: skip
        helper.set_model_props(model, metadata)
        if self._data is not None:
            self._data.flush()
        onnx.save_model(model, str(self.path))
        onnx.checker.check_model(str(self.path))

    def _unique(self, label: str) -> str:
        count = self._counts.get(label, 0)
        self._counts[label] = count + 1
        return f"{label}_{count}" if count else label

    def _tensor(self, name: str, tensor: Tensor) -> Any:
        array = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=list(tensor.shape))
        if self._data is None or array.nbytes <= _SMALL_BYTES:
            proto.raw_data = array.tobytes()
            return proto
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT_BYTES))
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data_path.name), ("offset", self._data.tell()), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(array).data.cast("B"))
        return proto
