"""TRL's DPO loss on given pairs: `DPOTrainer` as it computes it, in an environment of its own, without dwindle.

    python benchmarks/peers/trl_dpo.py --policy FOLDER --reference FOLDER --pairs FILE --beta 0.1

FILE is JSON: a list of {prompt_ids, chosen_ids, rejected_ids}. Prints one JSON line: the loss of all pairs as one
batch, and the norm of its gradient.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


class OnIds(DPOTrainer):
    """The trainer, on pairs that are ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def main() -> None:
    """Print loss and gradient norm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--beta", type=float, required=True)
    asked = parser.parse_args()
    policy, reference = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
                         for place in (asked.policy, asked.reference))  # fmt: skip
    pairs = json.loads(asked.pairs.read_text())
    special = dict.fromkeys(("eos_token", "pad_token"), "<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")), **special)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, beta=asked.beta, use_cpu=True, bf16=False, report_to=[], max_length=None,
                           per_device_train_batch_size=len(pairs), gradient_checkpointing=False, disable_dropout=True,
                           disable_tqdm=True)  # fmt: skip
        trainer = OnIds(policy, reference, config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
        loss = trainer.compute_loss(policy, trainer.data_collator(pairs))
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")))
    names = ("torch", "transformers", "trl")
    print("\n" + json.dumps({"loss": float(loss.detach()), "gradient_norm": norm,
                             "versions": {name: importlib.metadata.version(name) for name in names}}))  # fmt: skip


if __name__ == "__main__":
    main()
