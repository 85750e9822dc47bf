"""The logit cache: bytes, tokens/s and gradient errors beside DistillKit's compression; training from it beside live.

    python benchmarks/distill_cache.py format [--distillkit CHECKOUT] [--rounds 5]
    python benchmarks/distill_cache.py train [--steps 300] [--draws 32] [--seeds 1] [--labels]

`format` takes the logits of stories260K and pycode-6m on text they know, and logits of 49,152 tokens with Zipf's
distribution, and has both sides turn the same logits into bytes and bytes into (ids, weights), in turn, in one process.
CHECKOUT is a clone of github.com/arcee-ai/DistillKit; its two settings are the two its README recommends.

- bytes: per position, without the teacher's cost and without indices (dwindle's: 20 bytes per window).
- write, read: positions per second of CPU time, medians of the rounds.
- noise: mean over positions of |target - p|_1, what one position's gradient is off.
- bias: |mean over positions of (target - p)|_1, what is left of it in a batch of all of them. For an unbiased target
  it falls with one over the root of their number, for others it stays.

`train` prunes stories260K to half its FFN and trains it with forward KL for the same steps on the same windows from the
live teacher and from a cache, with `--labels` also from the labels alone. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import RealModel, assets
from torch import Tensor

from dwindle import prune
from dwindle.data import DataOptions, evaluation_set, training_set
from dwindle.distill import CacheOptions, DistillOptions, run, write_cache
from dwindle.distill.cache_writer import _SAMPLED, _uniform, _windows
from dwindle.distill.logit_cache import _sparse_targets
from dwindle.distill.token_sampling import sample_tokens
from dwindle.distill.window_codec import WindowCodec
from dwindle.measure import Meter, logit_slices

WINDOW = 256
SETTINGS: dict[str, dict[str, Any]] = {
    "k=128": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "k=50": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
"""What DistillKit's README recommends, and its "budget pick"."""
Side = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any], int]]
"""(logits -> stored, stored -> dense targets made of the decoded (ids, weights), stored -> bytes)."""


def dwindle_side(vocabulary: int, draws: int) -> Side:
    """Return dwindle's two directions."""
    codec = WindowCodec(vocabulary, draws, 0)

    def write(logits: Tensor) -> list[bytes]:
        uniform = torch.cat([_uniform(0, window, WINDOW) for window in range(len(logits) // WINDOW)])
        rows = max(1, _SAMPLED["cpu"] // vocabulary)
        parts = [
            sample_tokens(logits[i : i + rows], uniform[i : i + rows, 0], draws=draws)
            for i in range(0, len(logits), rows)
        ]
        rounding = uniform[:, 1].numpy().reshape(-1, WINDOW)
        return [codec.encode(w, u) for w, u in zip(_windows(parts, len(rounding)), rounding, strict=True)]

    def read(stored: list[bytes]) -> Any:
        windows = [codec.decode(np.frombuffer(window, np.uint8), WINDOW) for window in stored]
        return _sparse_targets(windows, 1.0, draws, [])

    return write, read, lambda stored: sum(map(len, stored))


def distillkit_side(vocabulary: int, setting: dict[str, Any]) -> Side:
    """Return DistillKit's two directions."""
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    config = DistributionQuantizationConfig(
        d=vocabulary, exact_dtype="bfloat16", term_dtype="float32", residual_bins=[], delta_encoding=False,
        error_diffusion=False, **setting,
    )  # fmt: skip
    compressor = LogprobCompressor(config)

    def write(logits: Tensor) -> list[dict[str, Tensor]]:
        return [compressor.compress(torch.log_softmax(part, -1)) for part in logits.split(WINDOW)]

    def read(stored: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [compressor.decompress_to_sparse(part) for part in stored]

    return write, read, lambda stored: sum(t.numel() * t.element_size() for part in stored for t in part.values())


def dense(decoded: Any, vocabulary: int) -> Tensor:
    """Return what either side decoded as [N, V]."""
    if hasattr(decoded, "dense"):
        return decoded.dense(vocabulary)
    ids, logs = (torch.cat(column) for column in zip(*decoded, strict=True))
    return torch.zeros(len(ids), vocabulary).scatter_add_(1, ids.long(), logs.float().exp())


def logits_of(name: str, positions: int) -> Tensor:
    """Return logits [N, V] of a real model on its text, or of Zipf's distribution."""
    if name == "zipf-49152":
        generator = torch.Generator().manual_seed(0)
        rank = torch.arange(1, 49_153).float().log()
        slope = torch.rand(positions, 1, generator=generator) * 1.6 + 1.2
        return (-slope * rank)[:, torch.randperm(49_152, generator=generator)]
    model = RealModel(name)
    ids = model.calibration().ids[:, :WINDOW][: positions // WINDOW]
    with torch.no_grad():
        return torch.cat(list(logit_slices(model.bundle)(ids, 4096)))


def compare(name: str, positions: int, sides: dict[str, Callable[[int], Side]], rounds: int) -> list[dict[str, Any]]:
    """Return a row per side, measured in turn on the same logits."""
    logits = logits_of(name, positions)
    vocabulary = logits.shape[1]
    p = torch.softmax(logits, -1)
    made = {side: make(vocabulary) for side, make in sides.items()}
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in made}
    rows = []
    for turn in range(rounds):
        for side, (write, read, size) in made.items():
            began = time.process_time()
            stored = write(logits)
            written = time.process_time()
            decoded = read(stored)
            seconds[side].append((written - began, time.process_time() - written))
            if turn == 0:
                off = dense(decoded, vocabulary).sub_(p)
                rows.append({
                    "model": name, "side": side, "bytes": size(stored) / len(logits),
                    "noise": off.abs().sum(1).mean().item(), "bias": off.mean(0).abs().sum().item(),
                })  # fmt: skip
    for row in rows:
        write_s, read_s = (statistics.median(column) for column in zip(*seconds[row["side"]], strict=True))
        row |= {"write": len(logits) / write_s, "read": len(logits) / read_s}
    return rows


def formats(distillkit: Path | None, rounds: int) -> dict[str, Any]:
    """Print and return the table of the formats."""
    sides: dict[str, Callable[[int], Side]] = {
        f"dwindle N={draws}": lambda v, draws=draws: dwindle_side(v, draws) for draws in (CacheOptions("-").draws, 64)
    }
    if distillkit is not None:
        sys.path.insert(0, str(distillkit))
        sides |= {f"DistillKit {name}": lambda v, s=s: distillkit_side(v, s) for name, s in SETTINGS.items()}
    rows = []
    print(f"{'model':12} {'side':18} {'bytes':>7} {'write/s':>9} {'read/s':>9} {'noise':>8} {'bias':>8}")
    for name, positions in (("stories260K", 16_384), ("pycode-6m", 4_096), ("zipf-49152", 1_024)):
        for row in compare(name, positions, sides, rounds):
            rows.append(row)
            print(f"{row['model']:12} {row['side']:18} {row['bytes']:7.1f} {row['write']:9,.0f} {row['read']:9,.0f} "
                  f"{row['noise']:8.4f} {row['bias']:8.4f}", flush=True)  # fmt: skip
    return {"formats": rows}


def train(steps: int, draws: int, seeds: int, labels: bool) -> dict[str, Any]:
    """Train a pruned stories260K live, from a cache and perhaps from labels; print and return nats/token."""
    teacher = RealModel("stories260K").bundle
    context, batch = 128, 8
    text = str(assets() / "data" / "text" / "tinystories_train.txt")
    data = DataOptions(train=(text,), context=context, train_tokens=(steps + 1) * batch * (context + 1))
    tokens = training_set(data, teacher.tokenizer, teacher.anatomy.context)
    valid = evaluation_set(assets() / "data" / "text" / "tinystories_valid.txt", teacher.tokenizer, max_tokens=32_768)
    meter = Meter(valid, teacher)
    calibration = RealModel("stories260K").calibration()
    student, _ = prune.run(teacher, prune.PruneOptions(ffn_keep=0.5), calibration)
    found: dict[str, list[dict[str, float]]] = {}

    def measure(label: str, bundle: Any, seconds: float) -> None:
        quality = meter.measure(bundle)
        found.setdefault(label, []).append({
            "nats": quality.nats_per_token, "kl": quality.kl_nats_per_token or 0.0, "seconds": seconds,
        })  # fmt: skip
        print(f"{label:8} nats/token {quality.nats_per_token:.4f}  KL {quality.kl_nats_per_token:.4f}  "
              f"{seconds:.1f} CPU seconds", flush=True)  # fmt: skip

    measure("teacher", teacher, 0.0)
    measure("pruned", student, 0.0)
    for seed in range(seeds):
        chosen: dict[str, Any] = {"steps": steps, "batch_size": batch, "learning_rate": 2e-3, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            cache = CacheOptions(f"{folder}/cache", draws=draws, seed=seed)
            began = time.process_time()
            written = write_cache(teacher, tokens, cache).manifest
            print(f"written: {written.bytes_per_token:.1f} bytes/token, "
                  f"{written.positions / (time.process_time() - began):,.0f} tokens/s")  # fmt: skip
            for label, options, guide in (
                ("live", DistillOptions(**chosen), teacher),
                ("cached", DistillOptions(cache=cache, **chosen), None),
                ("labels", DistillOptions(losses=("label_cross_entropy",), **chosen), teacher),  # type: ignore[arg-type]
            ):
                if label == "labels" and not labels:
                    continue
                began = time.process_time()
                trained, _ = run(student, options, teacher=guide, train=tokens)
                measure(label, trained, time.process_time() - began)
    live, cached = (statistics.mean(one["nats"] for one in found[label]) for label in ("live", "cached"))
    print(f"cached / live: {cached / live:.4f}")
    return {"train": found, "cached_over_live": cached / live}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("format", "train"))
    parser.add_argument("--distillkit", type=Path, help="A clone of DistillKit; without it dwindle stands alone.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draws", type=int, default=CacheOptions("-").draws)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--labels", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "format":
        print(json.dumps(formats(given.distillkit, given.rounds)))
    else:
        print(json.dumps(train(given.steps, given.draws, given.seeds, given.labels)))


if __name__ == "__main__":
    main()
