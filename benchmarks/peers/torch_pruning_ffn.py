"""Torch-Pruning's FFN units: its dependency graph and group scores, every layer's FFN cut to the same number of units.

    python benchmarks/peers/torch_pruning_ffn.py --model FOLDER --windows FILE --output FILE --kept N --method taylor

The path is that of its example for language models (`examples/LLMs/prune_llm.py`) with only the FFN cut: `magnitude`
is that example's own score, `taylor` the weights times their gradients, from the next-token loss of all calibration
windows in one backward sum. It runs in an environment of its own, without dwindle. Writes the FFNs' linears, cut, and
prints one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BATCH_TOKENS = 4096


def accumulate_gradients(model: torch.nn.Module, windows: torch.Tensor) -> None:
    """Add the gradient of the summed next-token loss of the windows to the weights."""
    for ids in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()


def main() -> None:
    """Cut one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kept", type=int, required=True)
    parser.add_argument("--method", choices=["taylor", "magnitude"], required=True)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    windows = load_file(asked.windows)["ids"]
    begun = time.process_time()
    if asked.method == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        accumulate_gradients(model, windows)
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    gates = [m for name, m in linears.items() if name.endswith("mlp.gate_proj")]
    roots = ("mlp.gate_proj", "mlp.up_proj")  # no other group is looked for: that of the hidden width takes minutes
    removed = 1 - asked.kept / gates[0].out_features
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=windows[:1, :16],
        importance=importance,
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(gates, removed),
        ignored_layers=[m for name, m in linears.items() if not name.endswith(roots)],
        output_transform=lambda out: out.logits,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    save_file({n: m.weight.detach().contiguous() for n, m in linears.items() if ".mlp." in n}, asked.output)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "torch-pruning")}
    print("\n" + json.dumps({"cpu_seconds": time.process_time() - begun, "versions": versions,
                             "kept": sorted({m.out_features for m in gates})}))  # fmt: skip


if __name__ == "__main__":
    main()
