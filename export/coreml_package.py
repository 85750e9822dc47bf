"""A decoder as a Core ML package for iOS 18: one stateful program for prefill and decode, carrying our codes.

    input_ids    int32 [1, T]          the new tokens, T from 1 to the context
    causal_mask  fp16  [1, 1, T, S]    0 where a new token may look, -1e4 where not; S = past + T
    logits       fp16  [1, T, V]
    key_cache, value_cache             states, fp16 [L, 1, K, context, D], zero in a new state

The interface is that of Apple's Llama and Mistral samples: the length of the past is read off the mask's shape, so one
function with flexible lengths does prefill (T > 1) and decode (T = 1). The decoder of `decoder.py` is traced with its
cache in two buffers, which the converter turns into states. `coreml_weights.py` puts packed weights in place of the
float ones; `mil_evaluator.py` executes what was saved.

Computation is float16. Two things keep it in range: cos and sin come from tables (a position times a frequency would
lose the far positions), and RMS norms are written as a layer norm over [x, -x], whose mean is zero, because x * x
overflows float16 from |x| = 256 on, while the runtime's layer norm accumulates in its own, wider type (the form that
Apple's Neural Engine models use).

What numpy and torch do at conversion: coremltools 9.0 breaks on numpy >= 2.4; a slice write whose right side has a
lower rank would bake in the traced T (see `kv_cache.SlicedCache`).
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import dwindle
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.export.coreml_files import PACKAGE, WEIGHTS_FILE, fresh_names, quiet_coremltools, settle
from dwindle.export.coreml_weights import carry_codes_pass, coreml_problems, engine_notes
from dwindle.export.decoder import Decoder, RMSNorm, causal_bias
from dwindle.export.kv_cache import SlicedCache
from dwindle.export.options import ExportOptions
from dwindle.quantized_model import packed_specs
from dwindle.storage import folder_bytes
from dwindle.weights import QuantizedWeight

__all__ = ["IDLE_PASSES", "MINIMUM_OS", "CoreMLInfo", "MirroredNorm", "StatefulDecoder", "export_coreml"]

MINIMUM_OS = "iOS 18 / macOS 15"
"""First systems with states, int4 blocks and grouped palettes."""

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


@dataclass(frozen=True)
class CoreMLInfo:
    """What was written."""

    package: Path
    bytes: int
    """All files of the package."""
    weight_bytes: int
    """Its weight.bin: codes, tables, norms, cos and sin."""
    counted_bytes: int
    """What the bundle counts for the same weights (`ModelBundle.size`)."""
    context_length: int
    convert_seconds: float
    minimum_os: str = MINIMUM_OS
    notes: tuple[str, ...] = ()
    """What may keep the program from the Neural Engine; never a reason to fail."""


class StatefulDecoder(nn.Module):
    """The decoder with its KV cache in two buffers [L, 1, K, context, D], ready to be traced."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, anatomy = decoder, decoder.anatomy
        shape = (anatomy.layers, 1, anatomy.kv_heads, decoder.context, anatomy.head_dim)
        # numpy's zeros take no memory until they are written, and a trace writes only a few slots of a long context.
        self.key_cache = nn.Buffer(torch.from_numpy(np.zeros(shape, np.float32)))
        self.value_cache = nn.Buffer(torch.from_numpy(np.zeros(shape, np.float32)))
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RMSNorm):
                    setattr(parent, name, MirroredNorm(child))

    def forward(self, input_ids: Tensor, causal_mask: Tensor) -> Tensor:
        """Return logits [1, T, V]; slots S - T to S of the buffers are written."""
        end = causal_mask.shape[-1]
        begin = end - input_ids.shape[1]
        cache = SlicedCache(self.key_cache, self.value_cache, begin, end)
        positions = cast(Tensor, self.decoder.slots)[begin:end].unsqueeze(0)
        return self.decoder.logits(input_ids, positions, causal_mask, cache)


class MirroredNorm(nn.Module):
    """RMSNorm as the first half of layer_norm([x, -x]): the mean is 0, the variance is the mean square."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        weight = (norm.weight + norm.offset).detach()
        self.weight = nn.Buffer(torch.cat((weight, weight)))
        self.width, self.eps = len(weight), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x."""
        both = functional.layer_norm(torch.cat((x, -x), dim=-1), (2 * self.width,), self.weight, None, self.eps)
        return both[..., : self.width]


def export_coreml(bundle: ModelBundle, folder: Path, options: ExportOptions) -> CoreMLInfo:
    """Write `model.mlpackage` into an existing folder.

    Raises RecipeError for weights that Core ML cannot store, MissingExtra without coremltools; both before any work.
    """
    problems = coreml_problems(bundle)
    if problems:
        raise RecipeError(" ".join(problems))
    context = options.resolved(bundle.anatomy).context_length
    assert context is not None
    started = time.perf_counter()
    model = StatefulDecoder(Decoder.from_bundle(bundle, context=context)).eval()
    with quiet_coremltools(), fresh_names(), torch.no_grad():
        example = (torch.zeros((1, 2), dtype=torch.int32), causal_bias(2, past=1))
        trace: Any = torch.jit.trace
        program = _converted(trace(model, example, check_trace=False), model, context)
        _describe(program, bundle, context)
        shutil.rmtree(folder / PACKAGE, ignore_errors=True)
        program.save(str(folder / PACKAGE))
    package = folder / PACKAGE
    settle(package)
    return CoreMLInfo(
        package=package, bytes=folder_bytes(package), weight_bytes=(package / WEIGHTS_FILE).stat().st_size,
        counted_bytes=bundle.size().bytes, context_length=context, convert_seconds=time.perf_counter() - started,
        notes=engine_notes(bundle, context),
    )  # fmt: skip


def _converted(traced: Any, model: StatefulDecoder, context: int) -> Any:
    """Return coremltools' model, not compiled: that needs macOS."""
    import coremltools as ct

    tokens, slots = (ct.RangeDim(lower_bound=1, upper_bound=context, default=1) for _ in range(2))
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(IDLE_PASSES)
    pipeline.insert_pass(0, carry_codes_pass())
    pipeline.set_options(carry_codes_pass(), {"weights": _constants(model.decoder)})
    return ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=[
            ct.TensorType("input_ids", shape=(1, tokens), dtype=np.int32),
            ct.TensorType("causal_mask", shape=(1, 1, tokens, slots), dtype=np.float16),
        ],
        outputs=[ct.TensorType("logits", dtype=np.float16)],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=tuple(buffer.shape), dtype=np.float16), name=name)
            for name, buffer in (("key_cache", model.key_cache), ("value_cache", model.value_cache))
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def _constants(decoder: Decoder) -> dict[str, QuantizedWeight]:
    """Return packed weights under the names their constants have in the program; a tied head is the embedding's."""
    return {f"decoder.{name}.weight": weight for name, weight in decoder.quantized.items()}


def _describe(program: Any, bundle: ModelBundle, context: int) -> None:
    """Write the package's metadata: what Xcode shows, and what a reader needs to feed it."""
    origin = bundle.lineage.entries[0].options if bundle.lineage.entries else {}
    program.author = "dwindle"
    program.license = "as the source model"
    program.version = dwindle.__version__
    program.short_description = (
        f"{bundle.anatomy.model_type} decoder with KV cache states, context {context:,}. Feed new tokens as input_ids "
        "[1, T] and causal_mask [1, 1, T, past + T] (0: visible, -1e4: hidden); the states keep the past."
    )
    specs = packed_specs(bundle.model).values()
    kinds = sorted({"{kind} {bits}-bit group {group_size}".format(**spec) for spec in specs})
    program.user_defined_metadata.update({
        "dwindle.version": dwindle.__version__,
        "dwindle.context_length": str(context),
        "dwindle.vocabulary": str(bundle.anatomy.vocab),
        "dwindle.source": str(origin.get("model", "")),
        "dwindle.source_sha256": bundle.content_sha256,
        "dwindle.quantization": ", ".join(kinds) or "float16",
        "dwindle.minimum_os": MINIMUM_OS,
    })  # fmt: skip
    for name, text in (
        ("input_ids", "New tokens, int32 [1, T]."),
        ("causal_mask", "Added to the attention scores, [1, 1, T, past + T]: 0 visible, -1e4 hidden."),
    ):
        program.input_description[name] = text
    program.output_description["logits"] = "One row of logits a new token, [1, T, V]."
