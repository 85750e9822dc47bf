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

__all__ = ["PROFILES", "Published", "published", "published_on"]

PROFILES: Mapping[str, str] = {
    "M1": "mac-m1", "M1 Pro": "mac-m1-pro", "M1 Max": "mac-m1-max", "M2": "mac-m2", "M2 Pro": "mac-m2-pro",
    "M2 Max": "mac-m2-max", "M2 Max CPU": "mac-m2-max", "M2 Ultra": "mac-m2-ultra", "M3": "mac-m3",
    "M3 Pro": "mac-m3-pro", "M3 Max": "mac-m3-max", "M4": "mac-m4", "M4 Pro": "mac-m4-pro", "M4 Max": "mac-m4-max",
    "M5 Pro": "mac-m5-pro", "M5 Max": "mac-m5-max", "iPhone 15 Pro": "iphone-15-pro", "OnePlus 12": "oneplus-12",
    "Galaxy S24": "galaxy-s24", "Galaxy S24 Ultra": "galaxy-s24-ultra", "Galaxy S25 Ultra": "galaxy-s25-ultra",
    "Raspberry Pi 5": "raspberry-pi-5", "Lunar Lake CPU": "laptop-lunar-lake", "Lunar Lake iGPU": "laptop-lunar-lake",
    "Strix Halo CPU": "laptop-strix-halo", "Strix Halo iGPU": "laptop-strix-halo",
}  # fmt: skip
"""Device of a row -> its profile. A chip alone (A17 Pro, Snapdragon 8 Elite) is no device: others share it."""

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
    outlier: str = ""
    """Why other devices do not predict it, where they do not."""

    @property
    def text(self) -> str:
        """Return the row in words, its source left out."""
        rates = [f"{self.decode:.4g} tokens/s" if self.decode else "",
                 f"prompt of {self.prompt:,} at {self.prefill:,.4g} tokens/s" if self.prefill else ""]  # fmt: skip
        return f"{self.model} on {self.device} ({self.engine}): {', '.join(rate for rate in rates if rate)}"

    @property
    def prefill_operations(self) -> float:
        """Return the operations of the prompt: weights, and causal attention."""
        tokens = self.prompt
        return 2 * self.multiply_accumulates * tokens + 2 * tokens**2 * self.attention_width


def published_on(profile: str) -> tuple[Published, ...]:
    """Return what others published of a profile's device: models of theirs, for reference beside an estimate.

    >>> [f"{row.model}: {row.decode:g} tokens/s" for row in published_on("iphone-15-pro")]
    ['afm-2024: 30 tokens/s']
    """
    return tuple(row for row in published() if PROFILES.get(row.device) == profile)


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
        outlier=raw.get("outlier", ""),
    )
    if found.compute is not None or found.prefill is None:
        return found
    return replace(found, compute=found.prefill_operations / found.prompt * found.prefill)
