"""The report of a 32-layer model in a browser: its bytes, when it can be used, how long a changed layer takes.

The model is Llama 3.1 8B by its shapes; two variants with mixed plans, costs drawn at random (their number matters
here, not their value). Limits: 2 MB, and a second until all scripts have run in headless Chromium. Exit code 1 if one
is missed.

    python benchmarks/report_page.py [--runs 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from dwindle.anatomy import anatomy_of
from dwindle.pipeline.html_report import render_html
from dwindle.quantize import QuantizeOptions
from dwindle.quantize.allocation import Choice
from dwindle.quantize.bit_plan import BitPlan, PlannedLayer, rest_of
from dwindle.quantize.layer_plan import ModelShapes, plan_layers
from dwindle.report import Measurement, Report, StepRecord, TargetVerdict

MOST_BYTES, MOST_SECONDS = 2_000_000, 1.0
BROWSER = Path(__file__).resolve().parents[1] / "tests" / "pipeline" / "browser.py"
CONFIG = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131_072, tie_word_embeddings=False,
)  # fmt: skip

CHANGE = """(() => {
  const select = document.querySelector("tr[data-layer='100'] select");
  select.value = select.value === "4" ? 6 : 4;
  const start = performance.now();
  select.dispatchEvent(new Event("change"));
  document.body.offsetHeight;
  return performance.now() - start;
})()"""
"""Milliseconds from a changed layer to the laid-out page."""


def planned_step(scheme: Any, variant: str) -> StepRecord:
    """Return the record of a mixed quantize step."""
    anatomy, rng = anatomy_of(CONFIG), random.Random(0)  # noqa: S311
    known = ModelShapes.from_anatomy(anatomy, torch.float16)
    base = plan_layers(known, QuantizeOptions(scheme=scheme))
    linears = set(anatomy.linear_names())
    layers = []
    for form in base.layers:
        if form.name in linears:
            shape, scale = known.shapes[form.name], rng.random() / 100
            bits = (2, 3, 4, 6) if scheme == "palettize" else (2, 3, 4, 8)
            forms = {b: base.with_bits({form.name: b}).formats[form.name] for b in bits}
            choices = tuple(Choice(f.stored_bits(shape), scale * 4.0**-b, b, f.group_size) for b, f in forms.items())
            chosen = rng.choice(bits)
            layers.append(PlannedLayer(forms[chosen], shape, scale * 4.0**-chosen, choices))
    sizes = [(name, shape[0] * shape[1]) for name, shape in known.shapes.items()]
    plan = BitPlan(scheme, tuple(layers), "kl", 3.5, rest=rest_of(sizes, base, known.shapes, linears, 16))
    kind = "palettized" if scheme == "palettize" else "affine"
    rows = [
        {"name": x.format.name, "kind": kind, "bits": x.format.bits, "shape": list(x.shape),
         "bytes": x.stored_bits // 8, "relative_mse": rng.random() / 10}
        for x in layers
    ]  # fmt: skip
    rows += [
        {"name": form.name, "kind": "affine", "bits": form.bits, "shape": list(known.shapes[form.name]),
         "bytes": form.stored_bits(known.shapes[form.name]) // 8, "relative_mse": 0.001}
        for form in base.layers if form.name not in linears
    ]  # fmt: skip
    weights = sum(size for _, size in sizes)
    before = Measurement(weights, 2 * weights, 16.0, nats_per_token=2.0)
    after = Measurement(weights, plan.model_bytes, plan.model_bits_per_weight, nats_per_token=2.1)
    return StepRecord("quantize", before, after, variant, details={"plan": plan.to_json(), "layers": rows})


def main() -> int:
    """Render, open several times, print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("browser", BROWSER)
    assert spec is not None
    assert spec.loader is not None
    browser = importlib.util.module_from_spec(spec)
    sys.modules["browser"] = browser
    spec.loader.exec_module(browser)
    if browser.chromium() is None:
        print("no Chromium here: the report is not measured", file=sys.stderr)
        return 0
    steps = (planned_step("palettize", "apple"), planned_step("integer", "onnx"))
    report = Report(steps, targets=(TargetVerdict("iphone-15-pro", ()), TargetVerdict("pixel-9", ())))
    render_html(report)
    start = time.perf_counter()
    page = render_html(report, "Llama 3.1 8B, by its shapes")
    rendered = time.perf_counter() - start
    ready, changed = [], []
    with tempfile.TemporaryDirectory() as folder, browser.opened(Path(folder) / "profile") as opened:
        place = Path(folder) / "report.html"
        place.write_text(page, encoding="utf-8")
        for _ in range(options.runs):
            tab = opened.tab()
            tab.open(place)
            tab.wait("document.documentElement.dataset.ready")
            ready.append(float(tab.js("document.documentElement.dataset.ready")) / 1000)
            changed.append(tab.js(CHANGE) / 1000)
    found = {
        "layers": len(steps[0].details["plan"]["layers"]),
        "bytes": len(page.encode()),
        "render_seconds": round(rendered, 3),
        "interactive_seconds": [min(ready), statistics.median(ready), max(ready)],
        "change_seconds": [round(f(changed), 4) for f in (min, statistics.median, max)],
    }
    print(json.dumps(found))
    return int(found["bytes"] >= MOST_BYTES or statistics.median(ready) > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
