"""What Apple's Neural Engine asks of a program's shapes and weights, checked before anything is converted.

Core ML runs a program wherever it can: what the engine does not take runs on the GPU or the CPU, in silence. So
nothing here is a refusal; it is what a reader should know before wondering why the engine is idle. Where each comes
from:

    flexible lengths      run on the engine at their default shape alone (an Apple engineer, developer forums 724930)
    states                the last dimension is a multiple of 32, or the model fails to load (coremltools issue 2631)
    dimensions            at most 16,384 of one tensor's axis; others fall back (Anemll splits its heads for it)
    last axes             of inputs and outputs are padded to 64 bytes, 32 numbers of float16 (Apple, "Deploying
                          Transformers on the Apple Neural Engine")
    rank                  at most 5, by construction: states have 5 dimensions, all else 4 or fewer
    palettes              per tensor or per group of rows; with scales of their own they have rank 6 and are refused
    integers              per tensor or per row; blocks within a row are for the GPU (coremltools, "Quantization
                          overview")
    files                 about 1 GB of weights each on iOS (Anemll)
"""

from __future__ import annotations

from dwindle.bundle import ModelBundle
from dwindle.errors import offenders
from dwindle.export.coreml_chunks import part_bytes, planned_parts
from dwindle.export.coreml_weights import is_chained
from dwindle.export.options import ExportOptions
from dwindle.quantized_model import packed_specs
from dwindle.weights import AffineWeight

__all__ = ["LARGEST_DIMENSION", "LARGE_FILE_BYTES", "LARGE_STATE_BYTES", "STATE_MULTIPLE", "engine_notes"]

STATE_MULTIPLE = 32
"""The last dimension of a state must be a multiple of it."""
LARGEST_DIMENSION = 16_384
"""Longest axis of a tensor on the engine."""
LARGE_STATE_BYTES = 256_000_000
"""States above this size are noted: they are allocated whole, however short the text is."""
LARGE_FILE_BYTES = 1_000_000_000
"""Weight files above this size are noted for programs that are made for the engine."""


def engine_notes(bundle: ModelBundle, options: ExportOptions) -> tuple[str, ...]:
    """Return what converts and yet may disappoint on a device: work that leaves the Neural Engine, large states."""
    options = options.resolved(bundle.anatomy)
    context = options.context_length or 0
    return (*_form_notes(bundle, options, context), *_shape_notes(bundle, options, context), *_weight_notes(bundle))


def _form_notes(bundle: ModelBundle, options: ExportOptions, context: int) -> list[str]:
    notes, anatomy = [], bundle.anatomy
    if options.shapes == "dynamic":
        notes.append("the program takes any length, which keeps it off the Neural Engine; it is for the GPU and the "
                     "CPU. Set shapes to static for the engine.")  # fmt: skip
    else:
        sizes = [part_bytes(bundle, part, context) for part in planned_parts(bundle, context,
                                                                             options.largest_file_bytes)]  # fmt: skip
        if max(sizes) > LARGE_FILE_BYTES:
            notes.append(f"a weight file takes up to {max(sizes) / 1e9:.1f} GB; phones are reported to fail above 1 GB "
                         f"a file. Set largest_file_bytes to {LARGE_FILE_BYTES}.")  # fmt: skip
    state_bytes = 2 * 2 * anatomy.layers * anatomy.kv_heads * anatomy.head_dim * context
    if state_bytes > LARGE_STATE_BYTES:
        notes.append(f"the KV cache of a context of {context:,} tokens takes {state_bytes / 1e6:,.0f} MB on the device "
                     "from the start. Set context_length to what the app needs.")  # fmt: skip
    return notes


def _shape_notes(bundle: ModelBundle, options: ExportOptions, context: int) -> list[str]:
    notes, anatomy = [], bundle.anatomy
    if anatomy.head_dim % STATE_MULTIPLE:
        notes.append(f"the KV cache's last dimension is head_dim={anatomy.head_dim}, no multiple of {STATE_MULTIPLE}: "
                     "the Neural Engine is reported to refuse such states.")  # fmt: skip
    axes = {"vocabulary": anatomy.vocab, "width": anatomy.width, "feed-forward width": max(anatomy.ffn_width),
            "context": context}  # fmt: skip
    long = [f"{name} {extent:,}" for name, extent in axes.items() if extent > LARGEST_DIMENSION]
    if long:
        notes.append(f"{offenders(long)} is more than the {LARGEST_DIMENSION:,} that the Neural Engine takes in one "
                     "axis: what has that axis runs elsewhere.")  # fmt: skip
    last = {"width": anatomy.width, "vocabulary": anatomy.vocab, "context": context}
    padded = [f"{name} {extent:,}" for name, extent in last.items() if extent % STATE_MULTIPLE]
    if options.shapes == "static" and padded:
        notes.append(f"{offenders(padded)}: no multiple of {STATE_MULTIPLE}, so inputs, outputs or tables that end in "
                     "it are padded on the Neural Engine.")  # fmt: skip
    if anatomy.model_type.startswith("gemma"):
        notes.append("this family was trained in bfloat16, and its residual stream is known to exceed float16's range: "
                     "hold the executed check's fp16_peak against 65,504.")  # fmt: skip
    return notes


def _weight_notes(bundle: ModelBundle) -> list[str]:
    specs, notes = packed_specs(bundle.model), []
    scaled = [name for name, spec in specs.items() if spec.get("row_scales")]
    if scaled:
        notes.append(f"{len(scaled)} weights have palettes with row scales: the Neural Engine is reported to refuse "
                     "those.")  # fmt: skip
    integers = {name: spec for name, spec in specs.items() if spec["kind"] == AffineWeight.kind}
    chained = [name for name, spec in integers.items() if is_chained(spec)]
    if chained:
        notes.append(f"{len(chained)} weights are integers of 2 or 3 bits, or balanced ones, stored as indices with "
                     "scales: the Neural Engine is reported to refuse those.")  # fmt: skip
    blocks = [name for name, spec in integers.items() if spec["group_size"] < spec["shape"][1] and name not in chained]
    if blocks:
        notes.append(f"{len(blocks)} weights are integers in blocks within a row, which are made for the GPU; the "
                     "Neural Engine takes palettes, or one scale a row.")  # fmt: skip
    return notes
