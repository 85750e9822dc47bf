"""The products of an ONNX decoder: linears, embedding and head, float or in our integer codes.

Linears that read the same input become one product where all of them are alike (float, or codes of the same form): one
kernel call instead of two or three. Their rows stand below each other, so every code stays what it was.

Float weights are stored in the checkpoint's own type, quantized ones as their codes (see `onnx_quantized`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from onnx import TensorProto
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.export.onnx_adapters import AdapterProducts
from dwindle.export.onnx_builder import GraphBuilder
from dwindle.export.onnx_quantized import gather, matmul
from dwindle.export.options import Activations
from dwindle.quantized_model import QuantizedEmbedding, QuantizedLinear, TiedHead
from dwindle.weights import AffineWeight

__all__ = ["Linears", "parameter"]

_FLOAT = TensorProto.FLOAT


class Linears:
    """Adds a bundle's products to a graph."""

    def __init__(
        self, bundle: ModelBundle, graph: GraphBuilder, activations: Activations, adapters: AdapterProducts
    ) -> None:
        self.bundle, self.graph, self.activations, self.adapters = bundle, graph, activations, adapters
        self.anatomy = bundle.anatomy

    def product(self, x: str, name: str) -> str:
        """Return x W^T + b of the linear of that name."""
        return self.packed(x, [name], name)

    def alike(self, names: Sequence[str]) -> bool:
        """Return whether these linears can be one product."""
        modules = [self.bundle.model.get_submodule(name) for name in names]
        forms = {_form(module) for module in modules}
        return len(forms) == 1

    def packed(self, x: str, names: Sequence[str], label: str) -> str:
        """Return the products of alike linears side by side, [B, T, sum of O], from one operator named `label`."""
        modules: list[Any] = [self.bundle.model.get_submodule(name) for name in names]
        bias, takes = self._bias(modules, label), self.adapters.takes(names)
        later = bias if takes and self.adapters.scales_rows else ""
        y = self._base(x, names, modules, label, "" if later else bias)
        if not takes:
            return y
        parts = {name: int(module.out_features) for name, module in zip(names, modules, strict=True)}
        return self.adapters.added(x, y, later, label, int(modules[0].in_features), parts)

    def _bias(self, modules: Sequence[Any], label: str) -> str:
        """Return the name of the linears' bias, "" where they have none."""
        if getattr(modules[0], "bias", None) is None:
            return ""
        return self.graph.weight(f"{label}.bias", lambda: torch.cat([cast(Tensor, m.bias) for m in modules]))

    def _base(self, x: str, names: Sequence[str], modules: Sequence[Any], label: str, bias: str) -> str:
        """Return the products without an adapter."""
        graph = self.graph
        if isinstance(modules[0], QuantizedLinear):
            return matmul(graph, x, label, _stacked([_affine(m) for m in modules]), self.activations, bias)
        weight = graph.float_weight(
            f"{label}.weight",
            lambda: torch.cat([parameter(self.bundle, f"{name}.weight") for name in names]).T,
            self.bundle.storage_dtype,
        )
        y = graph.op("MatMul", x, weight, name=label)
        return graph.op("Add", y, bias, name=label) if bias else y

    def products(self, x: str, names: Sequence[str], label: str) -> list[str]:
        """Return the product of each linear: by one operator and a Split if they are alike, else one by one."""
        if not self.alike(names):
            return [self.product(x, name) for name in names]
        widths = [int(cast(Any, self.bundle.model.get_submodule(name)).out_features) for name in names]
        return self.split(self.packed(x, names, label), widths, label)

    def split(self, x: str, widths: Sequence[int], label: str) -> list[str]:
        """Return [B, T, width] parts of the last dimension."""
        return self.graph.ops("Split", len(widths), x, self.graph.ints(*widths), name=label, axis=-1)

    def embedding(self, ids: str) -> str:
        """Return rows [B, T, D] of the embedding, as the checkpoint has them."""
        graph, name = self.graph, self.anatomy.embedding
        module = self.bundle.model.get_submodule(name)
        if isinstance(module, QuantizedEmbedding):
            tied = isinstance(self.bundle.model.get_submodule(self.anatomy.head), TiedHead)
            return gather(graph, ids, name, _affine(module), self.activations, tied=tied)
        table, narrow = self._stored_table(name)
        rows = graph.op("Gather", table, ids, name=name)
        return graph.op("Cast", rows, name=name, to=_FLOAT) if narrow else rows

    def head(self, x: str) -> str:
        """Return logits [B, T, V], before any soft cap."""
        graph, anatomy = self.graph, self.anatomy
        if isinstance(self.bundle.model.get_submodule(anatomy.head), TiedHead):
            embedding = self.bundle.model.get_submodule(anatomy.embedding)
            return matmul(graph, x, anatomy.embedding, _affine(embedding), self.activations)
        if not anatomy.tied:
            return self.product(x, anatomy.head)
        table, narrow = self._stored_table(anatomy.embedding)
        table = graph.op("Cast", table, name=anatomy.head, to=_FLOAT) if narrow else table
        return graph.op("MatMul", x, graph.op("Transpose", table, name=anatomy.head, perm=[1, 0]), name=anatomy.head)

    def _stored_table(self, name: str) -> tuple[str, bool]:
        """Return (name of a float table in its stored type, whether that needs a Cast to float32)."""
        table, storage = parameter(self.bundle, f"{name}.weight"), self.bundle.storage_dtype
        narrow = storage != torch.float32 and torch.equal(table.to(storage).to(torch.float32), table)
        return self.graph.weight(f"{name}.weight", lambda: table.to(storage) if narrow else table), narrow


def parameter(bundle: ModelBundle, name: str) -> Tensor:
    """Return a float parameter of the model in float32, on the CPU."""
    owner, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(bundle.model.get_submodule(owner), leaf)).detach().to("cpu", torch.float32)


def _form(module: Any) -> tuple[Any, ...]:
    """Return what linears must share to be one product."""
    bias = getattr(module, "bias", None) is not None
    if not isinstance(module, QuantizedLinear):
        return ("float", bias)
    return (bias, *(module.spec.get(key) for key in ("kind", "bits", "group_size", "symmetric", "balanced")))


def _affine(module: Any) -> AffineWeight:
    return cast(AffineWeight, module.quantized_weight())


def _stacked(weights: Sequence[AffineWeight]) -> AffineWeight:
    """Return the rows of alike weights below each other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    zeros = None if first.zero_points is None else torch.cat([cast(Tensor, w.zero_points) for w in weights])
    return AffineWeight(torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights]), zeros,
                        first.bits, first.group_size, first.balanced)  # fmt: skip
