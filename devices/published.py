"""Published measurements of decoders on devices, as `published.yaml` holds them. Torch-free.

A row names a device, the engine that ran (what decides its constants), the model, tokens/s of decode and prompt
tokens/s of prefill, and its source with date and trust. What a token reads and multiplies is derived from the shapes
and the format of its model, and stands once per model. Rows that were published but say too little to be used stand in
the file too, each with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Published", "published"]

_FILE = Path(__file__).parent / "published.yaml"
_DEFAULT_PROMPT, _DEFAULT_CACHED = 512, 64
"""llama-bench: pp512, and tg128 with 64 tokens in the cache on the average."""


@dataclass(frozen=True)
class Published:
    """One published measurement, in base units. `compute` is the engine's effective FLOP/s, where known."""

    device: str
    engine: str
    prefill_engine: str
    model: str
    bandwidth: float
    cores: int
    streamed_bytes: float
    multiply_accumulates: float
    attention_width: float
    packed: bool
    prompt: int
    decode: float | None
    """Tokens/s."""
    prefill: float | None
    """Prompt tokens/s."""
    compute: float | None
    source: str
    date: str
    trust: str
    beyond_facts: bool

    @property
    def prefill_operations(self) -> float:
        """Return the operations of the prompt: weights, and causal attention."""
        tokens = self.prompt
        return 2 * self.multiply_accumulates * tokens + 2 * tokens**2 * self.attention_width


@cache
def published() -> tuple[Published, ...]:
    """Return the published measurements."""
    import yaml

    data = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return tuple(_row(raw, data["models"][raw["model"]], data["sources"][raw["source"]]) for raw in data["rows"])


def _row(raw: Mapping[str, Any], model: Mapping[str, Any], source: Mapping[str, Any]) -> Published:
    cached = raw.get("cached", _DEFAULT_CACHED)
    found = Published(
        device=raw["device"],
        engine=raw["engine"],
        prefill_engine=raw.get("prefill_engine", raw["engine"]),
        model=raw["model"],
        bandwidth=raw["bandwidth"] * 1e9,
        cores=raw.get("cores", 1),
        streamed_bytes=model["streamed_gb"] * 1e9 + model["kv_bytes"] * cached,
        multiply_accumulates=model["multiply_accumulates"] * 1e9,
        attention_width=model["attention_width"],
        packed=model["packed"],
        prompt=raw.get("prompt", _DEFAULT_PROMPT),
        decode=raw.get("decode"),
        prefill=raw.get("prefill"),
        compute=raw["compute"] * 1e12 if "compute" in raw else None,
        source=source["text"],
        date=str(source["date"]),
        trust=source["trust"],
        beyond_facts=raw.get("beyond_facts", False),
    )
    if found.compute is not None or found.prefill is None:
        return found
    return replace(found, compute=found.prefill_operations / found.prompt * found.prefill)
