"""Adapters for a tiny packed base, trained in one process or in two (started by torchrun)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dwindle.adapters import Adapter, AdaptOptions, RecoverOptions, TaskOptions, adapt, read_task, recover
from dwindle.bundle import ModelBundle
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

OPTIONS = AdaptOptions(rank=4, steps=8, learning_rate=1e-2, batch_size=8, held_out_records=8, replay=0.2, patience=2,
                       dpo_learning_rate=5e-3, log_every=1, evaluate_every=2, checkpoint_every=4)  # fmt: skip


def numbers(adapter: Adapter, record: Any) -> dict[str, Any]:
    details = record.details
    return {"losses": [line["loss"] for line in details["history"]], "held_out": details.get("held_out_losses"),
            "metrics": details.get("metrics_after"), "replayed": details.get("replayed_windows"),
            "tensors": {name: tensor.flatten().tolist() for name, tensor in adapter.tensors.items()}}  # fmt: skip


def outcome(folder: Path, work: str) -> dict[str, Any]:
    """Return losses and weights of a recovery, a task and preferences on the models in `folder`."""
    base, teacher = ModelBundle.load(folder / "base"), ModelBundle.load(folder / "teacher")
    ids = torch.randint(97, 123, (16, 33), generator=torch.Generator().manual_seed(0))
    text = TokenSet(ids, "train", "letters", "0" * 64, 528, encoding_sha256(base.tokenizer))
    recovery = recover(base, RecoverOptions(rank=4, steps=4, learning_rate=1e-2, batch_size=4, log_every=1),
                       teacher=teacher, train_tokens=text)  # fmt: skip
    task = TaskOptions("sounds", (str(folder / "sounds.jsonl"),), separator=" ")
    answers = adapt(base, OPTIONS, records=read_task(task), start=recovery[0], general=text, folder=folder / work)
    pairs = read_task(replace(task, completion=None, chosen="completion", rejected="worse"))
    preferred = adapt(base, OPTIONS, records=pairs, general=text)
    return {name: numbers(*found) for name, found in (("recover", recovery), ("sft", answers), ("dpo", preferred))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = outcome(Path(sys.argv[1]), "two")
    (Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
