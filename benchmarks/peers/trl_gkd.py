"""TRL's GKD trainer on given windows: the same starting weights, windows, order, rates and optimizer as dwindle's run.

    python benchmarks/peers/trl_gkd.py --student FOLDER --teacher FOLDER --run FILE --batch 8 [--output FILE]

FILE has `ids` [steps * batch, T + 1], in the order of their use, and `rates` [steps]. `lmbda` is 0: every batch is the
text as it is given. Precision is float32 (TRL's default is bfloat16 autocast) and `--checkpointing` turns on what TRL
does by default. It runs in an environment of its own, without dwindle. Writes the student's weights and prints one JSON
line: CPU and wall seconds of each step, and the peak of the process (VmHWM) over its state with both models loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class InOrder(GKDTrainer):
    """The trainer, reading its windows one after the other."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.marks.append((time.process_time(), time.perf_counter()))


def status_bytes(name: str) -> int:
    """Return a line of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def collated(windows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch; every token counts."""
    ids = torch.tensor([window["input_ids"] for window in windows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def no_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the trainer, which wants one and reads nothing with it here."""
    special = dict.fromkeys(("eos_token", "pad_token"), "<eos>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")), **special)


def optimizer_of(model: torch.nn.Module, asked: argparse.Namespace, rates: torch.Tensor) -> tuple[Any, Any]:
    """Return AdamW and its schedule as dwindle's loop has them."""
    weights = list(model.parameters())
    groups = [{"params": [p for p in weights if p.ndim >= 2], "weight_decay": asked.weight_decay},
              {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, asked.beta2), fused=True)
    last = len(rates) - 1
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(rates[min(step, last)]))


def main() -> None:
    """Train one student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--run", required=True, help="Windows and rates.")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--output", type=Path, help="Weights of the trained student.")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--checkpointing", action="store_true")
    asked = parser.parse_args()
    given = load_file(asked.run)
    student, teacher = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
                        for place in (asked.student, asked.teacher))  # fmt: skip
    sum(float(p.detach().sum()) for model in (student, teacher) for p in model.parameters())  # read from disk by now
    base, clock = status_bytes("VmRSS:"), Clock()
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder, lmbda=0.0, beta=asked.beta, max_steps=len(given["rates"]), max_grad_norm=1.0,
            per_device_train_batch_size=asked.batch, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            gradient_checkpointing=asked.checkpointing, disable_tqdm=True, max_length=None, logging_steps=1,
        )  # fmt: skip
        trainer = InOrder(
            student, teacher, config, data_collator=collated, processing_class=no_tokenizer(), callbacks=[clock],
            train_dataset=Dataset.from_dict({"input_ids": given["ids"].tolist()}),
            optimizers=optimizer_of(student, asked, given["rates"]),
        )  # fmt: skip
        clock.on_step_end()
        trainer.train()
    peak = status_bytes("VmHWM:") - base
    if asked.output:
        state = {name: value.detach().clone().contiguous() for name, value in student.named_parameters()}
        save_file(state, asked.output)
    pairs = list(itertools.pairwise(clock.marks))
    names = ("torch", "transformers", "trl", "accelerate")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print("\n" + json.dumps({
        "cpu_seconds": [after[0] - before[0] for before, after in pairs],
        "wall_seconds": [after[1] - before[1] for before, after in pairs],
        "peak_over_base_bytes": peak, "base_bytes": base, "last_loss": losses[-1],
        "versions": {name: importlib.metadata.version(name) for name in names},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
