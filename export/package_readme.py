"""README.md of an exported folder, for whoever builds the app: what this is, what it may be used for, how to run it.

The facts are those of manifest.json, the code is that of a template a format (`templates/*.md.j2`): the shortest
program that turns a prompt into text, with the names, shapes and numbers of this very folder filled in. Python is run
by the tests as it stands in the file; Swift and Kotlin have no runtime on Linux, and the README says so.

    onnx     Python and Kotlin with ONNX Runtime GenAI; for an encoder, ONNX Runtime alone
    coreml   Swift: states, causal mask, one function of any length or two of fixed length, one package or several
    coreai   Swift: two functions over two states

The README is written before manifest.json, which then accounts for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwindle.errors import OutputError
from dwindle.storage import folder_bytes, write_text

__all__ = ["README_FILE", "write_readme"]

README_FILE = "README.md"
_TEMPLATES = {"onnx": "onnx.md.j2", "coreml": "coreml.md.j2", "coreai": "coreai.md.j2"}
_ENCODER = "encoder.md.j2"
_LONGEST = 256
"""Tokens after which the examples stop, where the context is not shorter."""
_PACKAGES = (".mlpackage", ".aimodel")
"""Folders that a platform treats as one file."""
_ROLES = {
    "model.onnx": "the model",
    "model.onnx.data": "its weights",
    "model.onnx_data": "its weights",
    "model.mlpackage": "the model",
    "model.aimodel": "the model",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "its settings",
    "chat_template.jinja": "how messages become a prompt",
    "special_tokens_map.json": "tokens with a meaning of their own",
    "config.json": "the architecture, as transformers writes it",
    "generation_config.json": "ends of text and sampling defaults",
    "genai_config.json": "what ONNX Runtime GenAI reads",
    "vocabulary_map.json": "which token of the full vocabulary each token is",
    "manifest.json": "all facts and hashes, for programs",
    "modules.json": "what sentence-transformers reads",
}


def write_readme(folder: Path, manifest: Mapping[str, Any], *, licence_lines: Sequence[str]) -> Path:
    """Write README.md into an artifact folder from its manifest (`artefact.manifest_of`); return its path.

    Raises OutputError for a format without a template.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    kind = str(manifest["format"])
    if kind not in _TEMPLATES:
        raise OutputError(f"{folder}: no README is known for format {kind!r}; known: {', '.join(_TEMPLATES)}.")
    environment = Environment(  # noqa: S701 - Markdown, and code in it, not HTML
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["short"] = lambda value: f"{value:.3g}"
    page = environment.get_template("package.md.j2").render(
        manifest=manifest, facts=_fact_rows(manifest), files=_file_rows(folder), licence_lines=list(licence_lines),
        parity=_parity_rows(manifest["parity"]), program=_ENCODER if "task" in manifest else _TEMPLATES[kind],
        code=_code_values(folder, manifest),
    )  # fmt: skip
    write_text(folder / README_FILE, page)
    return folder / README_FILE


def _fact_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what an app developer plans with; rows without a value are left out."""
    runtime = manifest["runtime"]
    kinds = [f"{count:,} x {kind}" for kind, count in manifest["quantization"].items()]
    opsets = [f"{domain} {version}" for domain, version in runtime.get("opsets", {}).items()]
    cache = manifest.get("kv_bytes_per_token")
    rows = [
        ("Family", manifest["family"]),
        ("Task", manifest.get("task", "text generation")),
        ("Parameters", f"{manifest['parameters']:,}"),
        ("Weights", f"{manifest['bytes']:,} bytes ({8 * manifest['bytes'] / manifest['parameters']:.2f} bits each)"),
        ("Stored as", "; ".join(kinds)),
        ("Longest text", f"{manifest['context_length']:,} tokens"),
        ("Vocabulary", f"{manifest['vocabulary']:,} tokens"),
        ("KV cache", f"{cache:,} bytes a token, {cache * manifest['context_length']:,} at most" if cache else ""),
        ("Pooling", _pooling(manifest)),
        ("Labels", ", ".join(manifest.get("labels") or [])),
        ("Runs on", runtime.get("minimum_os") or runtime.get("minimum_runtime") or ""),
        ("Shapes", runtime.get("shapes", "")),
        ("Operator sets", ", ".join(opsets)),
        ("Computes in", runtime.get("compute", "")),
        ("Activations", runtime.get("activations", "")),
    ]
    return [(name, str(value)) for name, value in rows if value]


def _pooling(manifest: Mapping[str, Any]) -> str:
    parts = manifest.get("pooling")
    if not parts:
        return ""
    return " + ".join(parts) + (", scaled to length 1" if manifest.get("normalized") else "")


def _file_rows(folder: Path) -> list[tuple[str, str, str]]:
    """Return (name, bytes, role) of each file; a package counts as one, manifest.json is written afterwards."""
    rows = []
    for path in sorted(folder.rglob("*")):
        inside = any(parent.suffix in _PACKAGES for parent in path.relative_to(folder).parents)
        if inside or path.name in (README_FILE, "manifest.json") or (path.is_dir() and path.suffix not in _PACKAGES):
            continue
        name = path.relative_to(folder).as_posix()
        role = _ROLES.get(name, "a part of the model" if path.is_dir() else "")
        rows.append((name, f"{folder_bytes(path):,}", role))
    return [*rows, ("manifest.json", "", _ROLES["manifest.json"])]


def _parity_rows(parity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (measure, value, limit) of the executed check."""
    limits = parity["limits"]
    named = [
        ("max_abs_logit_error", "largest error of an output", "at most", "{:.3g}"),
        ("kl_nats_per_token", "KL divergence, nats", "at most", "{:.3g}"),
        ("top1_agreement", "same first choice", "at least", "{:.2%}"),
        ("cosine_min", "smallest cosine of embeddings", "at least", "{:.5f}"),
        ("cosine_mean", "mean cosine of embeddings", "at least", "{:.5f}"),
    ]
    return [
        (label, form.format(parity[key]), f"{side} {form.format(limits[key])}" if key in limits else "none")
        for key, label, side, form in named
        if parity.get(key) is not None
    ]


def _code_values(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the programs are filled with."""
    runtime = manifest["runtime"]
    static = runtime.get("shapes") == "static"
    return {
        "longest": min(_LONGEST, int(manifest["context_length"])),
        "chat": _chat_place(folder),
        "static": static,
        "prefill_tokens": runtime["prefill_tokens"] if static else None,
        "packages": sorted(path.name for path in folder.glob("*.mlpackage")),
        "state_shape": _state_shape(folder, manifest),
        "scalar": runtime.get("compute") or ("float16" if static else "float32"),
        "ends": _ends(folder),
        "outputs": {"question-answering": ["start_logits", "end_logits"]}.get(manifest.get("task", ""), ["logits"]),
    }


def _chat_place(folder: Path) -> str | None:
    """Return the file that holds the chat template, if there is one."""
    if (folder / "chat_template.jinja").is_file():
        return "chat_template.jinja"
    return "tokenizer_config.json" if _json(folder / "tokenizer_config.json").get("chat_template") else None


def _state_shape(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """Return [L, 1, K, context, D] of key_cache and value_cache."""
    config = _json(folder / "config.json")
    heads = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size") or 0) // heads)
    key_heads = int(config.get("num_key_value_heads") or heads)
    return [int(config.get("num_hidden_layers") or 0), 1, key_heads, int(manifest["context_length"]), head_dim]


def _ends(folder: Path) -> list[int]:
    """Return the ids that end a text."""
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]


def _json(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return held
