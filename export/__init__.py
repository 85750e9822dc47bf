"""Export: a decoder written as ONNX, Core ML and Core AI, executed, and held to the model that was measured.

`run(bundle, ExportOptions(...), folder)` returns artifacts; `require_parity` turns a miss into an error;
`open_artifact(folder)` executes what was exported; `export_encoder` is for models that write no text.

    the step          options, step, backends (the table of formats), parity, artefact, licence,
                      package_readme, packed_widths
    adapters          carried_adapters, adapter_package, adapter_parity, adapter_shelf, later_adapter
    the decoder       decoder, rotary, kv_cache
    ONNX              onnx_graph, onnx_attention, onnx_linears, onnx_quantized, onnx_kv, onnx_builder; onnx_runner;
                      onnx_adapters, genai_config
    Core ML           coreml_package, coreml_decoder, coreml_convert, coreml_weights, coreml_merge, coreml_chunks,
                      coreml_engine, coreml_files; coreml_runner, coreml_interface
    a saved package   mil_evaluator, mil_reader, mil_operations
    Core AI           coreai_asset, coreai_decoder, coreai_weights; coreai_runner, coreai_float32
    encoders          encoders, encoder_source, encoder_weights, encoder_parity
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwindle.export.encoders import EncoderOptions as EncoderOptions
    from dwindle.export.encoders import export_encoder as export_encoder
    from dwindle.export.later_adapter import package_adapter as package_adapter
    from dwindle.export.options import ExportOptions as ExportOptions
    from dwindle.export.parity import ParityLimits as ParityLimits
    from dwindle.export.parity import decode_parity as decode_parity
    from dwindle.export.parity import require_parity as require_parity
    from dwindle.export.step import open_artifact as open_artifact
    from dwindle.export.step import run as run

_HOMES = {
    "EncoderOptions": "encoders",
    "ExportOptions": "options",
    "ParityLimits": "parity",
    "decode_parity": "parity",
    "export_encoder": "encoders",
    "open_artifact": "step",
    "package_adapter": "later_adapter",
    "require_parity": "parity",
    "run": "step",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dwindle.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dwindle.export.{_HOMES[name]}"), name)
