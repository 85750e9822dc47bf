"""Which packed weights have a width that a format does not store: one line per kind, for every format alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dwindle.errors import offenders
from dwindle.weights import AffineWeight, PalettizedWeight

__all__ = ["width_problems"]


def width_problems(
    kind: str,
    runtime: str,
    specs: Mapping[str, Mapping[str, Any]],
    palettes: Collection[int],
    integers: Collection[int],
) -> list[str]:  # fmt: skip
    """Return the refusals of format `kind` for packed specs by module name; empty is good."""
    problems = []
    for stored, allowed in ((PalettizedWeight.kind, palettes), (AffineWeight.kind, integers)):
        wrong = [f"{name} ({spec['bits']} bits)" for name, spec in specs.items()
                 if spec["kind"] == stored and spec["bits"] not in allowed]  # fmt: skip
        if wrong:
            problems.append(
                f"{kind}: {len(wrong)} {stored} weights have a width that {runtime} does not store: "
                f"{offenders(wrong, 6)}. Quantize with bits of {', '.join(map(str, allowed))}."
            )
    return problems
