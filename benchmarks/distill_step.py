"""Whole training steps with a teacher: dwindle live and from a cache beside TRL's GKD trainer.

    python benchmarks/distill_step.py --peers .venv-peers/bin/python [--runs 3] [--steps 4]
    python benchmarks/distill_step.py --who dwindle --place FOLDER        # one side once: one JSON line

The job: Llamas of random weights, student of width 512 and 6 layers, teacher of width 768 and 8 layers, vocabulary
49,152, tied heads, 4 windows of 256 predictions a step, float32, AdamW, clipping at 1, in fresh processes in turn.

- `dwindle`: JSD(0.5), GKD's default, from the live teacher.
- `dwindle-cached`: forward KL from a cache written before (32 draws), without the teacher; a cache has no JSD.
- `trl`: JSD(0.5), `lmbda` 0 (the text as given), float32, without activation checkpointing, as dwindle's default.
- `trl-checkpointing`: the same with activation checkpointing, as TRL's default.

Seconds are the median of the steps after the first, by the clock and by the processor time of the process, which other
load on the machine stretches less. `peak_over_base_bytes` is the high-water mark of resident memory (VmHWM) over all
steps less the resident memory once the models are loaded: gradients, moments, activations, logits. The random teacher
is nearly uniform, for a cache the most expensive kind: every draw is another token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dwindle.bundle import ModelBundle
from dwindle.data_order import windows_of_step
from dwindle.distill import (
    CachedTeacher,
    CacheOptions,
    DistillObjective,
    LiveTeacher,
    LogitCache,
    LossSpec,
    write_cache,
)
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import TrainLine, TrainOptions, train

HERE = Path(__file__).resolve().parent
SIDES = ("dwindle", "dwindle-cached", "trl", "trl-checkpointing")
VOCABULARY, WINDOWS, TOKENS = 49_152, 4, 256
SHAPES = {
    "student": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
    "teacher": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
}
RATE = 1e-4


def prepare(place: Path, steps: int) -> None:
    """Write models, windows and the cache to `place`."""
    torch.manual_seed(0)
    for name, shape in SHAPES.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=2 * TOKENS, tie_word_embeddings=True, **shape
        )
        LlamaForCausalLM(config).save_pretrained(place / name)
    ids = torch.randint(0, VOCABULARY, (steps * WINDOWS, TOKENS + 1))
    order = torch.cat([windows_of_step(len(ids), WINDOWS, 0, step) for step in range(steps)])
    save_file({"ids": ids[order].contiguous(), "rates": torch.full((steps,), RATE, dtype=torch.float64)}, place / "run")
    save_file({"ids": ids}, place / "windows")
    write_cache(bundle(place, "teacher"), tokens(place), CacheOptions(str(place / "cache")))


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word: bundles have one, and nothing is read with it here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")))


def bundle(place: Path, name: str) -> ModelBundle:
    """Return one of the models, its weights read from disk by now."""
    model = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)
    sum(float(p.detach().sum()) for p in model.parameters())
    return ModelBundle.from_model(model, plain_tokenizer(), name=name)


def tokens(place: Path) -> TokenSet:
    """Return the training windows."""
    ids = load_file(place / "windows")["ids"]
    return TokenSet(ids, "train", "random", "0" * 64, 0, encoding_sha256(plain_tokenizer()))


def status_bytes(name: str) -> int:
    """Return a line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def dwindle(place: Path, *, cached: bool) -> dict[str, Any]:
    """Train and return the seconds of each step and the peak."""
    windows = tokens(place)
    student = bundle(place, "student").model
    signal: CachedTeacher | LiveTeacher
    if cached:
        signal, loss = CachedTeacher(LogitCache.open(place / "cache")), LossSpec("forward_kl")
    else:
        signal, loss = LiveTeacher(bundle(place, "teacher")), LossSpec("jsd")
    steps = len(windows.ids) // WINDOWS
    options = TrainOptions(steps=steps, batch_size=WINDOWS, learning_rate=RATE, warmup_share=0, decay_share=0)
    marks: list[tuple[float, float]] = []

    def mark(_: TrainLine | None) -> None:
        marks.append((time.process_time(), time.perf_counter()))

    base = status_bytes("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")
    mark(None)
    result = train(student, DistillObjective((loss,), signal), windows, options, on_step=mark)
    pairs = list(itertools.pairwise(marks))
    return {
        "cpu_seconds": [after[0] - before[0] for before, after in pairs],
        "wall_seconds": [after[1] - before[1] for before, after in pairs],
        "peak_over_base_bytes": status_bytes("VmHWM:") - base, "base_bytes": base, "last_loss": result.last_loss,
    }  # fmt: skip


def once(who: str, place: Path, peers: str) -> dict[str, float]:
    """Return one side's numbers from a fresh process."""
    if who.startswith("trl"):
        command = [peers, str(HERE / "peers" / "trl_gkd.py"), "--student", str(place / "student"),
                   "--teacher", str(place / "teacher"), "--run", str(place / "run"), "--batch", str(WINDOWS),
                   *(["--checkpointing"] if who == "trl-checkpointing" else [])]  # fmt: skip
    else:
        command = [sys.executable, "-P", __file__, "--who", who, "--place", str(place)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    median = {name: statistics.median(found[name][1:]) for name in ("cpu_seconds", "wall_seconds")}
    sizes = {name: found[name] for name in ("peak_over_base_bytes", "base_bytes", "last_loss")}
    return {**median, "tokens_per_cpu_second": WINDOWS * TOKENS / median["cpu_seconds"], **sizes}


def compare(options: argparse.Namespace) -> None:
    """Run all sides in turn and print the medians, and the peer's beside dwindle's."""
    sides = [who for who in SIDES if options.peers or not who.startswith("trl")]
    found: dict[str, list[dict[str, float]]] = {who: [] for who in sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.steps)
        for turn in range(options.runs):
            for who in sides:
                found[who].append(once(who, Path(folder), options.peers))
                print(f"run {turn + 1}, {who}: {found[who][-1]}", file=sys.stderr, flush=True)
    print(f"{WINDOWS} x {TOKENS} predictions a step, vocabulary {VOCABULARY}, one thread, {options.runs} runs")
    medians = {who: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for who, runs in found.items()}  # fmt: skip
    for who, numbers in medians.items():
        for key, number in numbers.items():
            ours = [medians[side][key] for side in SIDES[:2]]
            ratios = ", ".join(
                f"{side} / {who} {mine / number:.3f}" for side, mine in zip(SIDES[:2], ours, strict=True)
            )
            print(
                f"  {who:18} {key:22} {number:<14.6g} {ratios if who.startswith('trl') and key != 'last_loss' else ''}"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2))


def main() -> None:
    """Do one side's job, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=SIDES[:2], help="One side only; without it, all in turn.")
    parser.add_argument("--place", type=Path, help="With --who: the folder with the models.")
    parser.add_argument("--peers", help="Python of an environment with TRL; without it dwindle stands alone.")
    parser.add_argument("--runs", type=int, default=3, help="Fresh processes of each side.")
    parser.add_argument("--steps", type=int, default=4, help="Steps of a process; the first is not counted.")
    parser.add_argument("--json", type=Path, help="Also write all single results here.")
    options = parser.parse_args()
    if options.who:
        torch.set_num_threads(1)
        print(json.dumps(dwindle(options.place, cached=options.who == "dwindle-cached")))
        return
    compare(options)


if __name__ == "__main__":
    main()
