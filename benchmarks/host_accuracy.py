"""This machine's estimate beside its measurement: random Llamas of 6, 170 and 500 million weights, float and int4.

    python benchmarks/host_accuracy.py [--rounds 3] [--threads 1] [--sizes 6M 170M] [--work FOLDER]

Estimate and measurement take turns: before and after every measurement, which is a fresh process, the profile of this
machine is measured afresh, and the mean of the two estimates is held to it. The median ratio over the rounds counts,
with the least and the largest: machines that others use drift by half within seconds, and what was measured minutes
apart says more about that than about the model. On one thread decode is compared in processor time, too: a token
waits for its turn, and no look at the machine can know how long; on quiet cores both are the same. Goals: decode within
20 %, peak memory within 10 %. Prints a table and, last, one JSON line. `make bench`, case `host`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from protocol import model_folder

from dwindle.devices import BenchOptions, Workload, estimate, measure, read_artifact
from dwindle.devices.host_profile import measure_profile

SIZES: dict[str, dict[str, int]] = {
    "6M": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
           "num_attention_heads": 8, "num_key_value_heads": 4},
    "170M": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "500M": {"vocab_size": 32000, "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 26,
             "num_attention_heads": 20, "num_key_value_heads": 4},
}  # fmt: skip
KINDS: dict[str, list[str]] = {"float": [], "int4": ["--scheme", "integer", "--bits", "4"]}
TOKENIZER = "stories260K"
"""Whose tokenizer the random models get."""
COMPARED = ("tokens_per_second", "time_to_first_token_seconds", "load_seconds", "peak_memory_bytes")


def write_model(size: str, folder: Path) -> None:
    """Write a random Llama in fp16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                         **SIZES[size])  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder(TOKENIZER)).save_pretrained(folder)


def write_artifact(size: str, kind: str, work: Path) -> Path:
    """Return an exported folder, written by the commands a user types if it is not there yet."""
    place = work / f"{size}-{kind}" / "onnx"
    if place.exists():
        return place
    model = work / f"{size}-model"
    if not model.exists():
        write_model(size, model)
    dwindle = [sys.executable, "-P", "-m", "dwindle.pipeline.cli"]
    if KINDS[kind]:
        packed = work / f"{size}-{kind}-packed"
        if not packed.exists():
            subprocess.run([*dwindle, "quantize", "-m", str(model), "-o", str(packed), *KINDS[kind]], check=True)
        model = packed
    command = [*dwindle, "export", "-m", str(model), "-o", str(place.parent), "--format", "onnx"]
    short = ["--set", "longest_tokens=64", "--set", "prompt_tokens=16", "--set", "decode_steps=4"]
    subprocess.run([*command, *short], check=True)
    return place


def look(artifacts: dict[str, Path], lengths: tuple[int, int], threads: int | None) -> dict[str, dict[str, float]]:
    """Return what a fresh look at this machine estimates for each artifact, and the seconds a token costs it."""
    profile = measure_profile.__wrapped__(threads)
    found = {}
    for name, folder in artifacts.items():
        workload = Workload.from_artifact(read_artifact(folder))
        metrics = estimate(profile, workload, lengths[0], sum(lengths)).metrics
        found[name] = {key: metrics[key].value or 0.0 for key in COMPARED}
        found[name]["processor_seconds"] = 1 / found[name]["tokens_per_second"]
    return found


def measured(folder: Path, options: BenchOptions) -> dict[str, float]:
    """Return what a fresh process takes."""
    result = measure(folder, options=options)
    found = {key: metric.value or 0.0 for key, metric in result.metrics().items()}
    each = [r.processor_seconds / len(r.token_seconds) for r in result.repeats if r.processor_seconds]
    return {**found, "processor_seconds": statistics.median(each)}


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Return the medians of (estimated, measured) pairs, and of their ratios with the extremes."""
    ratios = [ours / theirs for ours, theirs in pairs]
    estimated, actual = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"estimated": estimated, "measured": actual, "ratio": statistics.median(ratios), "least": min(ratios),
            "most": max(ratios)}  # fmt: skip


def main() -> None:
    """Take turns, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="Keep the models here; default: a temporary folder.")
    given = parser.parse_args()
    lengths = given.prompt_tokens, given.decode_tokens
    options = BenchOptions(*lengths, repeats=given.repeats, threads=given.threads, context=sum(lengths))
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        artifacts = {f"{kind}, {size}": write_artifact(size, kind, work) for size in given.sizes for kind in KINDS}
        found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in artifacts}
        for number in range(given.rounds):
            before = look(artifacts, lengths, given.threads)
            for name, folder in artifacts.items():
                theirs = measured(folder, options)
                after = look(artifacts, lengths, given.threads)
                for key in (*COMPARED, *(["processor_seconds"] if given.threads == 1 else [])):
                    pair = (before[name][key] + after[name][key]) / 2, theirs[key]
                    found[name].setdefault(key, []).append(pair)
                before = after
            print(f"round {number + 1} of {given.rounds} done", file=sys.stderr, flush=True)
    result = {name: {key: summary(pairs) for key, pairs in rows.items()} for name, rows in found.items()}
    for name, sides in result.items():
        print(f"{name:12} " + "  ".join(f"{key} {side['ratio']:.2f} ({side['least']:.2f} to {side['most']:.2f})"
                                        for key, side in sides.items()))  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
