"""Pages of their own: one HTML file that asks nothing of a network. Style and scripts are in it; all else is forbidden.

Every text goes through jinja2's escaping. The content policy of a page allows its own style and exactly its own
scripts, by their hashes; data for a script is JSON in which no tag can begin.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dwindle.pipeline import figures
from dwindle.pipeline.drawing import Drawing, css, variables

__all__ = ["TwoWidths", "embedded_json", "render_page", "two_widths"]

_TEMPLATES = Path(__file__).parent / "templates"
_WIDE, _NARROW = 760.0, 360.0


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(figures=figures)
    return found


def render_page(template: str, scripts: tuple[str, ...], **values: Any) -> str:
    """Return the page of a template, with these scripts of the same folder at its end."""
    texts = [Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in scripts]  # noqa: S704  (our own)
    hashes = [f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" for text in texts]
    return _environment().get_template(template).render(
        style=Markup(_style()), scripts=texts, script_hashes=hashes or ["none"], **values  # noqa: S704
    )  # fmt: skip


@functools.cache
def _style() -> str:
    light, dark = variables(0), variables(1)
    colours = (
        f":root{{{light}--depth:.62%;color-scheme:light}}\n"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}--depth:.5%;color-scheme:dark}}}}\n"
        f":root[data-theme=dark]{{{dark}--depth:.5%;color-scheme:dark}}\n"
        f"@media print{{:root:root:root{{{light}--depth:.62%;color-scheme:light}}}}\n"
    )
    return colours + (_TEMPLATES / "style.css").read_text(encoding="utf-8") + css()


def embedded_json(value: Any) -> Markup:
    """Return JSON for a <script type="application/json">: no `<`, `>` or `&` in it can begin a tag or a comment.

    >>> embedded_json({"name": "</script>"})
    Markup('{"name":"\\\\u003c/script\\\\u003e"}')
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704


@dataclass(frozen=True)
class TwoWidths:
    """One chart for screens and one for phones; the style sheet shows one of them."""

    wide: Markup
    narrow: Markup


def two_widths(draw: Callable[[float], Drawing], wide: float = _WIDE) -> TwoWidths | None:
    """Return both forms of a chart, or None for one without shapes."""
    first = draw(wide)
    return TwoWidths(first.svg("chart wide"), draw(_NARROW).svg("chart narrow")) if first.shapes else None
