"""Adapters of an ONNX decoder: graph inputs that a caller may leave out, and the file that fills them.

Every product of a layer's linears gets inputs with a default (I inputs, O outputs, r the rank, free to differ from
product to product and adapter to adapter):

    NAME.lora_a [I, r], NAME.lora_b [r, O]     y = x W^T + (x a) b      default: rank 0, nothing is added
                                               (where several linears are one product, rank 1 and zeros)
    NAME.row_scale [n]                         y = row_scale * (x W^T) + bias + (x a) b      with `dora` only; default
                                               [1.0], n is O or 1

ONNX Runtime's own adapter files (`AdapterFormat`, .onnx_adapter) hold these arrays by name; a session takes one for a
request through `RunOptions.add_active_adapter`, and ONNX Runtime GenAI through `og.Adapters`. The weights of the base
are not touched, and one session serves any number of adapters.

Linears that are one product in the graph (q, k and v; gate and up) read one x, so their A stand side by side in one
input, [I, k r] under the product's name with k linears in it; each has a `lora_b` under its own name. Their ranks are
one, a smaller one filled up with zeros:

    x a = [x A_q^T  x A_k^T  x A_v^T],  split;    y = x W^T + [(x A_q^T) b_q  (x A_k^T) b_k  (x A_v^T) b_v]

Decoding reads all of an adapter for each token, so its bytes are what it costs: B as blocks of one matrix, zero
elsewhere, saves two operators and reads half as much again (docs/experiments.md).
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
        graph, rank = self.graph, f"{label}.rank"
        self.products[label] = {"inputs": inputs, "parts": dict(parts)}
        if self.scales_rows:
            scale = graph.overridable(f"{label}.row_scale", [f"{label}.rows"], torch.ones(1))
            y = graph.op("Mul", y, scale, name=f"{label}.adapter")
            y = graph.op("Add", y, bias, name=label) if bias else y
        name, count = f"{label}.adapter", len(parts)
        least = 0 if count == 1 else 1  # the runtime does not split nothing into parts
        a = graph.overridable(f"{label}.lora_a", [inputs, f"{label}.ranks"], torch.zeros(inputs, least * count))
        low = [graph.op("MatMul", x, a, name=name)]
        if count > 1:
            low = graph.ops("Split", count, low[0], name=name, axis=-1, num_outputs=count)
        changes = []
        for one, (part, width) in zip(low, parts.items(), strict=True):
            b = graph.overridable(f"{part}.lora_b", [rank, width], torch.zeros(least, width))
            changes.append(graph.op("MatMul", one, b, name=name))
        change = changes[0] if count == 1 else graph.op("Concat", *changes, name=name, axis=-1)
        return graph.op("Add", y, change, name=name)


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
        rank = max(len(one.a) for one in found.values())
        a, scales = np.zeros((product["inputs"], len(parts) * rank), _FLOAT), []
        for place, (name, width) in enumerate(parts.items()):
            b, scale = np.zeros((rank, width), _FLOAT), np.ones(width, _FLOAT)
            if name in found:
                one = found[name]
                begin, own = place * rank, len(one.a)
                a[:, begin : begin + own], b[:own] = one.a.T.numpy(), one.b.T.numpy()
                scale = scale if one.row_scale is None else one.row_scale.numpy()
            arrays[f"{name}.lora_b"] = b
            scales.append(scale)
        arrays[f"{label}.lora_a"] = a
        if any(one.row_scale is not None for one in found.values()):
            arrays[f"{label}.row_scale"] = np.concatenate(scales)
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
