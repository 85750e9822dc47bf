"""Learned mixture weights against fixed ones: one student, three places, equal tokens.

    python benchmarks/data_mixture.py [--seed 0] [--json mixture.json]

stories260K with half of its FFN, its full self the teacher, forward KL, 200 steps of 8 x 128 tokens. The places are
stories (what the teacher knows), the standard library (which it does not), and noise (stories with shuffled letters,
which nobody can predict); all begin with a third. Fixed weights stay there; learned ones follow the excess loss over
the teacher every 20 steps (`learn_weights_every`). Measured on text of each kind that nothing was trained on: nats a
token and the KL that is left to the teacher.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from protocol import RealModel

from dwindle import distill, prune
from dwindle.data import DataOptions, evaluation_set, training_set
from dwindle.data.sources import read_documents
from dwindle.distill import DistillOptions
from dwindle.measure import Meter
from dwindle.storage import write_json, write_text

PLACES = ("stories", "code", "noise")
STEPS, BATCH, CONTEXT, EVERY = 200, 8, 128, 20
BYTES = 700_000
EVALUATION_TOKENS = 8_192


def texts(model: RealModel, split: str) -> dict[str, str]:
    """Return about as much text of each place, from the split's files alone."""
    code = RealModel("pycode-6m").text if split == "train" else None
    stories = model.text.place(model.text.train[0] if split == "train" else model.text.evaluation)
    folders = (*code.train, "importlib", "concurrent", "multiprocessing") if code else ("asyncio",)
    library = Path(random.__file__).parent
    found = {
        "stories": [document.text for document in read_documents(stories, "text")],
        "code": [d.text for name in folders for d in read_documents(str(library / name), "text")],
    }
    draw = random.Random(split)  # noqa: S311
    found["noise"] = [" ".join("".join(draw.sample(word, len(word))) for word in text.split(" "))
                      for text in draw.sample(found["stories"], len(found["stories"]))]  # fmt: skip
    return {name: "\n<|endoftext|>\n".join(parts)[:BYTES] for name, parts in found.items()}


def main() -> None:
    """Train both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="Repeat for more.  [0]")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = RealModel("stories260K")
    teacher, found = model.bundle, list[dict[str, Any]]()
    student = prune.run(teacher, prune.PruneOptions(ffn_keep=0.5), model.calibration())[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for split in ("train", "evaluation"):
            for name, text in texts(model, split).items():
                write_text(folder / split / f"{name}.txt", text)
        meters = {
            name: Meter(evaluation_set(folder / "evaluation" / f"{name}.txt", teacher.tokenizer,
                                       max_tokens=EVALUATION_TOKENS), teacher, CONTEXT)
            for name in PLACES
        }  # fmt: skip
        _tell("teacher", None, {name: meter.measure(teacher) for name, meter in meters.items()}, {}, found)
        _tell("pruned", None, {name: meter.measure(student) for name, meter in meters.items()}, {}, found)
        places = tuple(str(folder / "train" / f"{name}.txt") for name in PLACES)
        for seed in asked.seed or (0,):
            for name, every in (("fixed", None), ("learned", EVERY)):
                data = DataOptions(places, weights=(1 / 3, 1 / 3, 1 / 3), learn_weights_every=every, context=CONTEXT,
                                   train_tokens=None if every else STEPS * BATCH * CONTEXT, seed=seed)  # fmt: skip
                options = DistillOptions(steps=STEPS, batch_size=BATCH, learning_rate=2e-3, seed=seed)
                tokens = training_set(data, teacher.tokenizer, teacher.anatomy.context)
                trained, record = distill.run(student, options, teacher=teacher, train=tokens)
                measured = {place: meter.measure(trained) for place, meter in meters.items()}
                _tell(name, seed, measured, record.details.get("mixture", {}), found)
    if asked.json:
        write_json(asked.json, found)


def _tell(name: str, seed: int | None, measured: dict[str, Any], mixture: dict[str, Any],
          found: list[dict[str, Any]]) -> None:  # fmt: skip
    nats = {place: one.nats_per_token for place, one in measured.items()}
    left = {place: one.kl_nats_per_token for place, one in measured.items()}
    found.append({"row": name, "seed": seed, "nats_per_token": nats, "kl": left, "mixture": mixture})
    last = mixture["history"][-1]["weights"] if mixture else None
    parts = ", ".join(f"{place} {nats[place]:.4f} (KL {left[place]:.4f})" for place in nats)
    told = f"; last weights {json.dumps([round(weight, 3) for weight in last])}" if last else ""
    print(f"{name}{'' if seed is None else f' seed {seed}'}: {parts}{told}", flush=True)


if __name__ == "__main__":
    main()
