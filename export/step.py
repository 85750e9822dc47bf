"""The export step: write each format, reopen what was saved, execute it against the measured model, account for it.

A format is one row of `_FORMATS`: what it cannot carry, how it is written, how a saved folder is executed, and how
close it must come. All refusals come before any work. A format's folder is put in its place when it is whole and
checked; a missed limit does not raise here, it is told by the artifact's `parity.passed` (see `parity.require_parity`).
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.errors import MissingExtra, RecipeError
from dwindle.export.artefact import (
    model_facts,
    read_manifest,
    require_artifact_place,
    versions_of,
    write_companions,
    write_manifest,
)
from dwindle.export.options import ExportOptions
from dwindle.export.parity import DecodeRunner, ParityLimits, decode_parity, parity_prompts
from dwindle.report import Artifact
from dwindle.storage import atomic_folder, folder_bytes, hash_folder, require_space
from dwindle.token_set import TokenSet

__all__ = ["open_artifact", "run"]

_log = logging.getLogger("dwindle")

_INT8_LIMITS = ParityLimits(logit_error_share=0.1, kl_nats_per_token=5e-3, top1_agreement=0.9)
"""For activations rounded to int8 on request: far below what 4-bit weights cost, far above a wrong graph's error."""

_FLOAT16_LIMITS = ParityLimits(logit_error_share=5e-3, kl_nats_per_token=1e-5, top1_agreement=0.97)
"""For packages whose float tensors (norms, biases, embeddings of float32 checkpoints) are stored in float16."""

_FLOAT16_LARGEST = 65504.0


class ExecutedRunner(DecodeRunner, Protocol):
    """A DecodeRunner that says what executes it."""

    executed_by: str


@dataclass(frozen=True)
class _Written:
    """What an exporter says about the files it wrote."""

    runtime: dict[str, Any]
    minimum_os: str | None
    kv_bytes_per_number: int


@dataclass(frozen=True)
class _Format:
    """One row of the table; the functions import their libraries when called."""

    extra: str
    libraries: tuple[str, ...]
    limits: Callable[[ExportOptions], ParityLimits]
    problems: Callable[[ModelBundle], list[str]]
    write: Callable[[ModelBundle, Path, ExportOptions], _Written]
    open: Callable[[Path], ExecutedRunner]


def run(
    bundle: ModelBundle, options: ExportOptions, output: Path, *, prompts: Sequence[Tensor] | None = None,
    evaluation: TokenSet | None = None,
) -> list[Artifact]:  # fmt: skip
    """Export `bundle` into output/<format>/ for every format asked for; return one artifact each.

    Prompts [1, T] of the parity check come from `prompts`, else from `evaluation`, else from a fixed text.
    Raises RecipeError for what a format cannot carry or for prompts that do not fit, OutputError for places that hold
    something else, MissingExtra for a library that is not installed; before anything is written.
    """
    output, options = Path(output), options.resolved(bundle.anatomy)
    given = list(prompts) if prompts else parity_prompts(bundle, options.prompts, options.prompt_length(), evaluation)
    _require_fitting(given, options)
    _require_carried(bundle, options)
    for name in options.formats:
        require_artifact_place(output / name, name)
    require_space(output, 2 * bundle.size().bytes * len(options.formats))
    return [_export(name, bundle, options, output / name, given) for name in options.formats]


def open_artifact(folder: Path) -> ExecutedRunner:
    """Return a runner over an exported folder, of whatever format its manifest names.

    Raises OutputError if it is no artifact, RecipeError if nothing here executes its format.
    """
    name = read_manifest(folder)["format"]
    if name not in _FORMATS:
        raise RecipeError(f"{folder}: format {name!r} cannot be executed here; known: {', '.join(_FORMATS)}.")
    return _FORMATS[name].open(folder)


def _export(name: str, bundle: ModelBundle, options: ExportOptions, place: Path, prompts: list[Tensor]) -> Artifact:
    form, started = _FORMATS[name], time.perf_counter()
    with atomic_folder(place) as partial:
        written = form.write(bundle, partial, options)
        write_companions(bundle, partial)
        exported = time.perf_counter()
        _log.info("export: %s written in %.1f s, checking it", name, exported - started)
        runner = form.open(partial)
        parity = decode_parity(bundle, runner, prompts, options.decode_steps, form.limits(options),
                               runner.executed_by)  # fmt: skip
        runtime = {**written.runtime, "minimum_os": written.minimum_os, **_observed(runner)}
        del runner
        checked = time.perf_counter()
        facts = model_facts(bundle, options.context_length or 0, written.kv_bytes_per_number)
        versions = versions_of(form.libraries)
        write_manifest(partial, name, bundle, facts=facts, runtime=runtime, versions=versions, parity=parity)
    if not parity.passed:
        _log.warning("export: %s misses its parity limits: %s", name, parity)
    return Artifact(
        format=name, path=str(place), bytes=folder_bytes(place), sha256=hash_folder(place), parity=parity,
        versions=versions, minimum_os=written.minimum_os,
        details={**facts, "runtime": runtime, "export_seconds": exported - started,
                 "parity_seconds": checked - exported},
    )  # fmt: skip


def _observed(runner: ExecutedRunner) -> dict[str, Any]:
    """Return what a runner saw beyond logits: the largest number a float16 device would have had to hold."""
    peak = getattr(runner, "fp16_peak", None)
    if peak is None:
        return {}
    if peak > _FLOAT16_LARGEST:
        _log.warning("export: a value of %.3g exceeds float16's largest, %.0f; a device would overflow", peak,
                     _FLOAT16_LARGEST)  # fmt: skip
    return {"fp16_peak": float(peak)}


def _require_carried(bundle: ModelBundle, options: ExportOptions) -> None:
    problems = [problem for name in options.formats for problem in _FORMATS[name].problems(bundle)]
    if problems:
        raise RecipeError(f"export: {' '.join(problems)}")


def _require_fitting(prompts: Sequence[Tensor], options: ExportOptions) -> None:
    room = (options.context_length or 0) - options.decode_steps
    wrong = [list(p.shape) for p in prompts if p.dim() != 2 or p.shape[0] != 1 or not 1 <= p.shape[1] <= room]
    if wrong:
        raise RecipeError(f"export: {len(wrong)} prompts have the shapes {wrong}; [1, T] with 1 to {room:,} tokens is "
                          f"needed, so that {options.decode_steps} steps fit into the context.")  # fmt: skip


def _module(name: str, extra: str) -> Any:
    """Return a module of this room that needs libraries of `extra`, or raise MissingExtra."""
    try:
        return importlib.import_module(f"dwindle.export.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "dwindle":
            raise
        raise MissingExtra(f"Exporting to {extra}", extra) from error


def _onnx_limits(options: ExportOptions) -> ParityLimits:
    return ParityLimits() if options.activations == "float32" else _INT8_LIMITS


def _onnx_problems(bundle: ModelBundle) -> list[str]:
    found: list[str] = _module("onnx_graph", "onnx").onnx_problems(bundle)
    return found


def _write_onnx(bundle: ModelBundle, folder: Path, options: ExportOptions) -> _Written:
    from dwindle.export.genai_config import genai_config
    from dwindle.storage import write_json

    graph, builder = _module("onnx_graph", "onnx"), _module("onnx_builder", "onnx")
    graph.export_onnx(bundle, folder, options)
    write_json(folder / "genai_config.json", genai_config(bundle, options.context_length or 0))
    opsets = {domain or "ai.onnx": version for domain, version in builder.OPSETS.items()}
    return _Written({"opsets": opsets, "minimum_runtime": "onnxruntime 1.23", "activations": options.activations,
                     "compute": "float32"}, None, 4)  # fmt: skip


def _open_onnx(folder: Path) -> ExecutedRunner:
    runner: ExecutedRunner = _module("onnx_runner", "onnx").OnnxRunner(folder)
    return runner


def _coreml_problems(bundle: ModelBundle) -> list[str]:
    found: list[str] = _module("coreml_weights", "coreml").coreml_problems(bundle)
    return found


def _write_coreml(bundle: ModelBundle, folder: Path, options: ExportOptions) -> _Written:
    info = _module("coreml_package", "coreml").export_coreml(bundle, folder, options)
    runtime = {"package": info.package.name, "weight_bytes": info.weight_bytes, "compute": "float16",
               "notes": list(info.notes)}  # fmt: skip
    return _Written(runtime, info.minimum_os, 2)


def _open_coreml(folder: Path) -> ExecutedRunner:
    runner: ExecutedRunner = _module("coreml_runner", "coreml").CoreMLEvaluatorRunner(folder)
    return runner


_FORMATS: dict[str, _Format] = {
    "onnx": _Format(
        extra="onnx", libraries=("onnx", "onnxruntime", "torch", "transformers"), limits=_onnx_limits,
        problems=_onnx_problems, write=_write_onnx, open=_open_onnx,
    ),
    "coreml": _Format(
        extra="coreml", libraries=("coremltools", "numpy", "torch", "transformers"), limits=lambda _: _FLOAT16_LIMITS,
        problems=_coreml_problems, write=_write_coreml, open=_open_coreml,
    ),
}  # fmt: skip
