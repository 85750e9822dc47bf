"""Decode and prefill of our int4 ONNX beside onnxruntime-genai's own builder, on one random Llama.

    python benchmarks/onnx_decode.py [--rounds 9] [--threads 2] [--work FOLDER]

The model has 168 million weights: width 1024, 12 layers, 16 heads on 4 KV heads, FFN 2816, vocabulary 32000, tied. Like
is compared with like: all linears, embedding and head in 4 bits, activations of the products in int8 (the builder's
default on a CPU, accuracy level 4). The builder gives the tied table groups of 32, dwindle a scale a row.

Both folders are opened in one process and take short turns, so that a busy machine slows both alike: a round is a
prefill and a few decode steps of the one, then of the other. Medians of the rounds' ratios dwindle / builder are what
to quote. Two harnesses: onnxruntime-genai's generation loop, and plain onnxruntime fed with numpy arrays, the cache
handed from step to step.

Memory is the highest resident set of a fresh process: the builder's, our `dwindle quantize`, and our exporter over the
packed folder that left. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from protocol import model_folder

WEIGHTS = ("model.onnx", "model.onnx.data")
TOKENIZER = "stories260K"
"""Whose tokenizer the random model gets."""
Turn = Callable[[np.ndarray, int], tuple[float, float]]
"""(prompt ids [T], decode steps) -> (prefill seconds, decode seconds)."""


def random_model(folder: Path) -> None:
    """Write the model in fp16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder(TOKENIZER)).save_pretrained(folder)


def export(packed: Path, folder: Path) -> None:
    """Write our graph and its genai_config.json: the exporter alone, without the parity check."""
    from dwindle.bundle import ModelBundle
    from dwindle.export.genai_config import genai_config
    from dwindle.export.onnx_graph import export_onnx
    from dwindle.export.options import ExportOptions
    from dwindle.storage import write_json

    bundle = ModelBundle.load(packed)
    options = ExportOptions(formats=("onnx",), activations="int8").resolved(bundle.anatomy)
    folder.mkdir()
    export_onnx(bundle, folder, options)
    write_json(folder / "genai_config.json", genai_config(bundle, options))
    bundle.tokenizer.save_pretrained(folder)


def genai_turn(folder: Path, threads: int) -> Turn:
    """Return one turn of onnxruntime-genai's loop."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def turn(prompt: np.ndarray, steps: int) -> tuple[float, float]:
        length = len(prompt) + steps + 1
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length)
        generator = genai.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle

    return turn


def runtime_turn(folder: Path, threads: int) -> Turn:
    """Return one turn of plain onnxruntime: arrays in, arrays out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    outputs = ["logits", *("present" + name.removeprefix("past_key_values") for name in names)]

    def turn(prompt: np.ndarray, steps: int) -> tuple[float, float]:
        past: dict[str, Any] = {name: np.zeros((1, 4, 0, 64), np.float32) for name in names}
        ids, seconds = prompt[None].astype(np.int64), []
        for _ in range(steps + 1):
            total = ids.shape[1] + past[names[0]].shape[2]
            start = time.perf_counter()
            logits, *present = session.run(outputs, {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64),
                                                     **past})  # fmt: skip
            seconds.append(time.perf_counter() - start)
            past, ids = dict(zip(names, present, strict=True)), logits[:, -1:].argmax(-1)
        return seconds[0], sum(seconds[1:])

    return turn


def compared(ours: Turn, peers: Turn, rounds: int, prompt: np.ndarray, steps: int) -> dict[str, float]:
    """Return medians of tokens/s of both and of their ratio, over rounds in turn; the first round warms up."""
    speeds = []
    for index in range(rounds + 1):
        order = (ours, peers) if index % 2 else (peers, ours)
        found = {turn: turn(prompt, steps) for turn in order}
        if index:
            speeds.append([(len(prompt) / a, steps / b) for a, b in (found[ours], found[peers])])
    result = {}
    for place, kind in enumerate(("prefill", "decode")):
        mine, other = ([pair[side][place] for pair in speeds] for side in (0, 1))
        ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
        result |= {f"{kind}_tokens_per_second": statistics.median(mine),
                   f"{kind}_tokens_per_second_builder": statistics.median(other),
                   f"{kind}_ratio": statistics.median(ratios), f"{kind}_ratio_lowest": ratios[0],
                   f"{kind}_ratio_highest": ratios[-1]}  # fmt: skip
    return result


def peak_of(command: list[str]) -> int:
    """Return the highest resident bytes of a command that must succeed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss * 1024


def written(work: Path) -> dict[str, float]:
    """Write what is missing of both folders; return bytes, and the peaks of what was run."""
    python, found = [sys.executable, "-P"], {}
    if not (work / "model").exists():
        random_model(work / "model")
    if not (work / "builder").exists():
        command = ["-m", "onnxruntime_genai.models.builder", "-m", str(work / "model"), "-o", str(work / "builder")]
        found["builder_peak_rss_bytes"] = peak_of([*python, *command, "-p", "int4", "-e", "cpu"])
    if not (work / "packed").exists():
        command = ["-m", "dwindle.pipeline.cli", "quantize", "-m", str(work / "model"), "-o", str(work / "packed")]
        form = ["--scheme", "integer", "--bits", "4", "--set", "embedding_bits=4"]
        found["quantize_peak_rss_bytes"] = peak_of([*python, *command, *form])
    if not (work / "dwindle").exists():
        found["export_peak_rss_bytes"] = peak_of([sys.executable, __file__, "--export", str(work)])
    for side in ("dwindle", "builder"):
        files = [work / side / name for name in WEIGHTS]
        found[f"{side}_bytes"] = sum(path.stat().st_size for path in files if path.exists())
    found["bytes_ratio"] = found["dwindle_bytes"] / found["builder_bytes"]
    if "builder_peak_rss_bytes" in found and "export_peak_rss_bytes" in found:
        found["export_peak_rss_ratio"] = found["export_peak_rss_bytes"] / found["builder_peak_rss_bytes"]
    return found


def main() -> None:
    """Write both models, let them run in turn, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="Tokens of a round's prefill.")
    parser.add_argument("--steps", type=int, default=8, help="Decode steps of a round.")
    parser.add_argument("--work", type=Path, help="Keep the folders here; default: a temporary folder.")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(options.export / "packed", options.export / "dwindle")
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = written(work)
        prompt = np.random.default_rng(0).integers(3, 512, options.prompt)
        for name, make in (("genai", genai_turn), ("onnxruntime", runtime_turn)):
            ours, peers = (make(work / side, options.threads) for side in ("dwindle", "builder"))
            result[name] = compared(ours, peers, options.rounds, prompt, options.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
