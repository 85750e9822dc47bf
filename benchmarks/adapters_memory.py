"""Peak memory of training an adapter on packed codes, beside training all weights of the same model.

    python benchmarks/adapters_memory.py

A random Llama of about 170M parameters; the same rows, batch and objective; fresh processes, one after the other. Each
prints its peak resident memory over what the process held before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dwindle.adapters import AdaptOptions
from dwindle.adapters.attach import adapter_config, attach, target_names
from dwindle.adapters.completion_loss import CompletionLoss
from dwindle.bundle import ModelBundle
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized
from dwindle.starter import TEACHER
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import train

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
         "num_key_value_heads": 8, "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip
BATCH, TOKENS, STEPS = 4, 64, 2


def status_bytes(name: str) -> int:
    """Return a line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def make(folder: Path) -> None:
    """Write the float model and its 4-bit codes."""
    teacher = ModelBundle.load(TEACHER)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=teacher.anatomy.vocab, bos_token_id=0, eos_token_id=1, **SHAPE)
    bundle = ModelBundle.from_model(LlamaForCausalLM(config), teacher.tokenizer, name="random-llama")
    bundle.save(folder / "float")
    quantized(bundle, QuantizeOptions(scheme="integer", bits=4, method="rtn"))[0].save(folder / "codes")


def one(who: str, folder: Path) -> dict[str, Any]:
    """Train two steps; return the peak over the state before the model was loaded."""
    torch.set_num_threads(1)
    base = status_bytes("VmRSS:")
    bundle = ModelBundle.load(folder / ("float" if who == "full" else "codes"))
    model: Any = bundle.model
    options = AdaptOptions(rank=16, steps=STEPS, batch_size=BATCH)
    if who == "adapter":
        names = target_names(bundle, ("all",), options.rank)
        model = attach(bundle, adapter_config(bundle, options, names)).model
        del bundle
    ids = torch.randint(3, 2000, (8, TOKENS))
    rows = torch.cat([torch.full((8, 1), TOKENS), torch.full((8, 1), TOKENS // 2), ids], dim=1)
    tokens = TokenSet(
        rows, "train", "random", "0" * 64, rows.numel(), encoding_sha256(ModelBundle.load(TEACHER).tokenizer)
    )
    Path("/proc/self/clear_refs").write_text("5")
    train(model, CompletionLoss(), tokens, replace(options, log_every=1).training)
    return {"who": who, "peak_over_base_bytes": status_bytes("VmHWM:") - base,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}  # fmt: skip


def main() -> None:
    """Print both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=("make", "adapter", "full"), help="One process of the benchmark.")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.who == "make":
        make(options.folder)
        return
    if options.who:
        print(json.dumps(one(options.who, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for who in ("make", "full", "adapter"):
            command = [sys.executable, "-P", str(Path(__file__).resolve()), "--who", who, "--folder", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            if who != "make":
                found[who] = json.loads(done.stdout.strip().splitlines()[-1])
    ratio = found["adapter"]["peak_over_base_bytes"] / found["full"]["peak_over_base_bytes"]
    print(json.dumps({**found, "adapter_over_full": ratio}))


if __name__ == "__main__":
    main()
