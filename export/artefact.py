"""What lies beside an exported model: tokenizer, chat template, configs, and a manifest that accounts for every file.

`manifest.json`, schema 1:

    schema, format, dwindle      which layout this is and what wrote it
    family, parameters, bytes, context_length, vocabulary, kv_bytes_per_token, tied, layers
                                 the model: `bytes` and the rows of `layers` {parameters, bits, bytes, format} count
                                 what the exported bundle stores, tables included; format: float16, int4, palette4
    quantization                 count of tensors by format
    runtime                      what can run it: operator sets, minimum runtime or operating system
    versions                     of every library that took part
    source                       sha256 of the bundle that was exported and its lineage
    files                        path, bytes, sha256 of every other file of the folder
    parity                       numbers, limits and verdict of the executed check
    not_executed                 what, why: runtimes that the check could not reach

A manifest holds no time and no path of the machine: exporting the same bundle twice gives the same folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dwindle
from dwindle.bundle import ModelBundle
from dwindle.errors import OutputError
from dwindle.model_source import quiet_transformers
from dwindle.quantized_model import packed_specs
from dwindle.report import Parity, Skipped
from dwindle.storage import hash_file, read_json, write_json
from dwindle.weights import spec_bits

__all__ = ["MANIFEST_FILE", "manifest_of", "model_facts", "read_manifest", "require_artifact_place", "versions_of",
           "write_companions", "write_manifest"]  # fmt: skip

MANIFEST_FILE = "manifest.json"
SCHEMA = 1


def require_artifact_place(folder: Path, kind: str) -> None:
    """Raise OutputError unless `folder` is absent, empty, or an earlier artifact of the same format."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, a folder is needed. Choose another output; nothing was written.")
    if not any(folder.iterdir()):
        return
    try:
        found = read_manifest(folder)["format"]
    except OutputError:
        found = "no artifact of dwindle"
    if found != kind:
        raise OutputError(f"{folder} holds something else ({found}), not an earlier {kind} artifact. "
                          "Choose another output, or remove it; nothing was written.")  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact folder, or raise OutputError if there is none to read."""
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
        if manifest["schema"] != SCHEMA or not isinstance(manifest["format"], str):
            raise ValueError(f"schema {manifest['schema']!r}, format {manifest['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder}: no readable {MANIFEST_FILE} of schema {SCHEMA} ({error}). "
                          "Give a folder that `dwindle export` wrote.") from error  # fmt: skip
    return manifest


def write_companions(bundle: ModelBundle, folder: Path) -> None:
    """Write tokenizer files (with the chat template), configs and the map of a cut vocabulary into `folder`.

    config.json describes the float architecture: the packed checkpoint's quantization_config does not belong here.
    """
    with quiet_transformers():
        bundle.tokenizer.save_pretrained(folder)
        if bundle.model.generation_config is not None:
            bundle.model.generation_config.to_json_file(folder / "generation_config.json")
    config = {key: value for key, value in bundle.config_json().items() if key != "quantization_config"}
    write_json(folder / "config.json", config)
    if bundle.vocabulary_map is not None:  # the full teacher stays the reference of what is executed
        bundle.vocabulary_map.write(folder)


def model_facts(bundle: ModelBundle, context_length: int, kv_bytes_per_number: int) -> dict[str, Any]:
    """Return what the manifest says of the model, and what a device's cost model asks for."""
    anatomy, size = bundle.anatomy, bundle.size()
    return {
        "family": anatomy.model_type,
        "parameters": size.parameters,
        "bytes": size.bytes,
        "context_length": context_length,
        "vocabulary": anatomy.vocab,
        "kv_bytes_per_token": 2 * anatomy.layers * anatomy.kv_heads * anatomy.head_dim * kv_bytes_per_number,
        "tied": anatomy.tied,
        "layers": _layer_rows(bundle),
    }


def _layer_rows(bundle: ModelBundle) -> dict[str, dict[str, Any]]:
    """Return {module or parameter: row} in the model's order; a tied head stands under its embedding's name."""
    rows = {}
    for name, spec in packed_specs(bundle.model).items():
        prefix = "palette" if spec["kind"] == "palettized" else "int"
        rows[name] = _row(spec["shape"][0] * spec["shape"][1], spec_bits(spec), f"{prefix}{spec['bits']}")
    width, kind = torch.finfo(bundle.storage_dtype).bits, str(bundle.storage_dtype).removeprefix("torch.")
    for name, parameter in bundle.model.named_parameters():
        rows[name.removesuffix(".weight")] = _row(parameter.numel(), parameter.numel() * width, kind)
    order = {name: place for place, (name, _) in enumerate(bundle.model.named_modules())}
    return dict(sorted(rows.items(), key=lambda row: order.get(row[0], order.get(row[0].rpartition(".")[0], 0))))


def _row(parameters: int, stored_bits: int, kind: str) -> dict[str, Any]:
    return {"parameters": parameters, "bits": stored_bits / parameters, "bytes": -(-stored_bits // 8), "format": kind}


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, and dwindle's own."""
    return {"dwindle": dwindle.__version__, **{name: metadata.version(name) for name in names}}


def manifest_of(
    kind: str, bundle: ModelBundle, *, facts: Mapping[str, Any], runtime: Mapping[str, Any],
    versions: Mapping[str, str], parity: Parity, not_executed: Sequence[Skipped] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return what manifest.json says, all but the files."""
    formats = Counter(row["format"] for row in facts["layers"].values())
    return {
        "schema": SCHEMA,
        "format": kind,
        "dwindle": dwindle.__version__,
        **facts,
        "quantization": dict(sorted(formats.items())),
        "runtime": dict(runtime),
        "versions": dict(versions),
        "source": {"sha256": bundle.content_sha256, "lineage": bundle.lineage.to_json()["entries"]},
        "parity": asdict(parity),
        "not_executed": [asdict(one) for one in not_executed],
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json over all files that lie in `folder` now."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    listed = [{"path": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": hash_file(p)}
              for p in files]  # fmt: skip
    write_json(folder / MANIFEST_FILE, {**manifest, "files": listed})
