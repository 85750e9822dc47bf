"""The card's pictures as SVG: bytes behind each stage, bytes of each source read and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from dwindle.storage import write_text

__all__ = ["bars_svg", "write_plots"]

_ROW = 26
_LABEL = 190
_BAR = 420
_NUMBER = 150
_COLOURS = ("#2458b8", "#b4540a")


def write_plots(card: Mapping[str, Any], folder: Path) -> None:
    """Write stages.svg and sources.svg."""
    stages = card["stages"]
    bars = [("read", [float(stages[0]["bytes_in"])]), *((s["stage"], [float(s["bytes_out"])]) for s in stages)]
    write_text(folder / "stages.svg", bars_svg("Bytes behind each stage", bars, ("bytes",)))
    kept: dict[str, int] = {}
    for split in card["splits"].values():
        for file in split["files"]:
            kept[file["source"]] = kept.get(file["source"], 0) + file["bytes"]
    sources = [(s["name"], [float(s["bytes"]), float(kept.get(s["name"], 0))]) for s in card["sources"]]
    write_text(folder / "sources.svg", bars_svg("Bytes of each source", sources, ("read", "kept")))


def bars_svg(title: str, rows: Sequence[tuple[str, Sequence[float]]], legend: Sequence[str]) -> str:
    """Return horizontal bars, each with its label and number; several bars of a row stand below each other."""
    most = max((value for _, values in rows for value in values), default=0) or 1
    thick = (_ROW - 6) / len(legend)
    height = 44 + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL + _BAR + _NUMBER}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    if len(legend) > 1:
        for index, word in enumerate(legend):
            x = _LABEL + 90 * index
            parts.append(f'<rect x="{x}" y="11" width="10" height="10" fill="{_COLOURS[index]}"/>'
                         f'<text x="{x + 14}" y="20">{escape(word)}</text>')  # fmt: skip
    for number, (label, values) in enumerate(rows):
        top = 34 + _ROW * number
        parts.append(f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>')
        for index, value in enumerate(values):
            y, wide = top + 3 + thick * index, _BAR * value / most
            parts.append(f'<rect x="{_LABEL}" y="{y:.1f}" width="{wide:.1f}" height="{thick - 1:.1f}" '
                         f'fill="{_COLOURS[index]}"/>'
                         f'<text x="{_LABEL + wide + 6:.1f}" y="{y + thick / 2 + 4:.1f}" font-size="11">'
                         f"{value:,.0f}</text>")  # fmt: skip
    return "\n".join([*parts, "</svg>"]) + "\n"
