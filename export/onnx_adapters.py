"""Adapters of an ONNX decoder: graph inputs that a caller may leave out, and the file that fills them.

Every product of a layer's linears gets two inputs with a default, and with `dora` a third (I inputs, O outputs, r the
rank, free to differ from product to product and adapter to adapter):

    NAME.lora_a [I, r], NAME.lora_b [r, O]     y = x W^T + (x a) b      default r = 0: nothing is added
    NAME.row_scale [n]                         y = row_scale * (x W^T) + bias + (x a) b      default [1.0]; n is O or 1

ONNX Runtime's own adapter files (`AdapterFormat`, .onnx_adapter) hold these arrays by name; a session takes one for a
request through `RunOptions.add_active_adapter`, and ONNX Runtime GenAI through `og.Adapters`. The weights of the base
are not touched, and one session serves any number of adapters.

Linears that are one product in the graph (q, k and v; gate and up) have one pair of inputs. Their adapters are packed
into it, A side by side and B as blocks, zero elsewhere, so that an adapter costs three operators a product whatever it
changes:

    a = [A_q^T  A_k^T  A_v^T]        b = | B_q^T   0      0    |
                                         |  0     B_k^T   0    |
                                         |  0      0     B_v^T |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dwindle.export.onnx_builder import GraphBuilder
    from dwindle.export.options import AdapterInputs
    from dwindle.low_rank import Factors

__all__ = ["ADAPTER_FILE", "AdapterProducts", "model_version", "packed_arrays", "read_adapter_file",
           "write_adapter_file"]  # fmt: skip

ADAPTER_FILE = "adapter.onnx_adapter"
"""Name of ONNX Runtime's file inside an adapter's folder."""
_VERSION = 1
_FLOAT = "float32"


class AdapterProducts:
    """Declares the inputs while a graph is written, and remembers which linears each product holds."""

    def __init__(self, graph: GraphBuilder, kind: AdapterInputs, linears: Sequence[str]) -> None:
        self.graph, self.kind, self._linears = graph, kind, frozenset(linears)
        self.products: dict[str, dict[str, Any]] = {}
        """Name -> {"inputs": I, "parts": {linear: O}}: what `packed_arrays` needs."""

    def takes(self, names: Sequence[str]) -> bool:
        """Return whether the product of these linears has inputs for adapters."""
        return self.kind != "none" and self._linears.issuperset(names)

    @property
    def scales_rows(self) -> bool:
        """Return whether a product's bias is to be added after the row scale."""
        return self.kind == "dora"

    def added(self, x: str, y: str, bias: str, label: str, inputs: int, parts: Mapping[str, int]) -> str:
        """Return the product y of x with an adapter's change; a `bias` that y is still without comes last."""
        graph, outputs, rank = self.graph, sum(parts.values()), f"{label}.rank"
        self.products[label] = {"inputs": inputs, "parts": dict(parts)}
        if self.scales_rows:
            scale = graph.overridable(f"{label}.row_scale", [f"{label}.rows"], torch.ones(1))
            y = graph.op("Mul", y, scale, name=f"{label}.adapter")
            y = graph.op("Add", y, bias, name=label) if bias else y
        a = graph.overridable(f"{label}.lora_a", [inputs, rank], torch.zeros(inputs, 0))
        b = graph.overridable(f"{label}.lora_b", [rank, outputs], torch.zeros(0, outputs))
        low = graph.op("MatMul", x, a, name=f"{label}.adapter")
        return graph.op("Add", y, graph.op("MatMul", low, b, name=f"{label}.adapter"), name=f"{label}.adapter")


def packed_arrays(
    products: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Factors]
) -> dict[str, NDArray[np.float32]]:
    """Return the inputs of one adapter by name; a product that it does not change keeps its defaults."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for label, product in products.items():
        parts: dict[str, int] = product["parts"]
        found = {name: changes[name] for name in parts if name in changes}
        if not found:
            continue
        rank, begin, row = sum(len(one.a) for one in found.values()), 0, 0
        a, b = np.zeros((product["inputs"], rank), _FLOAT), np.zeros((rank, sum(parts.values())), _FLOAT)
        scale = np.ones(b.shape[1], _FLOAT)
        for name, width in parts.items():
            if name in found:
                one = found[name]
                end = begin + len(one.a)
                a[:, begin:end], b[begin:end, row : row + width] = one.a.T.numpy(), one.b.T.numpy()
                if one.row_scale is not None:
                    scale[row : row + width] = one.row_scale.numpy()
                begin = end
            row += width
        arrays |= {f"{label}.lora_a": a, f"{label}.lora_b": b}
        if any(one.row_scale is not None for one in found.values()):
            arrays[f"{label}.row_scale"] = scale
    return arrays


def model_version(base_sha256: str) -> int:
    """Return the number by which an adapter file names its base: the first 31 bits of the hash.

    >>> model_version("80000001" + 56 * "0")
    1
    """
    return int(base_sha256[:8], 16) & 0x7FFFFFFF


def write_adapter_file(path: Path, arrays: Mapping[str, NDArray[np.float32]], base_sha256: str) -> None:
    """Write ONNX Runtime's adapter file."""
    import onnxruntime

    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(_VERSION)
    made.set_model_version(model_version(base_sha256))
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    made.export_adapter(str(path))


def read_adapter_file(path: Path) -> tuple[dict[str, Any], int]:
    """Return (values by input, model version) of ONNX Runtime's adapter file."""
    import onnxruntime

    found = onnxruntime.AdapterFormat.read_adapter(str(path))
    return dict(found.get_parameters()), int(found.get_model_version())
