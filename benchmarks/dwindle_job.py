"""dwindle's side of the quality table, in a fresh process like the peers': `dwindle.quantize.run`, nothing else.

    python benchmarks/dwindle_job.py --model NAME --options '{"scheme": "palettize", "bits": 3}' --output FILE

Writes the linears as the packed model gives them back and prints one JSON line last, with the fields of
`peers/job.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from protocol import RealModel
from safetensors.torch import save_file

from dwindle.clock import StepClock
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantize
from dwindle.quantized_model import quantized_weights

ENDS = ("model.embed_tokens", "lm_head")
"""What stays float on all sides."""


def coded(name: str, options: dict[str, Any], output: Path) -> dict[str, Any]:
    """Quantize one model, write its linears, and return the record."""
    real = RealModel(name)
    options = dict(options)
    calibration = real.calibration() if options.pop("calibrated", True) else None
    shapes = {n: real.bundle.model.get_submodule(n).weight.numel() for n in real.bundle.anatomy.linear_names()}
    times = os.times()
    with StepClock() as clock:
        packed, step = quantize(real.bundle, QuantizeOptions(keep_float=ENDS, **options), calibration)
    after = os.times()
    weights = quantized_weights(packed.model)
    save_file({n: w.dequantize().contiguous() for n, w in weights.items()}, output)
    left = {n: count for n, count in shapes.items() if n not in weights}
    stored = sum(w.stored_bits for w in weights.values()) + 16 * sum(left.values())
    return {
        "bits_per_weight": stored / sum(shapes.values()),
        "unquantized": sorted(left),
        "seconds": clock.seconds,
        "cpu_seconds": sum(after[:4]) - sum(times[:4]),
        "peak_rss_bytes": clock.peak_rss_bytes,
        "plan_kl": {key: step.details["plan"].get(key) for key in ("predicted_kl", "measured_kl")},
        "versions": {p: importlib.metadata.version(p) for p in ("dwindle", "torch", "transformers")},
    }


def main() -> None:
    """Do one job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    print(json.dumps(coded(asked.model, asked.options, asked.output)))


if __name__ == "__main__":
    main()
