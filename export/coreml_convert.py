"""From a part of the decoder to a saved Core ML program: traced, converted, and its failures told.

coremltools works on float32 constants until its own passes turn all of it into float16, so the program is traced in
float32. A converter's failure names what it was at: coremltools logs the operator and the place in the module tree
before an exception of its frontend, and an exception of a pass has the operation in a frame of its traceback.

What numpy and torch do at conversion: coremltools 9.0 breaks on numpy >= 2.4.
"""

from __future__ import annotations

import gc
import logging
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from dwindle.errors import ExportFailed
from dwindle.export.coreml_decoder import DecoderPart
from dwindle.export.coreml_files import fresh_names, quiet_coremltools
from dwindle.export.coreml_weights import CarriedWeight, carry_codes_pass, settle_floats_pass

__all__ = ["DECODE", "FLEXIBLE", "HIDDEN", "HIDDEN_OUT", "IDLE_PASSES", "PREFILL", "save_program"]

FLEXIBLE, PREFILL, DECODE = "main", "prefill", "decode"
"""Names of the functions: one for any number of tokens, or one for many and one for one."""
HIDDEN, HIDDEN_OUT = "hidden", "hidden_out"
"""What goes from one part to the next: the input's name and the output's, which must differ."""

IDLE_PASSES = frozenset(
    f"common::{name}"
    for name in (
        "add_conv_transpose_output_shape", "canonicalize_quantized_lut_pattern", "compose_conv1d",
        "concat_to_pixel_shuffle", "dequantize_quantize_pair_elimination", "dequantize_to_constexpr",
        "detect_concat_interleave", "distributive_quantized_binary_op_scale_normalization",
        "expand_high_rank_reshape_and_transpose", "fuse_conv_batchnorm", "fuse_conv_bias", "fuse_conv_scale",
        "fuse_dilated_conv", "fuse_elementwise_to_batchnorm", "fuse_leaky_relu", "fuse_onehot_matmul_to_gather",
        "fuse_pad_conv", "image_input_preprocess", "int_op_canonicalization", "lower_complex_dialect_ops",
        "merge_affine_dequantize_with_consecutive_ops", "merge_consecutive_paddings", "merge_consecutive_relus",
        "nullify_redundant_quantization_zero_point", "prelu_to_lrelu", "reduce_transposes", "replace_stack_reshape",
        "fuse_stack_split", "use_reflection_padding",
    )
)  # fmt: skip
"""coremltools' passes for what a decoder does not have (convolutions, images, its own quantization) or that change
nothing in it. Each costs a validation of the whole program; without them conversion takes about 30 % less time."""

_EXAMPLE_TOKENS = 2
"""Tokens of the trace of a flexible program."""
_AT_OPERATOR = re.compile(r"converting '(?P<kind>[^']*)' op \(located at: '(?P<place>[^']*)'\)")


def save_program(model: DecoderPart, weights: Mapping[str, CarriedWeight], tokens: int | None, package: Path) -> None:
    """Trace, convert and save one function; `tokens` None makes it flexible.

    Raises ExportFailed with the operator and the module that coremltools failed on, as far as it tells.
    """
    listener = _Listener()
    with quiet_coremltools(), fresh_names(), torch.no_grad(), listener:
        try:
            trace: Any = torch.jit.trace
            traced = trace(model, _examples(model, tokens), check_trace=False)
            _converted(traced, model, weights, tokens).save(str(package))
        except Exception as error:  # whatever a converter stumbles over
            story = _story(error, listener.messages)
            traceback.clear_frames(error.__traceback__)
            raise ExportFailed(f"Core ML: {story}") from error
        finally:
            gc.collect()  # coremltools' programs are full of cycles, and one holds all the weights


def _examples(model: DecoderPart, tokens: int | None) -> tuple[torch.Tensor, ...]:
    length, anatomy = tokens or _EXAMPLE_TOKENS, model.decoder.anatomy
    first = torch.zeros((1, length), dtype=torch.int32)
    inputs = [first if model.part.embedding else torch.zeros((1, length, anatomy.width))]
    if model.part.layers:
        inputs.append(torch.zeros((1, 1, length, length + 1 if tokens is None else model.decoder.context)))
        inputs += [torch.zeros(1, dtype=torch.int32)] if model.static else []
    return tuple(inputs)


def _converted(traced: Any, model: DecoderPart, weights: Mapping[str, CarriedWeight], tokens: int | None) -> Any:
    """Return coremltools' model, not compiled: that needs macOS."""
    import coremltools as ct

    context, part = model.decoder.context, model.part
    length, slots = (ct.RangeDim(lower_bound=1, upper_bound=context, default=1) for _ in range(2))
    if tokens is not None:
        length, slots = tokens, context
    inputs = [
        ct.TensorType("input_ids", shape=(1, length), dtype=np.int32) if part.embedding
        else ct.TensorType(HIDDEN, shape=(1, length, model.decoder.anatomy.width), dtype=np.float16)
    ]  # fmt: skip
    if part.layers:
        inputs.append(ct.TensorType("causal_mask", shape=(1, 1, length, slots), dtype=np.float16))
        inputs += [ct.TensorType("position", shape=(1,), dtype=np.int32)] if model.static else []
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(IDLE_PASSES)
    pipeline.insert_pass(0, carry_codes_pass())
    pipeline.set_options(carry_codes_pass(), {"weights": weights})
    pipeline.append_pass(settle_floats_pass())
    return ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=inputs,
        outputs=[ct.TensorType("logits" if part.head else HIDDEN_OUT, dtype=np.float16)],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=tuple(buffer.shape), dtype=np.float16), name=name)
            for name, buffer in model.states.items()
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


class _Listener(logging.Handler):
    """Keeps what coremltools logs as an error while it is quiet."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Listener:
        notices = logging.getLogger("coremltools")
        self._found = notices.level, notices.propagate, list(notices.handlers)
        notices.setLevel(logging.ERROR)
        notices.propagate, notices.handlers = False, [self]
        return self

    def __exit__(self, *_: object) -> None:
        notices = logging.getLogger("coremltools")
        notices.setLevel(self._found[0])
        notices.propagate, notices.handlers = self._found[1], self._found[2]


def _story(error: BaseException, messages: list[str]) -> str:
    """Return which operator of which module failed, and the converter's own words."""
    words = f"{type(error).__name__}: {error}"
    for message in reversed(messages):
        found = _AT_OPERATOR.search(message)
        if found:
            place = found["place"].replace("/", ".") or "the program's top"
            return f"coremltools failed on the operator {found['kind']!r} of {place} ({words})"
    operation = _operation_at(error.__traceback__)
    return f"coremltools failed{operation} ({words})"


def _operation_at(trace: TracebackType | None) -> str:
    """Return " on the operator ... " for the innermost frame that holds a MIL operation, "" if none does."""
    told = ""
    while trace is not None:
        frame = trace.tb_frame
        # Asking a frame for its variables makes it keep a copy of them, so only those that have an `op` are asked.
        op: Any = frame.f_locals.get("op") if "op" in frame.f_code.co_varnames else None
        if hasattr(op, "op_type") and hasattr(op, "name"):
            told = f" on the operation {op.op_type!r} named {op.name!r}"
        trace = trace.tb_next
    return told
