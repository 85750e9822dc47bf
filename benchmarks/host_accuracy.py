"""This machine's estimate beside its measurement: random Llamas of 6, 170 and 500 million weights, float and int4.

    python benchmarks/host_accuracy.py [--rounds 5] [--threads 1] [--sizes 6M 170M] [--work FOLDER]

Estimate and measurement take turns: a round measures the profile of this machine afresh, estimates every artifact with
it and runs every artifact, each in a fresh process. What is compared is the median of each side's rounds, because a
machine that others use changes from second to second. Goals: decode within 20 %, peak memory within 10 %.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import model_folder

SIZES: dict[str, dict[str, int]] = {
    "6M": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
           "num_attention_heads": 8, "num_key_value_heads": 4},
    "170M": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "500M": {"vocab_size": 32000, "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 26,
             "num_attention_heads": 20, "num_key_value_heads": 4},
}  # fmt: skip
KINDS = {"float": [], "int4": ["--scheme", "integer", "--bits", "4"]}
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


def estimated(folder: Path, prompt: int) -> dict[str, float | None]:
    """Return what a fresh look at this machine estimates, without what a file can tell."""
    code = (
        "import json, sys; from dwindle.devices import Workload, estimate, load_profile, read_artifact; "
        "found = estimate(load_profile('host'), Workload.from_artifact(read_artifact(sys.argv[1])), int(sys.argv[2])); "
        "print(json.dumps({name: metric.value for name, metric in found.metrics.items()}))"
    )
    return last_json([sys.executable, "-P", "-c", code, str(folder), str(prompt)])


def last_json(command: list[str]) -> Any:
    """Return the JSON of a command's last line."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        write_artifact(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
