"""A drawing as shapes, and its two forms: SVG (inline in a page, or a file of its own) and PNG through matplotlib.

A chart is made once, as a list of shapes in pixels; both forms draw the same list, so a picture for a slide is the
picture of the page. A shape names its `kind`; `KINDS` says what a kind looks like, once for light and once for dark.
In a page the kinds are CSS classes whose colours follow the page; a file carries its own style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from dwindle.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "KINDS", "Area", "Box", "Dot", "Drawing", "Kind", "Line", "Text", "css", "variables"]

Place = tuple[float, float]

COLOURS: Mapping[str, tuple[str, str]] = {
    "page": ("#f6f6f3", "#0f1214"),
    "card": ("#ffffff", "#171b1e"),
    "wash": ("#f1f1ed", "#1f2529"),
    "ink": ("#16191c", "#eceeef"),
    "soft": ("#596269", "#9ba6ad"),
    "line": ("#e2e2dc", "#2b3237"),
    "s0": ("#6a747b", "#8f9aa1"),
    "s1": ("#2458b8", "#84b4ff"),
    "s2": ("#b4540a", "#ffae66"),
    "s3": ("#6b3fa8", "#c5a3ff"),
    "s4": ("#0b7a6b", "#5fd6c3"),
    "tint": ("#e8effb", "#1a2a44"),
    "good": ("#14713f", "#6bd89b"),
    "good-wash": ("#e3f4ea", "#143325"),
    "bad": ("#b3261e", "#ff9389"),
    "bad-wash": ("#fbe8e6", "#3d1c1a"),
    "open": ("#7a5c00", "#e6c85c"),
    "open-wash": ("#f8f0d6", "#362e16"),
}
"""Name -> colour in light and in dark. The page's variables bear the same names."""
SERIES = 5


@dataclass(frozen=True)
class Kind:
    """What shapes of a kind look like: names of COLOURS, widths in pixels."""

    stroke: str | None = None
    fill: str | None = None
    width: float = 1.0
    dash: tuple[float, float] | None = None
    opacity: float = 1.0
    size: float = 0.0
    """Of letters, in pixels."""
    bold: bool = False


KINDS: Mapping[str, Kind] = {
    "grid": Kind(stroke="line"),
    "path": Kind(stroke="soft", width=1.3, dash=(3, 3)),
    "back": Kind(fill="card", opacity=0.85),
    "head": Kind(fill="soft"),
    "front": Kind(stroke="good", width=2.0),
    "limit": Kind(stroke="bad", width=1.3, dash=(6, 4)),
    "tick": Kind(fill="soft", size=12),
    "axis": Kind(fill="soft", size=12),
    "label": Kind(fill="ink", size=12.5),
    "strong": Kind(fill="ink", size=13, bold=True),
    "note": Kind(fill="soft", size=11.5),
    "miss": Kind(fill="bad", size=11.5),
    "cell": Kind(fill="ink", size=11, bold=True),
    **{f"bits w{n}": Kind(fill="s1", opacity=round(0.08 + 0.14 * math.log2(2 * n), 2)) for n in range(1, 17)},
    "ring": Kind(stroke="good", width=2.0),
    **{f"s{n}": Kind(fill=f"s{n}") for n in range(SERIES)},
    **{f"curve s{n}": Kind(stroke=f"s{n}", width=2.2) for n in range(SERIES)},
    **{f"band s{n}": Kind(fill=f"s{n}", opacity=0.13) for n in range(SERIES)},
}


@dataclass(frozen=True)
class Line:
    """Straight pieces from point to point; `arrow` puts a head on the end."""

    points: Sequence[Place]
    kind: str
    arrow: bool = False
    title: str = ""


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[Place]
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle with round corners."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str = ""
    radius: float = 2.0


@dataclass(frozen=True)
class Dot:
    """A circle; kind `ring` is hollow."""

    x: float
    y: float
    radius: float
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text whose baseline is at y; `turned` stands upright, read from below."""

    x: float
    y: float
    text: str
    kind: str
    anchor: str = "start"
    turned: bool = False


Shape = Line | Area | Box | Dot | Text


@dataclass
class Drawing:
    """Shapes on a sheet of so many pixels, in the order they are drawn."""

    width: float
    height: float
    title: str
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Draw over what is there."""
        self.shapes += shapes

    def svg(self, classes: str = "chart") -> Markup:
        """Return an inline <svg> that takes its colours from the page; every text is escaped."""
        body = "".join(_svg(shape) for shape in self.shapes)
        return Markup(  # noqa: S704  (texts from outside are escaped)
            f'<svg class="{escape(classes)}" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}">{body}</svg>'
        )

    def write_svg(self, path: Path) -> None:
        """Write an SVG file with its own style sheet, light and dark."""
        from dwindle.storage import write_text

        inline = str(self.svg())
        sheet = (
            f"svg{{background:var(--card);font-family:system-ui,sans-serif;{variables(0)}}}"
            f"@media(prefers-color-scheme:dark){{svg{{{variables(1)}}}}}{css('')}"
        )
        opening = inline.replace(
            "<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" height="{self.height:g}" ', 1
        )
        head, _, rest = opening.partition(">")
        write_text(path, f"{head}><style>{sheet}</style>{rest}\n")

    def write_png(self, path: Path, scale: float = 2.0) -> None:
        """Write a PNG in light colours, `scale` pixels to one of the drawing. MissingExtra without matplotlib."""
        from dwindle.storage import atomic_file

        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra("Writing PNG files", "plots") from error
        figure = Figure(figsize=(self.width / 100, self.height / 100), dpi=100 * scale, facecolor=COLOURS["card"][0])
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        for layer, shape in enumerate(self.shapes):
            _paint(axes, shape, layer)
        with atomic_file(path) as partial:
            figure.savefig(partial, format="png")


def _head(points: Sequence[Place]) -> list[Place]:
    """Return the triangle at the end of a line."""
    (x0, y0), (x1, y1) = points[-2:]
    length = math.hypot(x1 - x0, y1 - y0) or 1.0
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    return [(x1 + 3 * ux, y1 + 3 * uy), (x1 - 5 * ux - 4 * uy, y1 - 5 * uy + 4 * ux),
            (x1 - 5 * ux + 4 * uy, y1 - 5 * uy - 4 * ux)]  # fmt: skip


def css(scope: str = ".chart ") -> str:
    """Return the rules of all kinds, colours by variable."""
    rules = []
    for name, kind in KINDS.items():
        selector = scope + "".join(f".{word}" for word in name.split())
        stroke = f"var(--{kind.stroke})" if kind.stroke else "none"
        rule = f"fill:{f'var(--{kind.fill})' if kind.fill else 'none'};stroke:{stroke}"
        rule += f";stroke-width:{kind.width:g}" if kind.stroke else ""
        rule += f";stroke-dasharray:{kind.dash[0]:g} {kind.dash[1]:g}" if kind.dash else ""
        rule += f";opacity:{kind.opacity:g}" if kind.opacity != 1 else ""
        rules.append(f"{selector}{{{rule}}}")
        if kind.size:
            weight = "600" if kind.bold else "400"
            rules.append(f"{scope}text{''.join(f'.{w}' for w in name.split())}{{font-size:{kind.size:g}px;"
                         f"font-weight:{weight}}}")  # fmt: skip
    return "\n".join(rules)


def variables(side: int) -> str:
    """Return the colours as CSS variables, of light (0) or dark (1)."""
    return "".join(f"--{name}:{pair[side]};" for name, pair in COLOURS.items())


def _svg(shape: Shape) -> str:
    told = f"<title>{escape(shape.title)}</title>" if not isinstance(shape, Text) and shape.title else ""
    if isinstance(shape, Text):
        turned = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.turned else ""
        return (
            f'<text class="{escape(shape.kind)}" x="{shape.x:.1f}" y="{shape.y:.1f}" '
            f'text-anchor="{escape(shape.anchor)}"{turned}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, Dot):
        return (
            f'<circle class="{escape(shape.kind)}" cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{shape.radius:g}">'
            f"{told}</circle>"
        )
    if isinstance(shape, Box):
        return (
            f'<rect class="{escape(shape.kind)}" x="{shape.x:.1f}" y="{shape.y:.1f}" width="{max(shape.width, 0):.1f}" '
            f'height="{shape.height:.1f}" rx="{shape.radius:g}">{told}</rect>'
        )
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
    if isinstance(shape, Area):
        return f'<polygon class="{escape(shape.kind)}" points="{places}">{told}</polygon>'
    head = _svg(Area(_head(shape.points), "head")) if shape.arrow else ""
    return f'<polyline class="{escape(shape.kind)}" points="{places}">{told}</polyline>{head}'


def _paint(axes: Axes, shape: Shape, layer: int) -> None:
    from matplotlib.patches import Circle, Polygon, Rectangle

    kind = KINDS[shape.kind]
    fill = COLOURS[kind.fill][0] if kind.fill else "none"
    stroke = COLOURS[kind.stroke][0] if kind.stroke else "none"
    point = 0.72  # points to a pixel at 100 pixels an inch
    if isinstance(shape, Text):
        anchor = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        axes.text(
            shape.x, shape.y, shape.text, color=fill, fontsize=kind.size * point, ha=anchor,
            va="baseline", rotation=90 if shape.turned else 0, rotation_mode="anchor", zorder=layer + 1,
            fontweight="bold" if kind.bold else "normal", parse_math=False,
        )  # fmt: skip
        return
    style: dict[str, Any] = {"facecolor": fill, "edgecolor": stroke, "alpha": kind.opacity, "zorder": layer + 1}
    style["linewidth"] = kind.width * point if kind.stroke else 0.0
    if isinstance(shape, Dot):
        axes.add_patch(Circle((shape.x, shape.y), shape.radius, **style))
    elif isinstance(shape, Box):
        axes.add_patch(Rectangle((shape.x, shape.y), max(shape.width, 0), shape.height, **style))
    elif isinstance(shape, Area):
        axes.add_patch(Polygon([*shape.points], closed=True, **style))
    else:
        dashes = (0, tuple(d * point / max(kind.width * point, 0.1) for d in kind.dash)) if kind.dash else "solid"
        axes.plot(*zip(*shape.points, strict=True), color=stroke, linewidth=kind.width * point, linestyle=dashes,
                  zorder=layer + 1)  # fmt: skip
        if shape.arrow:
            _paint(axes, Area(_head(shape.points), "head"), layer)
