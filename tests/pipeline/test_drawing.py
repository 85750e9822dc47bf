from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dwindle.errors import MissingExtra
from dwindle.pipeline.charts import (
    Curve,
    Limit,
    Point,
    Split,
    bits_of_layers,
    front_of,
    memory_over_context,
    quality_against_size,
    time_split,
    training_curve,
)
from dwindle.pipeline.drawing import COLOURS, KINDS, Box, Drawing, Line, Text, css
from dwindle.pipeline.plot_files import write_plots

from .sample_report import planned_report

EVIL = "</text><script>alert(1)</script>&\"'$x^2$"
POINTS = [Point("teacher", 100_000_000, 1.0), Point(EVIL, 50_000_000, 1.5, 0, 0), Point("q", 60_000_000, 1.6, 1, 0)]
SPLITS = [Split("phone", 0.01, 0.002, 0.001, 0.002), Split("board", 0.1, 0.0, 0.001, 0.002)]
CURVES = [Curve("onnx", [(64, 1e7, 2e7, 3e7), (512, 2e7, 3e7, 5e7)])]
LIMITS = [Limit("a phone", 3.5e9), Limit("a board", 3.6e9), Limit("a watch", 1e9)]
DRAWINGS = {
    "quality": lambda width: quality_against_size(POINTS, width),
    "split": lambda width: time_split(SPLITS, width),
    "memory": lambda width: memory_over_context(CURVES, LIMITS, width),
    "bits": lambda width: bits_of_layers(
        [(f"model.layers.{i}.mlp.up_proj", b) for i in range(32) for b in (2, 4)], width
    ),
    "training": lambda width: training_curve([(0, 2.0), (10, 1.5), (20, 1.4)], width),
}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_letters_can_be_read(side: int) -> None:
    grounds = {"ink": ("page", "card", "wash"), "soft": ("page", "card", "wash"), "s1": ("page", "card"),
               "good": ("card", "good-wash"), "bad": ("card", "bad-wash"), "open": ("open-wash",), "page": ("s1",)}  # fmt: skip
    for letters, on in grounds.items():
        for ground in on:
            assert contrast(COLOURS[letters][side], COLOURS[ground][side]) >= 4.5, (letters, ground)


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("width", [760.0, 360.0])
def test_drawings_stay_on_their_sheet(name: str, width: float) -> None:
    drawing = DRAWINGS[name](width)
    assert drawing.width == width
    for shape in drawing.shapes:
        assert shape.kind in KINDS
        places = shape.points if hasattr(shape, "points") else [(shape.x, shape.y)]
        assert all(-1 <= x <= width + 1 and -1 <= y <= drawing.height + 1 for x, y in places), shape
        if isinstance(shape, Box):
            assert shape.x + shape.width <= width + 1


def test_the_same_drawing_is_svg_and_png(tmp_path: Path) -> None:
    drawing = DRAWINGS["quality"](760.0)
    drawing.write_svg(tmp_path / "a.svg")
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert EVIL in texts
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    drawing.write_png(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 1520


def test_png_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"dwindle\[plots\]"):
        Drawing(10, 10, "x").write_png(tmp_path / "x.png")


def test_every_kind_has_a_rule() -> None:
    rules = css()
    for name in KINDS:
        assert ".chart " + "".join(f".{word}" for word in name.split()) + "{" in rules


def test_the_front_is_a_stair_that_no_model_lies_under() -> None:
    front = front_of(POINTS)
    assert [POINTS[i].label for i in front] == ["teacher", EVIL]
    (stair,) = [s for s in quality_against_size(POINTS).shapes if isinstance(s, Line) and s.kind == "front"]
    for (x0, y0), (x1, y1) in itertools.pairwise(stair.points):
        assert x0 == x1 or y0 == y1
        assert x1 <= x0  # smaller to the left
        assert y1 <= y0  # worse upwards


def test_a_token_split_is_drawn_to_scale() -> None:
    drawing = time_split(SPLITS)
    bars = [s for s in drawing.shapes if isinstance(s, Box) and s.height == 15]
    first, second = [b for b in bars if "weights read" in b.title]
    assert (second.width + 1) / (first.width + 1) == pytest.approx(10.0, rel=0.01)
    assert "weights read: 100 ms (97%)" in second.title
    labels = [s.text for s in drawing.shapes if isinstance(s, Text)]
    assert any("66.7 tokens/s" in text for text in labels)


@pytest.mark.parametrize("width", [340, 760])
def test_a_devices_name_and_its_rate_do_not_cover_each_other(width: float) -> None:
    splits = [replace(SPLITS[0], label="iPhone 15 Pro (A17 Pro), onnx (onnx)"), SPLITS[1]]
    texts = [s for s in time_split(splits, width).shapes if isinstance(s, Text) and s.kind in ("label", "note")]
    for label, rate in zip(texts[-4::2], texts[-3::2], strict=True):
        assert (label.kind, rate.kind) == ("label", "note")
        assert (label.y == rate.y) == (width == 760)
        assert label.y != rate.y or 6.3 * (len(label.text) + len(rate.text)) < width


def test_no_limit_is_drawn_over_the_name_of_another() -> None:
    shapes = memory_over_context(CURVES, LIMITS).shapes
    lines = [number for number, s in enumerate(shapes) if isinstance(s, Line) and s.kind == "limit"]
    names = [number for number, s in enumerate(shapes) if isinstance(s, Text) and s.kind == "miss"]
    assert max(lines) < min(names)


def test_limits_close_together_are_told_apart() -> None:
    texts = [s for s in memory_over_context(CURVES, LIMITS).shapes if isinstance(s, Text) and s.kind == "miss"]
    heights = sorted(text.y for text in texts)
    assert all(b - a >= 13.9 for a, b in itertools.pairwise(heights))
    assert {re.sub(r"\s+", " ", t.text) for t in texts} == {"a phone 3.5 GB", "a board 3.6 GB", "a watch 1 GB"}


def test_the_map_of_bits_shows_every_layer_at_its_place() -> None:
    drawing = bits_of_layers([("m.layers.0.a.q_proj", 2), ("m.layers.1.a.q_proj", 4), ("m.layers.1.a.up_proj", 8)])
    boxes = {s.title: s for s in drawing.shapes if isinstance(s, Box)}
    first, second, third = (boxes[f"m.layers.{n}.a.{rest}"] for n, rest in ((0, "q_proj: 2 bits"), (1, "q_proj: 4 bits"),
                                                                          (1, "up_proj: 8 bits")))  # fmt: skip
    assert first.y == second.y < third.y
    assert first.x < second.x == third.x
    assert KINDS[first.kind].opacity < KINDS[second.kind].opacity < KINDS[third.kind].opacity <= 1


def test_plots_of_a_variant_with_a_strange_name_stay_in_their_folder(tmp_path: Path) -> None:
    report = planned_report()
    report = replace(report, steps=(*report.steps[:-1], replace(report.steps[-1], variant="../../up")))
    written, missing = write_plots(report, tmp_path / "plots")
    assert missing is None
    assert {path.parent for path in written} == {tmp_path / "plots"}
    assert all(path.is_file() for path in written)
    assert (tmp_path / "plots" / "bits-03-..-..-up.svg") in written


def test_nothing_is_drawn_of_nothing() -> None:
    assert not bits_of_layers([]).shapes
    assert not time_split([]).shapes
    assert not memory_over_context([], LIMITS).shapes
    assert not training_curve([(0, 1.0)]).shapes
