"""Measurements on real targets. This machine, through plain ONNX Runtime on the exported folder. Torch-free.

Decode tokens/s at batch 1 after a stated prompt, time to first token, peak resident memory of a fresh process over its
state before the model was loaded: the definitions of the report. Each is the median of the repeats, its range their
extremes. The session's first run, which warms caches and packs weights, is one of the repeats on purpose for the time
to first token's `high`; the median leaves it out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwindle.devices.cost_model import DEFAULT_PROMPT_TOKENS, METRIC_UNITS
from dwindle.errors import MissingExtra, RecipeError, UnsupportedModel
from dwindle.report import Metric
from dwindle.storage import folder_bytes

__all__ = ["BenchOptions", "measure_host"]


@dataclass(frozen=True)
class BenchOptions:
    """How an artifact is measured."""

    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    """Tokens before the first generated one; cut to half of the context."""
    decode_tokens: int = 64
    """Tokens generated per repeat; cut to what the context leaves."""
    threads: int | None = None
    """Threads of the runtime; None leaves it to the runtime (one per core)."""
    repeats: int = 3
    """Runs of prompt and decoding; the median counts."""
    timeout_seconds: float = 1800.0
    """When to give up on a run that does not end."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"threads={self.threads}: must be at least 1, or left out.")
        if self.timeout_seconds <= 0:
            raise RecipeError(f"timeout_seconds={self.timeout_seconds}: must be more than 0.")


def measure_host(artifact_folder: Path | str, options: BenchOptions | None = None) -> list[Metric]:
    """Return the measured metrics of an exported ONNX folder on this machine.

    Raises UnsupportedModel for a folder that is no such artifact or that ONNX Runtime refuses, MissingExtra without
    onnxruntime.
    """
    options = options or BenchOptions()
    folder = Path(artifact_folder)
    context = _context(folder)
    if find_spec("onnxruntime") is None:
        raise MissingExtra("Measuring an ONNX artifact on this machine", "onnx")
    prompt = min(options.prompt_tokens, max(1, context // 2))
    decode = min(options.decode_tokens, context - prompt)
    found = _probe(folder, prompt, decode, options)
    rates = [1 / seconds for seconds in found["token_seconds"]]
    return [
        _median("tokens_per_second", rates),
        _median("time_to_first_token_seconds", found["first_token_seconds"]),
        _median("load_seconds", [float(found["load_seconds"])]),
        _median("peak_memory_bytes", [float(found["peak_memory_bytes"])]),
        _median("package_bytes", [float(folder_bytes(folder))]),
    ]


def _median(name: str, values: list[float]) -> Metric:
    spread = (min(values), max(values)) if len(values) > 1 else (None, None)
    return Metric(name, statistics.median(values), METRIC_UNITS[name], "measured", low=spread[0], high=spread[1])


def _context(folder: Path) -> int:
    """Return the artifact's context length, after checking that the files are there."""
    missing = [name for name in ("model.onnx", "config.json") if not (folder / name).is_file()]
    if missing:
        raise UnsupportedModel(
            f"{folder}: {', '.join(missing)} not found. Needed: a folder written by `dwindle export --format onnx`."
        )
    settings: dict[str, Any] = {}
    for name in ("config.json", "manifest.json"):
        if (folder / name).is_file():
            try:
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise UnsupportedModel(
                    f"{folder / name}: is not a JSON object ({error}). Export the model again."
                ) from error
    context = settings.get("context_length") or settings.get("max_position_embeddings")
    if not isinstance(context, int) or context < 2:
        raise UnsupportedModel(
            f"{folder}: neither manifest.json nor config.json gives a context length of 2 or more "
            f"(found {context!r}). Export the model again."
        )
    return context


def _probe(folder: Path, prompt: int, decode: int, options: BenchOptions) -> dict[str, Any]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "dwindle.devices.host_probe",
        str(folder.resolve()),
        "--prompt-tokens",
        str(prompt),
        "--decode-tokens",
        str(decode),
        "--repeats",
        str(options.repeats),
    ]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout_seconds, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UnsupportedModel(
            f"{folder}: the measurement did not end within {options.timeout_seconds:g} s. "
            "Lower prompt_tokens, decode_tokens or repeats, or raise timeout_seconds."
        ) from error
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UnsupportedModel(f"{folder}: ONNX Runtime ended without an answer ({why[0]}).") from error
    if "error" in found:
        raise UnsupportedModel(f"{folder}: ONNX Runtime cannot run it: {found['error']}")
    return dict(found)
