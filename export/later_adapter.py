"""An adapter for a base that has shipped: packaged for its artifacts without touching them.

The artifact has to be ready for adapters (exported with `adapter_inputs`, or with another adapter). What packaging
needs to know of it stands in its manifest: the hash of the base, and the inputs. A DoRA adapter also needs the base
itself, whose rows' lengths it changes. With the base at hand the adapter is executed in each artifact and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dwindle.anatomy import anatomy_of
from dwindle.bundle import ModelBundle
from dwindle.errors import OutputError, RecipeError
from dwindle.export.adapter_package import PACKAGE_FILE, adapter_factors, describe, keep_earlier, write_adapter_files
from dwindle.export.adapter_parity import ADAPTER_LIMITS, adapters_parity
from dwindle.export.artefact import read_manifest
from dwindle.export.backends import BACKENDS
from dwindle.export.carried_adapters import CarriedAdapter, read_adapters
from dwindle.export.parity import ParityLimits, parity_prompts
from dwindle.export.step import open_artifact
from dwindle.model_source import load_config
from dwindle.report import Parity
from dwindle.storage import atomic_folder

__all__ = ["package_adapter"]

_TEXT_TOKENS = 32


def package_adapter(
    adapter: Path, artefacts: Sequence[Path], output: Path, bundle: ModelBundle | None = None
) -> dict[str, Any]:
    """Write `output`, a package of `adapter` for these artifacts; return its package.json.

    Raises RecipeError with every reason why an artifact cannot take it, OutputError for a place that holds something
    else; before anything is written.
    """
    _require_place(output)
    manifests = {folder: read_manifest(folder) for folder in artefacts}
    problems = [f"{folder}: {problem}" for folder, found in manifests.items() for problem in _problems(found)]
    kinds = [found["format"] for found in manifests.values()]
    if len(set(kinds)) < len(kinds):
        problems.append(f"two artifacts have one format ({', '.join(kinds)}); package them one after the other.")
    if bundle is not None:
        problems += [f"{folder}: made from {found['source']['sha256'][:12]}, the base that was given is "
                     f"{bundle.content_sha256[:12]}." for folder, found in manifests.items()
                     if found["source"]["sha256"] != bundle.content_sha256]  # fmt: skip
    if problems:
        raise RecipeError(f"adapters package: {' '.join(problems)}")
    carried = replace(_fitting(adapter, manifests), name=output.resolve().name)
    changes = adapter_factors(carried, bundle)
    with atomic_folder(output) as partial:
        keep_earlier(carried, output, partial)
        write_adapter_files(carried, partial)
        rows: dict[str, dict[str, Any]] = {}
        for folder, found in manifests.items():
            form, inputs = BACKENDS[found["format"]], found["adapter_inputs"]
            assert form.pack is not None
            rows[found["format"]] = {"file": form.pack(partial, inputs, changes, carried.card.base_sha256)}
            parity = _executed(carried, partial, folder, bundle)
            if parity is not None:
                rows[found["format"]]["parity"] = asdict(parity)
        return describe(carried, partial, rows)


def _require_place(output: Path) -> None:
    if output.exists() and not (output / PACKAGE_FILE).is_file() and (output.is_file() or any(output.iterdir())):
        raise OutputError(f"{output} holds something else than a packaged adapter. Choose another output; nothing was "
                          "written.")  # fmt: skip


def _problems(manifest: dict[str, Any]) -> list[str]:
    """Return why an artifact takes no adapter that is packaged later."""
    form = BACKENDS.get(manifest["format"])
    if form is None or "task" in manifest or form.pack is None:
        return [f"adapters of a {manifest['format']} artifact cannot be added later; export it again with --adapter."]
    if not manifest.get("adapter_inputs"):
        return ["it has no inputs for adapters; export it again with --adapter, or with --set adapter_inputs=lora."]
    return []


def _fitting(folder: Path, manifests: dict[Path, dict[str, Any]]) -> CarriedAdapter:
    """Return the adapter, held to the base of every artifact."""
    carried = None
    for artefact, found in manifests.items():
        anatomy = anatomy_of(load_config(artefact))
        (carried,) = read_adapters([folder], found["source"]["sha256"], anatomy)
        if carried.scales_rows and found["adapter_inputs"]["inputs"] != "dora":
            raise RecipeError(f"{folder} is a DoRA adapter, and {artefact} has no inputs for scales of rows. Export it "
                              "again with --set adapter_inputs=dora.")  # fmt: skip
    if carried is None:
        raise RecipeError("adapters package: no artifact was named. Name the exported folders with --for.")
    return carried


def _executed(carried: CarriedAdapter, folder: Path, artefact: Path, bundle: ModelBundle | None) -> Parity | None:
    """Load the adapter into the artifact; with the base at hand, return how closely the two together follow it."""
    runner = open_artifact(artefact)
    name = runner.load_adapter(folder)
    if bundle is None:
        return None
    stored = read_manifest(artefact)["parity"]["limits"]
    limits = ParityLimits(**{key: stored[key] for key in ParityLimits.__dataclass_fields__ if key in stored})
    text = parity_prompts(bundle, 1, min(_TEXT_TOKENS, runner.context))[0]
    strict = ADAPTER_LIMITS if limits == ParityLimits() else limits
    return adapters_parity(bundle, runner, [replace(carried, name=name)], text, strict)[name]
