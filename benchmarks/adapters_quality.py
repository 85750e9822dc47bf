"""What adapters give back and what they learn: recovery by bits and rank, and tasks beside full fine-tuning.

    python benchmarks/adapters_quality.py --results adapters.json
    python benchmarks/adapters_quality.py --results adapters.json --only recovery-stories260K-2-16
    python benchmarks/adapters_quality.py --results adapters.json --write docs/adapters.md

Recovery: LNQ palettes of the decoder's linears, at 2 bits and mixed to 3.5, calibrated as in the quality table; the
adapter of every row takes the same steps over the same windows, and KL(float || adapted) is measured on unseen text.

Tasks: the starter's teacher at 2-bit palettes. Every row reads the same records for the same epochs and is measured on
the same held-out records: the float model, its codes, an adapter from the recovery adapter, one from nothing, and all
weights of the float model trained. Each keeps its best state by the held-out loss of a part of the training records,
and is measured on records that chose nothing. A row is written as soon as it is measured and not done twice.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from marked_page import between
from protocol import RealModel, assets, model_folder

from dwindle import adapters, quantize
from dwindle.adapters.completion_loss import CompletionLoss
from dwindle.adapters.task_metrics import task_metrics
from dwindle.adapters.task_tokens import completion_rows
from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, evaluation_set, training_set
from dwindle.measure import Meter
from dwindle.starter import SPLITS, TEACHER, corpus, story, tasks
from dwindle.storage import write_json, write_text
from dwindle.train import train

BEGIN, END = "<!-- adapters table: begin -->", "<!-- adapters table: end -->"
RANKS = (8, 16, 32)
BITS = (2.0, 3.5)
Record = dict[str, Any]


@dataclass(frozen=True)
class Recovery:
    """How a model's recovery adapters are trained."""

    steps: int
    batch: int
    context: int
    rates: Mapping[float, float]
    """Peak rate by bits: the smaller the error to begin with, the lower."""
    rows: tuple[tuple[float, int], ...]
    """(bits, rank) of each row."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Options of `recover` that are not the defaults."""


RECOVERY = {
    "stories260K": Recovery(300, 8, 256, dict.fromkeys(BITS, 2.5e-3), tuple((b, rank) for b in BITS for rank in RANKS)),
    "pycode-6m": Recovery(300, 4, 256, {2.0: 5e-4, 3.5: 3e-4}, ((2.0, 8), (2.0, 16), (2.0, 32), (3.5, 16), (3.5, 32)),
                          {"schedule": "cosine", "warmup_share": 0.1}),
}  # fmt: skip
TASKS = ("starter", "banking77", "clinc150")
KINDS = ("float", "quantized", "recovered", "from recovery", "from scratch", "full fine-tuning")
CLASSES = 10
"""Intents of each set: those with the most records, the first in order among equals."""
EPOCHS = {"starter": 2, "banking77": 16, "clinc150": 16}
RATES, FULL_RATES = (2e-3, 6e-3), (2e-4, 6e-4)
"""Peak rates of adapters and of full fine-tuning; the one with the lowest held-out loss is taken."""


def rows() -> list[str]:
    """Return the names of all rows, in the order of their work."""
    recovery = [f"recovery-{model}-{bits:g}-{rank}" for model, one in RECOVERY.items() for bits, rank in one.rows]
    return [*recovery, *(f"task-{task}" for task in TASKS)]


# -- recovery ----------------------------------------------------------------------------------------------------


def coded(name: str, bits: float, folder: Path) -> ModelBundle:
    """Return the quantized model, made once."""
    place = folder / f"{name}-{bits:g}"
    if not place.exists():
        real = RealModel(name)
        wanted: Record = {"bits": int(bits)} if bits.is_integer() else {"target_bits_per_weight": bits}
        options = quantize.QuantizeOptions(scheme="palettize", **wanted)
        quantize.run(real.bundle, options, real.calibration())[0].save(place)
    return ModelBundle.load(place)


def recovery(model: str, bits: float, rank: int, folder: Path) -> Record:
    """Train and measure one recovery adapter."""
    setting, real = RECOVERY[model], RealModel(model)
    base = coded(model, bits, folder)
    text = DataOptions(train=tuple(real.text.place(one) for one in real.text.train), context=setting.context)
    tokens = training_set(text, base.tokenizer, base.anatomy.context)
    options = adapters.RecoverOptions(rank=rank, steps=setting.steps, batch_size=setting.batch,
                                      learning_rate=setting.rates[bits], **setting.more)  # fmt: skip
    adapter, record = adapters.recover(base, options, teacher=real.bundle, train_tokens=tokens)
    adapter, record, _ = adapters.measured(adapter, record, base, real.meter(16_384))
    return {
        "kl_before": adapter.card.metrics["kl_before"], "kl_after": adapter.card.metrics["kl_nats_per_token"],
        "closed": adapter.card.metrics["kl_closed"], "bits_before": record.before.bits_per_weight_linear,
        "bits_after": record.after.bits_per_weight_linear, "adapter_bytes": adapter.bytes, "seconds": record.seconds,
    }  # fmt: skip


# -- tasks -------------------------------------------------------------------------------------------------------


def starter_records(folder: Path) -> adapters.TaskOptions:
    """Return the starter's questions, two of each story; what is measured is of the test split."""
    for name, seeds in (("train", range(800_000_000, 800_000_160)), ("test", SPLITS["test"][:50])):
        lines = [{"prompt": t.prompt, "answer": t.answer, "choices": t.choices}
                 for seed in seeds for t in tasks(story(seed))[:2]]  # fmt: skip
        write_text(folder / f"starter-{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return adapters.TaskOptions(
        "starter", (str(folder / "starter-train.jsonl"),), completion="answer", choices="choices", template="plain",
        metrics=("label_accuracy",), held_out=(str(folder / "starter-test.jsonl"),),
    )  # fmt: skip


def intent_records(name: str, folder: Path) -> adapters.TaskOptions:
    """Return a subset of an intent set: 10 classes, 30 records of each to train on and 10 to measure."""
    data = assets() / "data" / "tasks"
    if name == "banking77":
        splits = {split: [(row["text"], row["category"]) for row in csv.DictReader((data / f"banking77_{split}.csv")
                  .open(encoding="utf-8"))] for split in ("train", "test")}  # fmt: skip
    else:
        raw = json.loads((data / "clinc150_small.json").read_text(encoding="utf-8"))
        splits = {split: [(text, label) for text, label in raw[split]] for split in ("train", "test")}
    count = Counter(label for _, label in splits["train"])
    chosen = sorted(count, key=lambda label: (-count[label], label))[:CLASSES]
    for split, each in (("train", 30), ("test", 10)):
        lines = []
        for label in chosen:
            texts = sorted(text for text, other in splits[split] if other == label)
            picked = random.Random(label).sample(texts, min(each, len(texts)))  # noqa: S311
            lines += [{"text": text, "intent": label.replace("_", " ")} for text in picked]
        write_text(folder / f"{name}-{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return adapters.TaskOptions(name, (str(folder / f"{name}-train.jsonl"),), prompt="{text}\nIntent:", label="intent",
                                template="plain", held_out=(str(folder / f"{name}-test.jsonl"),))  # fmt: skip


class TaskBench:
    """One task with the models that learn it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.float = ModelBundle.load(TEACHER)
        self.base = self._base(folder)
        self.recovery = self._recovery(folder)
        task = starter_records(folder) if name == "starter" else intent_records(name, folder)
        whole = adapters.read_task(task)
        self.measured = whole.held_out
        inner = replace(whole, held_out=whole.train[::8], train=tuple(r for i, r in enumerate(whole.train) if i % 8))
        self.records = inner
        self.options = adapters.AdaptOptions(epochs=EPOCHS[name], batch_size=16, patience=None, replay=0.0)

    def _base(self, folder: Path) -> ModelBundle:
        place = folder / "starter-2"
        if not place.exists():
            texts = self._texts(folder)
            calibration = training_set(replace(texts, context=256), self.float.tokenizer, 256)
            options = quantize.QuantizeOptions(scheme="palettize", bits=2)
            windows = replace(calibration, role="calibration", ids=calibration.ids[:64, :-1].contiguous())
            quantize.run(self.float, options, windows)[0].save(place)
        return ModelBundle.load(place)

    def _texts(self, folder: Path) -> DataOptions:
        place = folder / "stories.txt"
        if not place.exists():
            write_text(place, "\n<|endoftext|>\n".join(corpus(11, 3000)) + "\n")
        return DataOptions(train=(str(place),), context=256)

    def _recovery(self, folder: Path) -> adapters.Adapter:
        place = folder / "starter-2-recovery"
        if not place.exists():
            tokens = training_set(self._texts(folder), self.base.tokenizer, 256)
            options = adapters.RecoverOptions(rank=16, steps=100, batch_size=4, learning_rate=RATES[0])
            adapters.recover(self.base, options, teacher=self.float, train_tokens=tokens)[0].save(place)
        return adapters.Adapter.load(place)

    def score(self, model: ModelBundle) -> Record:
        """Return the metrics on the records that chose nothing."""
        held = adapters.tokenised(model, replace(self.records, held_out=self.measured))
        return task_metrics(model, self.records, held.encoder, held.held_out)

    def adapter(self, start: adapters.Adapter | None) -> Record:
        """Train an adapter and return its metrics."""
        tried = []
        for rate in RATES:
            options = replace(self.options, learning_rate=rate)
            made, record = adapters.adapt(self.base, options, records=self.records, start=start)
            losses, best = record.details["held_out_losses"], record.details["best_step"]
            tried.append((losses[str(best)], rate, best, made))
        _, rate, best, made = min(tried, key=lambda one: one[0])
        return {**self.score(made.on(self.base)), "best_step": best, "rate": rate}

    def full(self) -> Record:
        """Train all weights of the float model on the same records and return its metrics."""
        encoded = adapters.tokenised(self.float, self.records)
        table, kept = completion_rows(self.float, encoded.train), completion_rows(self.float, encoded.held_out).ids
        best: Record = {}

        def look(module: torch.nn.Module, step: int) -> Mapping[str, float]:
            sums = [CompletionLoss().sums(module, part) for part in torch.split(kept, 16)]
            loss = float(sum(s[0] for s, _ in sums)) / int(sum(c[0] for _, c in sums))
            if loss < best.get("loss", float("inf")):
                best.update(loss=loss, step=step, rate=rate, state=copy.deepcopy(module.state_dict()))
            return {"held_out_loss": loss}

        for rate in FULL_RATES:
            model = replace(self.float, model=copy.deepcopy(self.float.model))
            options = replace(self.options.run_options("sft", *table.ids.shape), learning_rate=rate)
            train(model.model, CompletionLoss(), table, options, evaluate=look)
        model.model.load_state_dict(best["state"])
        return {**self.score(model), "best_step": best["step"], "rate": best["rate"]}

    def run(self) -> Record:
        """Return the metrics of every kind of model."""
        made: Mapping[str, Callable[[], Record]] = {
            "float": lambda: self.score(self.float), "quantized": lambda: self.score(self.base),
            "recovered": lambda: self.score(self.recovery.on(self.base)),
            "from recovery": lambda: self.adapter(self.recovery), "from scratch": lambda: self.adapter(None),
            "full fine-tuning": self.full,
        }  # fmt: skip
        found: Record = {kind: made[kind]() for kind in KINDS}
        full, ours = (found[kind]["label_accuracy"] for kind in ("full fine-tuning", "from recovery"))
        meter = Meter(evaluation_set(self._evaluation(), self.base.tokenizer, max_tokens=8192), self.float)
        lost = [meter.measure(one).kl_nats_per_token for one in (self.base, self.recovery.on(self.base))]
        return {**found, "share_of_full": ours / full, "kl_quantized": lost[0], "kl_recovered": lost[1],
                "records": len(self.records.train), "measured": len(self.measured)}  # fmt: skip

    def _evaluation(self) -> str:
        place = Path(tempfile.gettempdir()) / "dwindle-stories.txt"
        write_text(place, "\n\n".join(corpus(12, 200, "validation")) + "\n")
        return str(place)


# -- results -----------------------------------------------------------------------------------------------------


def one_row(name: str, folder: Path) -> Record:
    """Do one row."""
    kind, _, rest = name.partition("-")
    if kind == "task":
        return TaskBench(rest, folder).run()
    model, bits, rank = rest.rsplit("-", 2)
    return recovery(model, float(bits), int(rank), folder)


def markdown(found: Mapping[str, Record]) -> str:
    """Return the two tables."""
    lines = ["| model | bits of the linears | rank | KL quantized | KL recovered | gap closed | with the adapter | "
             "its bytes |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in rows():
        if name.startswith("recovery") and name in found:
            one, (model, bits, rank) = found[name], name.removeprefix("recovery-").rsplit("-", 2)
            lines.append(f"| {model} | {bits} | {rank} | {one['kl_before']:.4f} | {one['kl_after']:.4f} | "
                         f"{one['closed']:.0%} | {one['bits_after']:.2f} | {one['adapter_bytes']:,} |")  # fmt: skip
    if any(f"task-{task}" in found for task in TASKS):
        lines += ["", f"| task | {' | '.join(KINDS)} | from recovery / full |", "|---" * (len(KINDS) + 2) + "|"]
    for task in TASKS:
        if (one := found.get(f"task-{task}")) is not None:
            cells = " | ".join(f"{one[kind]['label_accuracy']:.1%}" for kind in KINDS)
            lines.append(f"| {task} ({one['measured']} records) | {cells} | {one['share_of_full']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Do what is missing, then print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=rows(), help="Only this row; repeat for more.")
    parser.add_argument("--write", type=Path, help="Put the tables into this page, and do nothing else.")
    options = parser.parse_args()
    found: dict[str, Record] = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        write_text(options.write, between(page, BEGIN, END, markdown(found)))
        return
    folder = options.results.resolve().parent / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.only or rows():
        needs = name.split("-", 1)[1].rsplit("-", 2)[0]
        if name in found or (name.startswith("recovery") and not model_folder(needs).is_dir()):
            continue
        found[name] = one_row(name, folder)
        write_json(options.results, found)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(markdown(found))


if __name__ == "__main__":
    main()
