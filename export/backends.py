"""The table of formats: what each cannot carry, how it is written and executed, how close it must come.

A backend's functions import their libraries when they are called, so that a format whose packages are not installed
costs the others nothing; `not_executed` says what no machine like this one can run, and why.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dwindle.bundle import ModelBundle
from dwindle.errors import MissingExtra
from dwindle.export.adapter_package import adapter_factors
from dwindle.export.carried_adapters import CarriedAdapter
from dwindle.export.options import ExportOptions
from dwindle.export.parity import DecodeRunner, ParityLimits
from dwindle.low_rank import Factors
from dwindle.report import Skipped

__all__ = ["BACKENDS", "Backend", "ExecutedRunner", "Written"]

_INT8_LIMITS = ParityLimits(logit_error_share=0.1, kl_nats_per_token=5e-3, top1_agreement=0.9)
"""For activations rounded to int8 on request: far below what 4-bit weights cost, far above a wrong graph's error."""

_INT8_CACHE_LIMITS = ParityLimits(logit_error_share=0.2, kl_nats_per_token=1.5e-2, top1_agreement=0.9)
"""For keys and values rounded to int8 on request. Trained models err by up to 0.019 of the largest logit and 3e-4 nats;
one with heads of 8 dimensions and large keys by 0.15 and 7e-3."""

_FLOAT16_LIMITS = ParityLimits(logit_error_share=1e-2, kl_nats_per_token=3e-5, top1_agreement=0.97)
"""For float tensors (norms, biases, embeddings of float32 checkpoints, a KV cache) that are stored in float16. Three of
four trained models stay below 1.2e-6 nats; the fourth, with heads of 8 dimensions and large keys, reaches 5.5e-3 of its
largest logit and 9e-6 nats in mixed palettes. The order of float32 sums alone stays below 1e-5 and 1e-10."""

_FLOAT16_COMPUTE_LIMITS = ParityLimits(logit_error_share=0.05, kl_nats_per_token=1e-3, top1_agreement=0.9)
"""For Core ML itself, which sums in float16 where the device does."""


class ExecutedRunner(DecodeRunner, Protocol):
    """A DecodeRunner that says what executes it, and swaps adapters between texts."""

    executed_by: str
    context: int

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    @property
    def adapters(self) -> Sequence[str]:
        """Return the names that may be activated."""

    def load_adapter(self, folder: Path) -> str:
        """Load a packaged adapter; return its name."""

    def activate(self, name: str | None) -> None:
        """Use an adapter, or with None the base, from the next text on; the cache is emptied."""


@dataclass(frozen=True)
class Written:
    """What an exporter says about the files it wrote."""

    runtime: dict[str, Any]
    minimum_os: str | None
    kv_bytes_per_number: int
    adapters: dict[str, Any] = field(default_factory=dict)
    """How adapters are handed in: what packaging one later needs, as the manifest keeps it."""


@dataclass(frozen=True)
class Backend:
    """One format; the functions import their libraries when called."""

    extra: str
    libraries: tuple[str, ...]
    limits: Callable[[ExportOptions], ParityLimits]
    problems: Callable[[ModelBundle, ExportOptions], list[str]]
    write: Callable[[ModelBundle, Path, ExportOptions, Sequence[CarriedAdapter]], Written]
    open: Callable[[Path], ExecutedRunner]
    not_executed: Callable[[], tuple[Skipped, ...]]
    pack: Callable[[Path, Mapping[str, Any], Mapping[str, Factors], str], str] | None = None
    """(adapter's folder, `Written.adapters`, factors, base hash) -> name of the file written into it; None: an adapter
    is no file of its own in this format."""
    adapters: bool = False
    """It carries adapters beside the base."""


def _module(name: str, extra: str) -> Any:
    """Return a module of this room that needs libraries of `extra`, or raise MissingExtra."""
    try:
        return importlib.import_module(f"dwindle.export.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "dwindle":
            raise
        raise MissingExtra(f"Exporting to {extra}", extra) from error


def _onnx_limits(options: ExportOptions) -> ParityLimits:
    if options.kv_cache == "int8":
        return _INT8_CACHE_LIMITS
    if options.activations == "int8":
        return _INT8_LIMITS
    return _FLOAT16_LIMITS if options.kv_cache == "float16" else ParityLimits()


def _onnx_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    found: list[str] = _module("onnx_graph", "onnx").onnx_problems(bundle, options)
    return found


def _write_onnx(bundle: ModelBundle, folder: Path, options: ExportOptions, _: Sequence[CarriedAdapter]) -> Written:
    from dwindle.export.genai_config import genai_config
    from dwindle.storage import write_json

    graph, builder = _module("onnx_graph", "onnx"), _module("onnx_builder", "onnx")
    products = graph.export_onnx(bundle, folder, options)
    write_json(folder / "genai_config.json", genai_config(bundle, options))
    opsets = {domain or "ai.onnx": version for domain, version in builder.OPSETS.items()}
    kv = _module("onnx_kv", "onnx")
    runtime = {"opsets": opsets, "minimum_runtime": kv.minimum_runtime(options), "operators": options.operators,
               "activations": options.activations, "kv_cache": options.kv_cache, "compute": "float32"}  # fmt: skip
    adapters = {"inputs": options.adapter_inputs, "products": products} if products else {}
    return Written(runtime, None, kv.KV_BYTES[options.kv_cache], adapters)


def _pack_onnx(folder: Path, inputs: Mapping[str, Any], changes: Mapping[str, Factors], base_sha256: str) -> str:
    made = _module("onnx_adapters", "onnx")
    arrays = made.packed_arrays(inputs["products"], changes)
    made.write_adapter_file(folder / made.ADAPTER_FILE, arrays, base_sha256)
    name: str = made.ADAPTER_FILE
    return name


def _open_onnx(folder: Path) -> ExecutedRunner:
    runner: ExecutedRunner = _module("onnx_runner", "onnx").OnnxRunner(folder)
    return runner


def _shapes(options: ExportOptions) -> dict[str, Any]:
    fixed = {"prefill_tokens": options.prefill_tokens} if options.shapes == "static" else {}
    return {"shapes": options.shapes, **fixed}


def _coreml_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    found: list[str] = _module("coreml_weights", "coreml").coreml_problems(bundle, options)
    return found


def _write_coreml(
    bundle: ModelBundle, folder: Path, options: ExportOptions, adapters: Sequence[CarriedAdapter]
) -> Written:
    changes = {adapter.name: adapter_factors(adapter, bundle) for adapter in adapters}
    info = _module("coreml_package", "coreml").export_coreml(bundle, folder, options, changes)
    runtime = {**_shapes(options), **info.facts()}
    functions = {name: list(names) for name, names in info.adapters.items()}
    inputs = {"inputs": "functions", "functions": functions} if functions else {}
    return Written(runtime, info.minimum_os, 2, inputs)


def _open_coreml(folder: Path) -> ExecutedRunner:
    runner: ExecutedRunner = _module("coreml_runner", "coreml").open_package(folder)
    return runner


def _coreml_limits(_: ExportOptions) -> ParityLimits:
    return _FLOAT16_COMPUTE_LIMITS if sys.platform == "darwin" else _FLOAT16_LIMITS


def _coreml_not_executed() -> tuple[Skipped, ...]:
    if sys.platform == "darwin":
        return (Skipped("Core ML on an iPhone", "only this Mac was reached"),)
    why = "it runs on macOS and iOS only; the saved package was computed by dwindle's MIL evaluator in float32"
    return (Skipped("Core ML's own runtime", why),)


def _coreai_limits(options: ExportOptions) -> ParityLimits:
    return _FLOAT16_LIMITS if options.shapes == "static" else ParityLimits()


def _coreai_problems(bundle: ModelBundle, options: ExportOptions) -> list[str]:
    found: list[str] = _module("coreai_weights", "coreai").coreai_problems(bundle, options)
    return found


def _write_coreai(
    bundle: ModelBundle, folder: Path, options: ExportOptions, _: Sequence[CarriedAdapter]
) -> Written:  # fmt: skip
    info = _module("coreai_asset", "coreai").export_coreai(bundle, folder, options)
    compute, number_bytes = ("float16", 2) if options.shapes == "static" else ("float32", 4)
    runtime = {"asset": info.asset.name, "compute": compute, "notes": list(info.notes), **_shapes(options)}
    return Written(runtime, info.minimum_os, number_bytes, info.adapters)


def _pack_coreai(folder: Path, inputs: Mapping[str, Any], changes: Mapping[str, Factors], base_sha256: str) -> str:
    made = _module("coreai_adapters", "coreai")
    made.write_inputs(folder / made.INPUTS_FILE, made.input_arrays(inputs, changes), base_sha256)
    name: str = made.INPUTS_FILE
    return name


def _open_coreai(folder: Path) -> ExecutedRunner:
    runner: ExecutedRunner = _module("coreai_runner", "coreai").CoreAIRunner(folder)
    return runner


def _coreai_not_executed() -> tuple[Skipped, ...]:
    why = "they are not on this machine; Apple's runtime executed the asset on its CPU interpreter, in float32"
    return (Skipped("Core AI on a GPU or a Neural Engine", why),)


BACKENDS: dict[str, Backend] = {
    "onnx": Backend(
        extra="onnx", libraries=("onnx", "onnxruntime", "torch", "transformers"), limits=_onnx_limits,
        problems=_onnx_problems, write=_write_onnx, open=_open_onnx, not_executed=lambda: (),
        pack=_pack_onnx, adapters=True,
    ),
    "coreml": Backend(
        extra="coreml", libraries=("coremltools", "numpy", "torch", "transformers"), limits=_coreml_limits,
        problems=_coreml_problems, write=_write_coreml, open=_open_coreml, not_executed=_coreml_not_executed,
        adapters=True,
    ),
    "coreai": Backend(
        extra="coreai", libraries=("coreai-core", "coreai-torch", "torch", "transformers"),
        limits=_coreai_limits, problems=_coreai_problems, write=_write_coreai, open=_open_coreai,
        not_executed=_coreai_not_executed, pack=_pack_coreai, adapters=True,
    ),
}  # fmt: skip
