"""Packed weights as Core ML's compressed constants, code for code.

    PalettizedWeight -> constexpr_lut_to_dense(indices uint{b} [O, I], lut fp16 [O/g, 1, 2^b, 1])
                        and, with row scales, constexpr_blockwise_shift_scale(scale fp16 [O, 1]) of it
    AffineWeight     -> constexpr_blockwise_shift_scale(data int{b} or uint{b} [O, I], scale fp16 [O, I/g], offset)

Core ML computes scale * (data - offset), our formula. A symmetric weight is stored as a signed integer without offset
(data = code - 2^(b-1)), an asymmetric one as an unsigned integer with its zero points as offset: the codes go in as
they are and nothing is rounded again.

Data of the second operator has 4 or 8 bits. Integers of 2 and 3 bits are indices into the one palette of their own
numbers, and so are balanced ones, whose numbers are halves; the same two operators chain as for row scales:

    symmetric, balanced -> shift_scale(data = lut_to_dense(codes uint{b}, lut fp16: code - centre), scale)
    asymmetric          -> shift_scale(data = lut_to_dense(codes uint{b}, lut uint8: code), scale, offset uint8)

    float matrix -> const fp16

A graph pass puts them in: it runs first of all, while every weight is still a constant that bears its parameter's
name, and fails unless it finds each one. Float matrices go the same way, rounded to float16 once, so that the converter
never holds them in float32: as constexpr_cast(fp16), which no pass folds, until a last pass takes it and the cast that
coremltools has put behind it away. Not `coremltools.optimize`, which clusters on its own, and not its
`_COREML_/weight/lut` buffers, which search the index of every weight (12.6 s for one 3072 x 8192 matrix) and take
palettes through float32, where `add_fp16_cast` lifts values near zero to the smallest fp16 number.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.errors import MissingExtra, offenders
from dwindle.export.coreml_chunks import chunk_problems
from dwindle.export.options import ExportOptions
from dwindle.export.packed_widths import width_problems
from dwindle.quantized_model import packed_specs
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

__all__ = ["AFFINE_BITS", "PALETTE_BITS", "CarriedWeight", "carry_codes_pass", "coreml_problems", "is_chained",
           "settle_floats_pass"]  # fmt: skip

CarriedWeight = QuantizedWeight | Tensor
"""What takes a constant's place: codes, or a float matrix that is to be stored as float16."""

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
"""Widths of an index that Core ML stores."""
AFFINE_BITS = (2, 3, 4, 8)
"""Widths of an integer that Core ML stores, those of 2 and 3 bits as indices."""
_DATA_BITS = (4, 8)
"""Widths that constexpr_blockwise_shift_scale takes by itself."""
NUMPY_TOO_NEW = (2, 4)
"""coremltools 9.0 fails from this version on."""


def coreml_problems(bundle: ModelBundle, options: ExportOptions | None = None) -> list[str]:
    """Return one line per thing that keeps this bundle from being written here; empty is good.

    Without options only the weights' formats are looked at. Raises MissingExtra without coremltools, and RecipeError
    for a context that the model cannot have.
    """
    if importlib.util.find_spec("coremltools") is None:
        raise MissingExtra("Core ML export", "coreml")
    specs, problems = packed_specs(bundle.model), []
    if tuple(int(part) for part in np.__version__.split(".")[:2]) >= NUMPY_TOO_NEW:
        problems.append(f"coreml: coremltools does not convert with numpy {np.__version__}. "
                        "Run: pip install 'numpy<2.4'")  # fmt: skip
    problems += width_problems("coreml", "Core ML", specs, PALETTE_BITS, AFFINE_BITS)
    return problems if options is None else problems + _shape_problems(bundle, options.resolved(bundle.anatomy))


def _shape_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    context, problems = options.context_length or 0, []
    if options.shapes == "static" and options.prefill_tokens > context:
        problems.append(f"coreml: prefill_tokens={options.prefill_tokens:,} is more than the context of {context:,} "
                        f"tokens. Set it to {context:,} at most.")  # fmt: skip
    return problems + chunk_problems(bundle, context, options.largest_file_bytes)


@functools.cache
def carry_codes_pass() -> str:
    """Register the graph pass once and return its name. Its option `weights` maps constants' names to weights."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class carry_codes(AbstractGraphPass):  # type: ignore[misc]
        """Replace named constants by their packed form."""

        weights: Mapping[str, CarriedWeight] = {}

        def apply(self, prog: Any) -> None:
            """Replace all of them in the program's one function."""
            block = prog.functions["main"]
            constants = {op.name: op for op in block.operations if op.op_type == "const" and op.name in self.weights}
            missing = sorted(set(self.weights) - set(constants))
            if missing:
                raise RuntimeError(f"coremltools renamed or dropped {len(missing)} weights: {offenders(missing)}")
            with block:
                for name, op in constants.items():
                    _replace(block, op, self.weights[name])

    register_pass(namespace="dwindle")(carry_codes)
    return "dwindle::carry_codes"


@functools.cache
def settle_floats_pass() -> str:
    """Register the pass that turns cast(constexpr_cast(x)) into x, and return its name."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    class settle_floats(AbstractGraphPass):  # type: ignore[misc]
        """Leave the float16 constant alone where float32 was only on paper."""

        def apply(self, prog: Any) -> None:
            """Replace all of them in the program's one function."""
            block = prog.functions["main"]
            with block:
                for op in [op for op in block.operations if op.op_type == "constexpr_cast"]:
                    for cast in list(op.outputs[0].child_ops):
                        if cast.op_type != "cast" or cast.dtype.val != "fp16":
                            raise RuntimeError(f"{op.name} is used in float32 by {cast.op_type} {cast.name}")
                        block.replace_uses_of_var_after_op(anchor_op=cast, old_var=cast.outputs[0],
                                                           new_var=op.source_val, force_replace=True)  # fmt: skip
                        block.remove_ops([cast])
                    block.remove_ops([op])

    register_pass(namespace="dwindle")(settle_floats)
    return "dwindle::settle_floats"


def _replace(block: Any, op: Any, weight: CarriedWeight) -> None:
    """Put the stored form of `weight` in the place of a float32 constant.

    Its tables stay fp16; the cast to float32 keeps the program well typed until coremltools turns all of it to
    fp16 and removes the two casts that then meet.
    """
    from coremltools.converters.mil.mil import Builder as mb

    shape = tuple(weight.shape)
    if tuple(op.outputs[0].shape) != shape:
        raise RuntimeError(f"{op.name} is {op.outputs[0].shape} in the program and {shape} in the checkpoint")
    if isinstance(weight, Tensor):
        wide = mb.constexpr_cast(source_val=weight.half().numpy(), output_dtype="fp32", before_op=op,
                                 name=f"{op.name}_fp32")  # fmt: skip
    else:
        packed = _palettes(mb, op, weight) if isinstance(weight, PalettizedWeight) else _integers(mb, op, weight)
        wide = mb.cast(x=packed, dtype="fp32", before_op=op, name=f"{op.name}_fp32")
    block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=wide, no_check_var_types=True)
    block.remove_ops([op])


def _palettes(mb: Any, op: Any, weight: PalettizedWeight) -> Any:
    lut = weight.palettes.cpu().numpy().reshape(len(weight.palettes), 1, 2**weight.bits, 1)
    indices = _typed(weight.indices.cpu().numpy(), f"uint{weight.bits}")
    dense = mb.constexpr_lut_to_dense(indices=indices, lut=lut, before_op=op, name=f"{op.name}_palettized")
    if weight.row_scales is None:
        return dense
    return mb.constexpr_blockwise_shift_scale(
        data=dense, scale=weight.row_scales.cpu().numpy()[:, None], before_op=op, name=f"{op.name}_scaled"
    )


def _integers(mb: Any, op: Any, weight: AffineWeight) -> Any:
    codes, arguments = weight.codes.cpu().numpy(), {}
    if weight.zero_points is not None:
        offset_bits = 8 if is_chained(weight.spec()) else weight.bits
        arguments["offset"] = _typed(weight.zero_points.cpu().numpy(), f"uint{offset_bits}")
    if is_chained(weight.spec()):
        data = _numbers(mb, op, weight)
    elif weight.symmetric:
        data = _typed(codes.astype(np.int16) - 2 ** (weight.bits - 1), f"int{weight.bits}")
    else:
        data = _typed(codes, f"uint{weight.bits}")
    return mb.constexpr_blockwise_shift_scale(
        data=data, scale=weight.scales.cpu().numpy(), before_op=op, name=f"{op.name}_integers", **arguments
    )


def is_chained(spec: Mapping[str, Any]) -> bool:
    """Return whether integers with this spec are looked up before they are scaled."""
    return spec["bits"] not in _DATA_BITS or bool(spec.get("balanced"))


def _numbers(mb: Any, op: Any, weight: AffineWeight) -> Any:
    """Return the codes' numbers, looked up: less their centre if symmetric, else as they are."""
    numbers = np.arange(2**weight.bits)
    lut = (numbers - weight.centre).astype(np.float16) if weight.symmetric else numbers.astype(np.uint8)
    indices = _typed(weight.codes.cpu().numpy(), f"uint{weight.bits}")
    return mb.constexpr_lut_to_dense(indices=indices, lut=lut.reshape(1, 1, -1, 1), before_op=op,
                                     name=f"{op.name}_codes")  # fmt: skip


def _typed(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Return values in the numpy type by which coremltools knows that name; it may be narrower than a byte."""
    from coremltools.converters.mil.mil import types

    kind = np.dtype(types.nptype_from_builtin(types.string_to_builtin(name)))
    # A narrow type is a byte that says how wide it is; codes are bytes already and need no copy to bear it.
    typed: NDArray[Any] = values.view(kind) if values.dtype == kind else values.astype(kind)
    return typed
