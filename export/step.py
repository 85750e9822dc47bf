"""The export step: write each format, reopen what was saved, execute it against the measured model, account for it.

The formats are the rows of `backends.BACKENDS`. All refusals come before any work. A format's folder is put in its
place when it is whole and checked; a missed limit does not raise here, it is told by the artifact's `parity.passed`
(see `parity.require_parity`).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dwindle.anatomy import require_dense
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError, offenders
from dwindle.export.adapter_package import ADAPTERS, adapter_factors, describe, write_adapter_files
from dwindle.export.adapter_parity import ADAPTER_LIMITS, adapters_parity
from dwindle.export.artefact import (
    manifest_of,
    model_facts,
    read_manifest,
    require_artifact_place,
    versions_of,
    write_companions,
    write_manifest,
)
from dwindle.export.backends import BACKENDS, Backend, ExecutedRunner, Written
from dwindle.export.carried_adapters import CarriedAdapter, carried_adapters
from dwindle.export.licence import licence_files, licence_lines
from dwindle.export.options import ExportOptions
from dwindle.export.package_readme import write_readme
from dwindle.export.parity import ParityLimits, decode_parity, parity_prompts
from dwindle.report import Artifact, Parity
from dwindle.resources import require_memory
from dwindle.storage import atomic_folder, folder_bytes, hash_folder, require_space
from dwindle.token_set import TokenSet

__all__ = ["open_artifact", "run"]

_log = logging.getLogger("dwindle")

_FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class _Texts:
    """What the parity check reads: prompts [1, T], the steps after each, and one text as long as the context."""

    prompts: list[Tensor]
    steps: int
    longest: Tensor


def run(
    bundle: ModelBundle, options: ExportOptions, output: Path, *, prompts: Sequence[Tensor] | None = None,
    evaluation: TokenSet | None = None, adapters: Sequence[Path] = (),
) -> list[Artifact]:  # fmt: skip
    """Export `bundle` into output/<format>/ for every format asked for; return one artifact each.

    `adapters` are folders of adapters of this very base (`carried_adapters`). Prompts [1, T] of the parity check come
    from `prompts`, else from `evaluation`, else from a fixed text.
    Raises RecipeError for what a format cannot carry, adapters of another base or prompts that do not fit, OutputError
    for places that hold something else, MissingExtra for a library that is not installed, UnsupportedModel for a model
    with experts; before anything is written.
    """
    require_dense(bundle.anatomy, "export")
    output, carried = Path(output), carried_adapters(bundle, adapters)
    options = _with_inputs(options.resolved(bundle.anatomy), carried)
    length, steps, longest = options.parity_lengths()
    if evaluation is not None:
        longest = min(longest, max(length, evaluation.ids.numel()))
    given = list(prompts) if prompts else parity_prompts(bundle, options.prompts, length, evaluation)
    texts = _Texts(given, steps, parity_prompts(bundle, 1, longest, evaluation)[0])
    _require_fitting(texts, options)
    _require_carried(bundle, options, carried)
    for name in options.formats:
        require_artifact_place(output / name, name)
    size = bundle.size().bytes
    require_space(output, 2 * size * len(options.formats))
    parts = {"the artifact": size, "the runtime that executes it": size}
    require_memory(f"export: {', '.join(options.formats)}", parts, "Quantize to fewer bits, or take more memory.")
    return [_export(name, bundle, options, output / name, texts, carried) for name in options.formats]


def open_artifact(folder: Path) -> ExecutedRunner:
    """Return a runner over an exported folder, of whatever format its manifest names.

    Raises OutputError if it is no artifact, RecipeError if nothing here executes its format.
    """
    manifest = read_manifest(folder)
    name = manifest["format"]
    if "task" in manifest:
        raise RecipeError(f"{folder}: this is an encoder ({manifest['task']}), which writes no text. Run it with "
                          "onnxruntime or optimum, as its README.md shows.")  # fmt: skip
    if name not in BACKENDS:
        raise RecipeError(f"{folder}: format {name!r} cannot be executed here; known: {', '.join(BACKENDS)}.")
    return BACKENDS[name].open(folder)


def _with_inputs(options: ExportOptions, adapters: Sequence[CarriedAdapter]) -> ExportOptions:
    """Return the options with the inputs that these adapters need."""
    if not adapters:
        return options
    kinds = {options.adapter_inputs, *(adapter.kind for adapter in adapters)}
    return replace(options, adapter_inputs="dora" if "dora" in kinds else "lora",
                   adapter_rank=max(options.adapter_rank, *(adapter.rank for adapter in adapters)))  # fmt: skip


def _export(
    name: str, bundle: ModelBundle, options: ExportOptions, place: Path, texts: _Texts,
    adapters: Sequence[CarriedAdapter],
) -> Artifact:  # fmt: skip
    form, started = BACKENDS[name], time.perf_counter()
    with atomic_folder(place) as partial:
        written = form.write(bundle, partial, options, adapters)
        files = _packed(form, bundle, partial, written, adapters)
        write_companions(bundle, partial)
        exported = time.perf_counter()
        _log.info("export: %s written in %.1f s, checking it", name, exported - started)
        runner = form.open(partial)
        parity = decode_parity(bundle, runner, texts.prompts, texts.steps, form.limits(options), runner.executed_by,
                               longest=texts.longest)  # fmt: skip
        found = _checked_adapters(bundle, runner, partial, adapters, texts, form.limits(options))
        runtime = {**written.runtime, "minimum_os": written.minimum_os, **_observed(runner)}
        del runner
        parity = next((one for one in found.values() if not one.passed), parity)
        packages = [
            describe(adapter, partial / ADAPTERS / adapter.name, {name: {
                "file": files.get(adapter.name), "parity": asdict(found[adapter.name])}})
            for adapter in adapters
        ]  # fmt: skip
        checked = time.perf_counter()
        facts = model_facts(bundle, options.context_length or 0, written.kv_bytes_per_number)
        versions, missing = versions_of(form.libraries), form.not_executed()
        manifest = manifest_of(name, bundle, facts=facts, runtime=runtime, versions=versions, parity=parity,
                               not_executed=missing)  # fmt: skip
        carried = {"adapter_inputs": written.adapters, "adapters": [
            {**package, "parity": asdict(found[package["name"]])} for package in packages]}  # fmt: skip
        manifest |= carried if written.adapters or packages else {}
        for file in licence_files(bundle):
            shutil.copyfile(file, partial / file.name)
        write_readme(partial, manifest, licence_lines=licence_lines(bundle))
        write_manifest(partial, manifest)
    if not parity.passed:
        _log.warning("export: %s misses its parity limits: %s", name, parity)
    return Artifact(
        format=name, path=str(place), bytes=folder_bytes(place), sha256=hash_folder(place), parity=parity,
        versions=versions, minimum_os=written.minimum_os,
        details={**facts, "runtime": runtime, "export_seconds": exported - started,
                 "parity_seconds": checked - exported, "not_executed": manifest["not_executed"],
                 **({"adapters": manifest["adapters"]} if adapters else {})},
    )  # fmt: skip


def _packed(
    form: Backend, bundle: ModelBundle, folder: Path, written: Written, adapters: Sequence[CarriedAdapter]
) -> dict[str, str]:  # fmt: skip
    """Write a folder for each adapter; return the name of the runtime's file in it, by adapter."""
    files = {}
    for adapter in adapters:
        place = folder / ADAPTERS / adapter.name
        write_adapter_files(adapter, place)
        if form.pack is not None:
            changes = adapter_factors(adapter, bundle)
            files[adapter.name] = form.pack(place, written.adapters, changes, adapter.card.base_sha256)
    return files


def _checked_adapters(
    bundle: ModelBundle, runner: ExecutedRunner, folder: Path, adapters: Sequence[CarriedAdapter], texts: _Texts,
    limits: ParityLimits,
) -> dict[str | None, Parity]:  # fmt: skip
    """Return the parity of each adapter by name, and of the base between them; says who executed it."""
    if not adapters:
        return {}
    for adapter in adapters:
        runner.load_adapter(folder / ADAPTERS / adapter.name)
    strict = ADAPTER_LIMITS if limits == ParityLimits() else limits
    found = adapters_parity(bundle, runner, adapters, texts.prompts[0], strict)
    return {name: replace(one, executed_by=f"{one.executed_by}, {f'adapter {name}' if name else 'between adapters'}")
            for name, one in found.items()}  # fmt: skip


def _observed(runner: ExecutedRunner) -> dict[str, Any]:
    """Return what a runner saw beyond logits: the largest number a float16 device would have had to hold."""
    peak = getattr(runner, "fp16_peak", None)
    if peak is None:
        return {}
    if peak > _FLOAT16_LARGEST:
        _log.warning("export: a value of %.3g exceeds float16's largest, %.0f; a device would overflow", peak,
                     _FLOAT16_LARGEST)  # fmt: skip
    return {"fp16_peak": float(peak)}


def _require_carried(bundle: ModelBundle, options: ExportOptions, adapters: Sequence[CarriedAdapter]) -> None:
    problems = [problem for name in options.formats for problem in BACKENDS[name].problems(bundle, options)]
    problems += [f"{name}: adapters are not carried in this format: {offenders(a.name for a in adapters)}."
                 for name in options.formats if adapters and not BACKENDS[name].adapters]  # fmt: skip
    if problems:
        raise RecipeError(f"export: {' '.join(problems)}")


def _require_fitting(texts: _Texts, options: ExportOptions) -> None:
    room = (options.context_length or 0) - texts.steps
    wrong = [list(p.shape) for p in texts.prompts if p.dim() != 2 or p.shape[0] != 1 or not 1 <= p.shape[1] <= room]
    if wrong:
        raise RecipeError(f"export: {len(wrong)} prompts have the shapes {wrong}; [1, T] with 1 to {room:,} tokens is "
                          f"needed, so that {texts.steps} steps fit into the context.")  # fmt: skip
