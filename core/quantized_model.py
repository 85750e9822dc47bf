"""A transformers model whose linear layers and embedding hold packed codes instead of floats.

The modules keep the packed bytes and the fp16 tables of `dwindle.weights` as buffers and rebuild the float32 weight
for every call, so a model weighs in memory what it weighs on disk; `cache_dense(model)` trades that memory for speed
and changes no bit of any result. Computation is float32.

On disk the buffers stand where the float weight stood (`model.layers.0.mlp.up_proj.indices`, `.palettes`), and
config.json gains a `quantization_config` that says how to read them:

    {"quant_method": "dwindle", "version": 1, "tied": {"lm_head": "model.embed_tokens"},
     "modules": {"model.layers.0.mlp.up_proj": {"role": "linear", "kind": "palettized", "bits": 4, ...}, ...}}

A head tied to the embedding has no tensors: it reads the embedding's codes, so they are stored and counted once.
`dwindle.transformers_quantizer` teaches stock `from_pretrained` to read such a folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwindle.bit_packing import unpack_bits
from dwindle.errors import UnsupportedModel, offenders
from dwindle.weights import QuantizedWeight, centre_of, packed_shapes, weight_from_tensors

__all__ = [
    "QUANT_METHOD",
    "PackedModule",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "TiedHead",
    "apply_quantized_weights",
    "cache_dense",
    "is_quantized",
    "packed_buffer_names",
    "packed_specs",
    "quantization_config",
    "quantized_weights",
    "replace_modules",
]

QUANT_METHOD = "dwindle"
VERSION = 1


class PackedModule(nn.Module):
    """Base of the two modules: packed buffers, the spec they are read with, and the dense weight on demand."""

    def __init__(self, spec: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.cache_dense = False
        self._dense: Tensor | None = None
        for name, (shape, dtype) in packed_shapes(spec).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    def fill(self, weight: QuantizedWeight) -> None:
        """Take over the codes of a weight whose spec this module was built with, on this module's device."""
        for name, tensor in weight.to_tensors().items():
            self._buffers[name] = tensor.to(cast(Tensor, self._buffers[name]).device, copy=True)
        self._dense = None

    def packed(self) -> dict[str, Tensor]:
        """Return the buffers by short name, in the order of `packed_shapes`."""
        return {name: cast(Tensor, self._buffers[name]) for name in packed_shapes(self.spec)}

    def quantized_weight(self) -> QuantizedWeight:
        """Return the unpacked weight; its codes are new tensors, its tables are this module's."""
        return weight_from_tensors(self.packed(), self.spec)

    @property
    def weight(self) -> Tensor:
        """Return the dense float32 weight: rebuilt at every call, or kept after the first with `cache_dense`."""
        if self._dense is not None:
            return self._dense
        if not self.cache_dense:
            return self.quantized_weight().dequantize()
        with torch.inference_mode(False):  # a tensor made in inference mode could not serve a backward pass later
            self._dense = self.quantized_weight().dequantize()
        return self._dense

    def restore_tables(self) -> None:
        """Take the tables back to fp16. Loaders cast floats to the compute dtype; fp16 -> fp32 -> fp16 is exact."""
        for name, (_, dtype) in packed_shapes(self.spec).items():
            self._buffers[name] = cast(Tensor, self._buffers[name]).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModule:
        """Move the buffers between devices but never cast the tables: `.float()` and `.half()` leave them alone."""
        as_integers = {name: b.view(torch.int16) for name, b in self.packed().items() if b.dtype == torch.float16}
        self._buffers.update(as_integers)
        self._dense = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in as_integers:
            self._buffers[name] = cast(Tensor, self._buffers[name]).view(torch.float16)
        return self

    def extra_repr(self) -> str:
        """Return the shape and the format for `print(model)`."""
        outputs, inputs = self.spec["shape"]
        return (
            f"{outputs}x{inputs}, {self.spec['kind']}, bits={self.spec['bits']}, group_size={self.spec['group_size']}"
        )


class QuantizedLinear(PackedModule):
    """y = x W^T + b with a packed W. The bias, if any, is an ordinary parameter."""

    def __init__(self, spec: Mapping[str, Any], bias: bool, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device)
        self.out_features, self.in_features = spec["shape"]
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device)) if bias else None

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
        """Return a layer with these codes and this bias (copied)."""
        layer = cls(weight.spec(), bias is not None)
        layer.fill(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for x [..., I], in the dtype of x; a backward pass rebuilds the weight and keeps none."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _PackedProduct.apply(x, self.bias, self))  # type: ignore[no-untyped-call]
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class _PackedProduct(torch.autograd.Function):
    """x W^T + b whose backward pass unpacks W again: what trains on packed codes never holds two dense layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        """Return [..., O]; of the layer only a reference is kept."""
        ctx.layer, ctx.type, ctx.has_bias = layer, x.dtype, bias is not None
        return F.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and of the bias."""
        x = (outer @ ctx.layer.weight.to(outer.dtype)).to(ctx.type) if ctx.needs_input_grad[0] else None
        bias = outer.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        return x, bias, None


class QuantizedEmbedding(PackedModule):
    """Rows of a packed V x D table, times `output_scale` where the module it replaces scales them.

    That scale belongs to the modelling code and not to the checkpoint: transformers 4.57 scales Gemma 2's embedding in
    the decoder, 5.x inside the embedding.
    """

    def __init__(
        self, spec: Mapping[str, Any], output_scale: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        super().__init__(spec, device)
        self.num_embeddings, self.embedding_dim = spec["shape"]
        self.output_scale = output_scale

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, output_scale: float = 1.0) -> QuantizedEmbedding:
        """Return an embedding with these codes."""
        layer = cls(weight.spec(), output_scale)
        layer.fill(weight)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 [..., D] for ids [...]."""
        rows = self._rows(ids) if self._dense is None and not self.cache_dense else F.embedding(ids, self.weight)
        return rows if self.output_scale == 1.0 else rows * self.output_scale

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the rows asked for; where a row starts at a byte, only those rows are unpacked."""
        bits, width, flat = self.spec["bits"], self.embedding_dim, ids.reshape(-1)
        if width * bits % 8 or (self.spec["kind"] == "affine" and not self.spec["symmetric"]):
            return F.embedding(ids, self.weight)
        buffers = self.packed()
        stored = buffers["indices" if self.spec["kind"] == "palettized" else "codes"]
        chosen = stored.view(self.num_embeddings, width * bits // 8)[flat].reshape(-1)
        codes = unpack_bits(chosen, bits, flat.numel() * width).view(flat.numel(), width)
        rows = self._palette_rows if self.spec["kind"] == "palettized" else self._affine_rows
        return rows(codes, flat, buffers).view(*ids.shape, width)

    def _affine_rows(self, codes: Tensor, ids: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Return float32 [N, D]: the arithmetic of `AffineWeight.dequantize` on N rows."""
        grouped = codes.view(len(ids), self.embedding_dim // self.spec["group_size"], -1).to(torch.float32)
        return (grouped - centre_of(self.spec)) * buffers["scales"][ids].to(torch.float32)[..., None]

    def _palette_rows(self, codes: Tensor, ids: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Return float32 [N, D]: the arithmetic of `PalettizedWeight.dequantize` on N rows."""
        palettes = buffers["palettes"].to(torch.float32)
        rows = torch.gather(palettes[ids // self.spec["group_size"]], 1, codes.to(torch.int64))
        return rows * buffers["row_scales"][ids].to(torch.float32)[:, None] if self.spec["row_scales"] else rows


class TiedHead(nn.Module):
    """The output projection that reads the embedding's codes; it owns no tensors."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._shared = (embedding,)
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """Return the embedding's dense float32 weight, without its output scale."""
        embedding = self._shared[0]
        return embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., V] for x [..., D]."""
        return F.linear(x, self.weight.to(x.dtype))


def quantization_config(
    model: nn.Module, specs: Mapping[str, Mapping[str, Any]], tied: Mapping[str, str]
) -> dict[str, Any]:
    """Return what config.json says of a model whose named modules, still float, get weights of these specs."""
    modules = {
        name: {"role": "embedding" if isinstance(model.get_submodule(name), nn.Embedding) else "linear", **spec}
        for name, spec in specs.items()
    }
    return {"quant_method": QUANT_METHOD, "version": VERSION, "tied": dict(tied), "modules": modules}


def apply_quantized_weights(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], tied: Mapping[str, str] | None = None
) -> None:
    """Replace the named float modules of a transformers model by packed ones, in place, and write its config.

    `weights` maps module names to codes; `tied` maps a head's name to the embedding whose codes it shares.
    """
    config = quantization_config(model, {name: weight.spec() for name, weight in weights.items()}, tied or {})
    biases = {name: getattr(model.get_submodule(name), "bias", None) for name in weights}
    replace_modules(model, config)
    for name, weight in weights.items():
        packed = cast(PackedModule, model.get_submodule(name))
        packed.fill(weight)
        if (bias := biases[name]) is not None:
            packed.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    cast(Any, model).config.quantization_config = config


def replace_modules(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put empty packed modules where a `quantization_config` names them, on the device of what stood there.

    Raises UnsupportedModel if the config was written by a newer version or names modules that the model lacks.
    """
    if config.get("version") != VERSION:
        raise UnsupportedModel(
            f"the checkpoint's quantization_config has version {config.get('version')!r}; this dwindle reads "
            f"version {VERSION}. Update dwindle, or quantize the model again."
        )
    present = dict(model.named_modules())
    unknown = [n for n in [*config["modules"], *config["tied"], *config["tied"].values()] if n not in present]
    if unknown:
        raise UnsupportedModel(
            f"the quantization_config names {len(unknown)} modules that the model does not have: {offenders(unknown)}. "
            "config.json does not belong to this checkpoint."
        )
    for name, spec in config["modules"].items():
        old = present[name]
        device = next((p.device for p in old.parameters(recurse=False)), None)
        if spec["role"] == "embedding":
            _replace(model, name, QuantizedEmbedding(spec, _output_scale(old), device))
        else:
            _replace(model, name, QuantizedLinear(spec, getattr(old, "bias", None) is not None, device))
    for head, embedding in config["tied"].items():
        _replace(model, head, TiedHead(cast(QuantizedEmbedding, model.get_submodule(embedding))))
    if config["tied"]:
        _forget_tying(model)
    loose = cast(Any, model)
    loose.is_quantized, loose.quantization_method = True, QUANT_METHOD


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return module name -> codes of every packed module; a tied head appears under its embedding's name only."""
    return {name: m.quantized_weight() for name, m in model.named_modules() if isinstance(m, PackedModule)}


def packed_specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return module name -> spec (kind, bits, group_size, shape, ...) of every packed module; unpacks nothing."""
    return {name: dict(m.spec) for name, m in model.named_modules() if isinstance(m, PackedModule)}


def is_quantized(model: nn.Module) -> bool:
    """Return True if any module of the model is packed."""
    return any(isinstance(module, PackedModule) for module in model.modules())


def packed_buffer_names(model: nn.Module) -> set[str]:
    """Return the state-dict names of all packed buffers: they are stored as they are, in no other dtype."""
    return {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        for buffer in module.packed()
    }


def cache_dense(model: nn.Module, enabled: bool = True) -> None:
    """Keep the dense float32 weights after their first use (faster, 4 bytes a weight), or drop them again."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.cache_dense = enabled
            module._dense = None


def _output_scale(embedding: nn.Module) -> float:
    """Return what the module multiplies its rows by: a plain number in 5.x, a buffer in 4.57.

    A skeleton built on the meta device has no value there; NaN keeps it from ever computing something plausible.
    """
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return math.nan if isinstance(scale, Tensor) and scale.is_meta else float(scale)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


def _forget_tying(model: nn.Module) -> None:
    """Stop transformers from copying a weight parameter between embedding and head: the codes are shared already.

    4.57 ties on `tie_weights()`, 5.x on `all_tied_weights_keys`; both are answered on this one instance.
    """
    loose = cast(Any, model)
    loose.tie_weights = _already_tied
    loose.all_tied_weights_keys = {}


def _already_tied(*_: Any, **__: Any) -> None:
    """Take the place of `PreTrainedModel.tie_weights`."""
