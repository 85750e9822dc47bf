"""One peer's jobs: a float model and calibration windows in; what its format gives back, and its true size, out.

Every other script of this folder is one peer and calls `job.run(PEER, PACKAGES, METHODS)`. It runs in the peers'
environment, without dwindle, as

    python benchmarks/peers/X.py --model FOLDER --windows FILE --output FOLDER METHOD:BITS METHOD:BITS ...

A method takes a `Job` and returns module name -> `Coded`: the linear's weight as the peer's format gives it back in
float32, and the bits that format stores for it: codes, and 16 for every scale and palette entry, and zero points in the
bits that the peer keeps them in. Linears it does not return count 16 bits a weight and are named in the result.
Embedding and head stay float. `seconds` (wall) and `cpu_seconds` (of the process and its children, which a busy
machine changes less) are the method alone: no imports, no loading of the model. `peak_rss_bytes` is the process while
the method runs, libraries and model included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PALETTE_ROWS = 16
"""Output rows that share a palette."""
BLOCK = 32
"""Inputs that share a scale."""
FLOAT_BITS = 16
"""Bits of a weight that stays float, of a scale and of a palette entry."""


@dataclass
class Coded:
    """One linear as its format gives it back, float32 [O, I], and what it stores."""

    weight: Tensor
    stored_bits: int


@dataclass
class Job:
    """What a method gets."""

    model: nn.Module
    folder: str
    windows: Tensor
    """[N, T] token ids; a model that reads a window predicts all but its first token."""
    bits: Any
    """A whole number, or a float for a mixed-precision target."""

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Return module name -> linear of the decoder: all but the head."""
        head = self.model.get_output_embeddings()
        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head}

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.folder)


Method = Callable[[Job], Mapping[str, Coded]]


def nearest_divisor(extent: int, wanted: int) -> int:
    """Return the divisor of `extent` nearest to `wanted` by ratio: 43 for 172 and 32, where a peer would refuse."""
    divisors = [d for d in range(1, extent + 1) if extent % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def palette_bits(weight: Tensor, bits: int, rows: int) -> int:
    """Return the bits of indices and of one fp16 palette per `rows` output rows."""
    return weight.numel() * bits + weight.shape[0] // rows * 2**bits * FLOAT_BITS


def integer_bits(weight: Tensor, bits: int, block: int, zero_point_bits: int = 0) -> int:
    """Return the bits of codes and of one fp16 scale (and zero point) per block; a last, shorter block counts whole."""
    rows, inputs = weight.shape
    return weight.numel() * bits + rows * math.ceil(inputs / block) * (FLOAT_BITS + zero_point_bits)


def run(peer: str, packages: tuple[str, ...], methods: Mapping[str, Method]) -> None:
    """Do the jobs of the command line one after the other; write each one's linears and print its JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", required=True)
    parser.add_argument("--output", type=Path, required=True, help="Folder of the linears: METHOD-BITS.safetensors.")
    parser.add_argument("jobs", nargs="+", help="METHOD:BITS")
    options = parser.parse_args()
    windows = load_file(options.windows)["ids"]
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", *packages)}
    for asked in options.jobs:
        method, _, bits = asked.partition(":")
        record = {"peer": peer, "method": method, "bits": float(bits), "versions": versions}
        try:
            record |= _once(
                methods[method], options.model, windows, float(bits), options.output / f"{asked}.safetensors"
            )
        except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a peer raises is its result)
            traceback.print_exc()
            record["failed"] = f"{type(error).__name__}: {error}"[:300]
        print("\n" + json.dumps(record), flush=True)  # on a line of its own whatever the peer has printed


def _once(method: Method, folder: str, windows: Tensor, bits: float, output: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    work = Job(model, folder, windows, int(bits) if bits.is_integer() else bits)
    counts = {name: linear.weight.numel() for name, linear in work.linears.items()}
    _forget_peak()
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    coded = method(work)
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - cpu_start
    save_file({name: c.weight.detach().float().contiguous() for name, c in coded.items()}, output)
    left = {name: count for name, count in counts.items() if name not in coded}
    stored = sum(c.stored_bits for c in coded.values()) + FLOAT_BITS * sum(left.values())
    return {
        "bits_per_weight": stored / sum(counts.values()),
        "unquantized": sorted(left),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _forget_peak() -> None:
    """Let the peak resident memory count from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
