"""Packed weights as Core AI's compressed constants, code for code.

    PalettizedWeight -> lut_to_dense(indices uint{b} [O, I], table [O/g, 1, 2^b, 1])
                        and, with row scales, blockwise_shift_scale(scale [O, 1]) of it
    AffineWeight     -> blockwise_shift_scale(data int{b} or uint{b} [O, I], scale [O, I/g], offset1, offset2 = 0)

Core AI computes scale * (data - offset1) + offset2, our formula. A symmetric weight is stored as a signed integer
without offset (data = code - 2^(b-1)), an asymmetric one as an unsigned integer with its zero points as offset: the
codes go in as they are and nothing is rounded again. Tables (palettes and scales) are constants in the type the
program computes in, because the runtime multiplies in the scale's type and folds a cast of a constant: float16 as
stored in the static layout, float32 in the dynamic one, where the dequantized numbers are then exactly ours. That
costs 16 bits a group: 5.0 instead of 4.5 bits a weight for 4 bits in blocks of 32, nothing to speak of for palettes.

How they get in: each packed module of the decoder asks for its weight with one operator of ours that has a name and a
shape and no tensor, so neither `torch.export` nor the decomposition ever sees a dense or an unpacked copy; the
converter's public hook (`register_torch_lowering`) then puts the constants in its place. Not the converter's own
compression modules: they are private, hold the codes a byte each, and infer widths from the codes' range. The bytes
that a checkpoint keeps are the bytes the compiler wants, so codes are never unpacked on their way.

What is refused follows the table of `quantize.formats`: widths that Apple's layout guide does not list. The
compiler's operator itself knows indices of 1 and 3 bits too, and the runtime on Linux computes them; devices are not
documented to.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dwindle.anatomy import Anatomy
from dwindle.bit_packing import packed_bytes
from dwindle.bundle import ModelBundle
from dwindle.errors import MissingExtra, offenders
from dwindle.export.options import ExportOptions
from dwindle.export.packed_widths import width_problems
from dwindle.quantized_model import PackedModule, packed_specs
from dwindle.weights import AffineWeight, PalettizedWeight, packed_shapes, spec_bits

__all__ = [
    "AFFINE_BITS", "EXAMPLE_PAST", "EXAMPLE_TOKENS", "LARGEST_ASSET_BYTES", "LARGE_STATE_BYTES", "PALETTE_BITS",
    "STATE_MULTIPLE", "WEIGHT_OPERATOR", "PackedEmbedding", "PackedLinear", "asset_bytes", "coreai_notes",
    "coreai_problems", "weight_lowering",
]  # fmt: skip

PALETTE_BITS = (2, 4, 6, 8)
"""Widths of an index that Apple's layout guide lists."""
AFFINE_BITS = (4, 8)
"""Widths of an integer that it lists."""
EXAMPLE_TOKENS, EXAMPLE_PAST = 5, 2
"""T and P that the dynamic layout is traced with; any numbers but 0 and 1, which torch.export would bake in."""
LARGEST_ASSET_BYTES = 2_000_000_000
"""An asset for iOS must stay below this (Apple's layout guide)."""
STATE_MULTIPLE = 32
"""The last dimension of a state should be a multiple of it on the Neural Engine, as in Core ML."""
LARGE_STATE_BYTES = 256_000_000
"""States above this size are noted: they are allocated whole, however short the text is."""
WEIGHT_OPERATOR = "dwindle::coreai_weight"
"""Torch operator that stands for a packed weight until the converter replaces it."""
_LIBRARIES = ("coreai", "coreai_torch")


def coreai_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    """Return one line per thing that keeps this bundle from being written here; empty is good.

    Raises MissingExtra without Core AI's packages.
    """
    if any(importlib.util.find_spec(name) is None for name in _LIBRARIES):
        raise MissingExtra("Core AI export", "coreai")
    specs = packed_specs(bundle.model)
    problems = [*_width_problems(specs), *(_engine_problems(specs) if options.shapes == "static" else [])]
    context = options.resolved(bundle.anatomy).context_length or 0
    if context < EXAMPLE_TOKENS + EXAMPLE_PAST:
        problems.append(f"coreai: context_length={context} is shorter than the {EXAMPLE_TOKENS + EXAMPLE_PAST} tokens "
                        "that the program is traced with. Raise it.")  # fmt: skip
    if options.shapes == "static" and options.prefill_tokens >= context:
        problems.append(f"coreai: prefill_tokens={options.prefill_tokens} does not fit into a context of {context:,} "
                        f"tokens. Set prefill_tokens to {context - 1:,} at most.")  # fmt: skip
    needed = asset_bytes(bundle, options)
    if options.shapes == "static" and needed > LARGEST_ASSET_BYTES:
        problems.append(f"coreai: the asset would take {needed / 1e9:.2f} GB; the layout for iOS allows "
                        f"{LARGEST_ASSET_BYTES / 1e9:.0f} GB. Quantize to fewer bits, the embedding included, or set "
                        "shapes=dynamic for a Mac.")  # fmt: skip
    return problems


def _width_problems(specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    problems = width_problems("coreai", "Core AI", specs, PALETTE_BITS, AFFINE_BITS)
    balanced = [name for name, spec in specs.items() if spec.get("balanced")]
    if balanced:
        problems.append(f"coreai: {len(balanced)} weights are balanced integers, whose centre is no whole number: "
                        f"{offenders(balanced, 6)}. Quantize with balanced=False.")  # fmt: skip
    return problems


def _engine_problems(specs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the Neural Engine's layout has no form for: it knows palettes, and integers per row."""
    affine = {name: spec for name, spec in specs.items() if spec["kind"] == AffineWeight.kind}
    found = {
        "have palettes with row scales": ([name for name, spec in specs.items() if spec.get("row_scales")],
                                          "row_scales=False"),
        "have zero points": ([name for name, spec in affine.items() if not spec["symmetric"]], "symmetric=True"),
        "share scales in blocks of inputs": (
            [f"{name} (blocks of {spec['group_size']})" for name, spec in affine.items()
             if spec["group_size"] != spec["shape"][1]], "group_size=channel, or palettes",
        ),
    }  # fmt: skip
    return [f"coreai: shapes=static is the Neural Engine's layout, and {len(names)} weights {what}: "
            f"{offenders(names, 6)}. Quantize with {remedy}, or set shapes=dynamic."
            for what, (names, remedy) in found.items() if names]  # fmt: skip


def asset_bytes(bundle: ModelBundle, options: ExportOptions) -> int:
    """Return about what the asset will take: codes, tables and floats in the layout's type, cos and sin."""
    anatomy, width = bundle.anatomy, 2 if options.shapes == "static" else 4
    specs = packed_specs(bundle.model)
    bits: int = sum(spec_bits(spec) + 16 * (width // 2 - 1) * _table_numbers(spec) for spec in specs.values())
    floats: int = sum(parameter.numel() for parameter in bundle.model.parameters())
    context = options.resolved(anatomy).context_length or 0
    ropes = [rope for rope in anatomy.traits.ropes if rope is not None]
    distinct = [rope for i, rope in enumerate(ropes) if rope not in ropes[:i]]
    tables: int = len(distinct) * context * anatomy.head_dim
    return -(-bits // 8) + width * (floats + tables)


def _table_numbers(spec: Mapping[str, Any]) -> int:
    """Return how many scales and palette entries a weight has."""
    numbers: int = sum(math.prod(shape) for shape, dtype in packed_shapes(spec).values() if dtype == torch.float16)
    return numbers


def coreai_notes(anatomy: Anatomy, context: int, options: ExportOptions) -> tuple[str, ...]:
    """Return what converts and yet may disappoint on a device."""
    notes, width = [], 2 if options.shapes == "static" else 4
    state_bytes = 2 * width * anatomy.layers * anatomy.kv_heads * anatomy.head_dim * context
    if state_bytes > LARGE_STATE_BYTES:
        notes.append(f"the KV cache of a context of {context:,} tokens takes {state_bytes / 1e6:,.0f} MB on the device "
                     "from the start. Set context_length to what the app needs.")  # fmt: skip
    if options.shapes == "static" and anatomy.head_dim % STATE_MULTIPLE:
        notes.append(f"the KV cache's last dimension is head_dim={anatomy.head_dim}, no multiple of {STATE_MULTIPLE}: "
                     "the Neural Engine is reported to refuse such states.")  # fmt: skip
    if options.shapes == "static" and anatomy.model_type.startswith("gemma"):
        notes.append("this family was trained in bfloat16, and its residual stream is known to exceed float16's range: "
                     "watch for infinite logits.")  # fmt: skip
    return tuple(notes)


class PackedLinear(nn.Module):
    """A linear layer whose weight is the packed one of that name."""

    def __init__(self, name: str, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.shape, self.dtype = name, shape, dtype
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device="meta")) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for x [..., I]."""
        return functional.linear(x, _weight_operator()(self.name, *self.shape, self.dtype), self.bias)


class PackedEmbedding(nn.Module):
    """An embedding whose table is the packed weight of that name."""

    def __init__(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.shape, self.dtype = name, shape, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., D] for ids [...]."""
        return functional.embedding(ids, _weight_operator()(self.name, *self.shape, self.dtype))


@functools.cache
def _weight_operator() -> Any:
    """Define the operator once and return it. It has a shape for the tracer and no arithmetic of its own."""
    library, name = WEIGHT_OPERATOR.split("::")
    typeless: Any = torch.library
    made = typeless.Library(library, "FRAGMENT")
    made.define(f"{name}(str name, int rows, int columns, ScalarType dtype) -> Tensor")
    typeless.register_fake(WEIGHT_OPERATOR, _shaped, lib=made)
    _definitions.append(made)
    return getattr(getattr(torch.ops, library), name)


def _shaped(_name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype)


_definitions: list[Any] = []
"""torch forgets an operator when its library object is collected."""


def weight_lowering(model: nn.Module) -> Callable[[Any, Any, Any], Any]:
    """Return what the converter calls for every use of the operator: it writes the constants of `model`'s module.

    Two uses of a weight, and its uses in several functions, share their constants.
    """
    constants = _Constants()

    def lowered(_values: Any, node: Any, location: Any) -> Any:
        name, _, _, dtype = node.args
        packed = cast(PackedModule, model.get_submodule(name))
        write = _palettes if packed.spec["kind"] == PalettizedWeight.kind else _integers
        return write(name, packed, np.dtype(str(dtype).removeprefix("torch.")), constants, location)

    return lowered


class _Constants:
    """Constants by name; each is handed to the compiler once, as bytes that are packed already."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def codes(self, name: str, stored: NDArray[np.uint8], shape: list[int], bits: int, *, signed: bool) -> Any:
        """Return b-bit integers. The compiler's bytes are those of `pack_bits`: lowest bits first, nothing padded."""
        from coreai._compiler.ir import IntegerType

        element = (IntegerType.get_signed if signed else IntegerType.get_unsigned)(bits)
        if bits == 8:
            stored = stored.reshape(shape).view(np.int8 if signed else np.uint8)
        return self._constant(name, stored, shape, element)

    def numbers(self, name: str, values: NDArray[Any]) -> Any:
        """Return float16 or float32 numbers."""
        from coreai._compiler.ir import F16Type, F32Type

        kind = F16Type if values.dtype == np.float16 else F32Type
        return self._constant(name, np.ascontiguousarray(values), list(values.shape), kind.get())

    def _constant(self, name: str, values: NDArray[Any], shape: list[int], element: Any) -> Any:
        from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir.dialects.coreai import create_elements_attr
        from coreai._compiler.dialects import coreai
        from coreai._compiler.ir import Location, RankedTensorType

        if name not in self._made:
            kind = RankedTensorType.get(shape, element)
            self._made[name] = create_elements_attr(Location.unknown(), kind, values)
        made: Any = coreai.ConstantOp
        return made(value=self._made[name]).result


def _stored(packed: PackedModule) -> dict[str, NDArray[Any]]:
    """Return a module's buffers: codes packed, tables float16."""
    return {name: tensor.cpu().numpy() for name, tensor in packed.packed().items()}


def _palettes(name: str, packed: PackedModule, table: np.dtype[Any], constants: _Constants, location: Any) -> Any:
    from coreai._compiler.dialects import coreai

    tensors, bits = _stored(packed), packed.spec["bits"]
    indices = constants.codes(f"{name}.indices", tensors["indices"], packed.spec["shape"], bits, signed=False)
    lut = tensors["palettes"].reshape(-1, 1, 2**bits, 1).astype(table)
    axis = coreai.constant(np.array(0, np.int16))
    dense = coreai.lut_to_dense(indices, constants.numbers(f"{name}.palettes", lut), axis, loc=location)
    if "row_scales" not in tensors:
        return dense
    scales = tensors["row_scales"][:, None].astype(table)
    scale, zero = constants.numbers(f"{name}.scales", scales), constants.numbers(f"{name}.zeros", 0 * scales)
    return coreai.blockwise_shift_scale(dense, scale, zero, zero, loc=location)


def _integers(name: str, packed: PackedModule, table: np.dtype[Any], constants: _Constants, location: Any) -> Any:
    """Symmetric codes go in as two's complement: code - 2^(b-1) is the code with its highest bit turned over."""
    from coreai._compiler.dialects import coreai

    tensors, bits, symmetric = _stored(packed), packed.spec["bits"], packed.spec["symmetric"]
    stored, scales = tensors["codes"], tensors["scales"].astype(table)
    if symmetric:
        stored = stored ^ np.uint8(0x88 if bits == 4 else 0x80)
        zero_points = np.zeros(packed_bytes(scales.size, bits), np.uint8)
    else:
        zero_points = tensors["zero_points"]
    data = constants.codes(f"{name}.codes", stored, packed.spec["shape"], bits, signed=symmetric)
    offset = constants.codes(f"{name}.zero_points", zero_points, list(scales.shape), bits, signed=symmetric)
    scale, zero = constants.numbers(f"{name}.scales", scales), constants.numbers(f"{name}.zeros", 0 * scales)
    return coreai.blockwise_shift_scale(data, scale, offset, zero, loc=location)
