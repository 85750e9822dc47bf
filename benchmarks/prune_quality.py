"""The pruning tables: dwindle, the usual scores and Torch-Pruning on one protocol, cut and then equally distilled.

    python benchmarks/prune_quality.py --results prune_quality.json --peer .venv-peers/bin/python
    python benchmarks/prune_quality.py --results prune_quality.json --print
    python benchmarks/prune_quality.py --results prune_quality.json --write docs/pruning.md

`protocol` has the models and their texts, `prune_rows` the rows, shares, steps and batches. Scores, compensation and
the peer get the same calibration windows; every distillation starts from the same seed and reads the same windows in
the same order, masks the windows before those. Nothing is measured on text that anything was scored, fitted or trained
on. First all cuts are measured, then all rows are trained; each record is written as soon as it is measured and is not
done twice, and a training that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from protocol import MODELS, RealModel, model_folder
from prune_rows import (
    BATCHES,
    CALIBRATION_WINDOWS,
    EVALUATION_TOKENS,
    RATES,
    ROWS,
    SHARES,
    STEPS,
    Row,
    kept_units,
)
from prune_table import markdown, written_into
from safetensors.torch import load_file, save_file

from dwindle import distill, prune
from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, training_set
from dwindle.distill import DistillOptions
from dwindle.storage import write_json, write_text
from dwindle.token_set import TokenSet

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]
_KEY = ("model", "table", "row", "stage")
_SEED = 0


class Results:
    """The records of one results file, by model, table, row and stage (`cut` or `trained`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = json.loads(path.read_text()) if path.exists() else []

    def has(self, key: Record) -> bool:
        """Return True if a record of this key is there."""
        return any(all(record[k] == key[k] for k in _KEY) for record in self.records)

    def add(self, record: Record) -> None:
        """Append a record, write the file, and say so."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.records)
        told = record.get("failed") or f"{record['nats_per_token']:.4f} nats, {record['cpu_seconds']:.0f} CPU s"
        print(f"{record['model']}, {record['table']}, {record['row']}, {record['stage']}: {told}", flush=True)


class Bench:
    """One model with its texts, and what is done to it."""

    def __init__(self, name: str, peer: str | None, work: Path) -> None:
        self.name, self.peer, self.work = name, peer, work
        self.real = RealModel(name)
        self.bundle = self.real.bundle

    @cached_property
    def meter(self) -> Any:
        """Return the meter; the full model is the reference of KL and agreement."""
        return self.real.meter(EVALUATION_TOKENS)

    @cached_property
    def calibration(self) -> TokenSet:
        """Return the calibration windows."""
        found = self.real.calibration()
        return replace(found, ids=found.ids[:CALIBRATION_WINDOWS].contiguous())

    @cached_property
    def training(self) -> TokenSet:
        """Return the training windows."""
        train = tuple(self.real.text.place(place) for place in self.real.text.train)
        options = DataOptions(train=train, context=BATCHES[self.name].tokens, seed=_SEED)
        return training_set(options, self.bundle.tokenizer, self.bundle.anatomy.context)

    def measured(self, bundle: ModelBundle) -> Record:
        """Return the quality of a bundle."""
        found = self.meter.measure(bundle)
        return {
            "nats_per_token": found.nats_per_token,
            "kl": found.kl_nats_per_token,
            "agreement": found.top1_agreement,
            "parameters": found.parameters,
            "evaluation_tokens": self.meter.evaluation.tokens,
        }

    def cut(self, row: Row) -> ModelBundle:
        """Return the pruned bundle of a row, masks trained."""
        if row.peer_method is not None:
            return self._peer_cut(row)
        options = dict(row.options)
        if row.mask_steps:
            masks = {"steps": row.mask_steps, "batch_size": BATCHES[self.name].windows, "seed": _SEED}
            if row.weights_learn:
                masks["weight_rate"] = RATES[self.name]
            options["masks"] = prune.MaskOptions(**masks)
        return prune.run(
            self.bundle,
            prune.PruneOptions(ffn_keep=SHARES[row.table], multiple=1, **options),
            self.calibration,
            train=self._windows(0, row.mask_steps),
            folder=self.work / "masks",
        )[0]

    def _peer_cut(self, row: Row) -> ModelBundle:
        if self.peer is None:
            raise SystemExit("give --peer, the Python of an environment with requirements/peers.txt.")
        kept = kept_units(row.table, self.bundle.anatomy.ffn_width[0])
        with tempfile.TemporaryDirectory() as folder:
            windows, output = Path(folder) / "windows.safetensors", Path(folder) / "linears.safetensors"
            save_file({"ids": self.calibration.ids}, windows)
            command = [self.peer, str(HERE / "peers" / "torch_pruning_ffn.py"), "--model", str(model_folder(self.name)),
                       "--windows", str(windows), "--output", str(output), "--kept", str(kept),
                       "--method", str(row.peer_method)]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment.pop("PYTHONPATH", None)
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            linears = load_file(output)
        plain = prune.PruneOptions(ffn_keep=SHARES[row.table], multiple=1, method="magnitude", compensate=False)
        shaped = prune.run(self.bundle, plain)[0]
        shaped.model.load_state_dict({f"{name}.weight": weight for name, weight in linears.items()}, strict=False)
        return shaped.stored_dtype_rounded()

    def trained(self, row: Row, student: ModelBundle) -> ModelBundle:
        """Return the student after the row's steps of distillation."""
        steps = STEPS[row.table] - row.mask_steps
        options = DistillOptions(steps=steps, batch_size=BATCHES[self.name].windows, learning_rate=RATES[self.name],
                                 seed=_SEED, checkpoint_every=50)  # fmt: skip
        tokens = self._windows(row.mask_steps, steps)
        return distill.run(student, options, teacher=self.bundle, train=tokens, folder=self.work / "distill")[0]

    def _windows(self, done: int, steps: int) -> TokenSet:
        """Return the windows for `steps` steps that follow those of `done` steps, as many as there are."""
        size, found = BATCHES[self.name].windows, self.training
        first = done * size if (done + steps) * size <= len(found.ids) else 0
        ids = found.ids[first : first + max(1, steps) * size]
        return replace(found, ids=ids, sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _jobs(models: list[str], tables: list[str]) -> Iterator[tuple[str, str, Row]]:
    """Yield (stage, model, row): the cuts of all models first, then the training, the quick models first."""
    for stage in ("cut", "trained"):
        for model in models:
            for row in ROWS:
                if row.table in tables:
                    yield stage, model, row


def run(results: Results, models: list[str], tables: list[str], stages: list[str], peer: str | None) -> None:
    """Do what is missing."""
    benches: dict[str, Bench] = {}
    for stage, model, row in _jobs(models, tables):
        key: Record = {"model": model, "table": row.table, "row": row.name, "stage": stage}
        if stage not in stages or results.has(key):
            continue
        if not model_folder(model).is_dir():
            print(f"{model}: skipped, there is no {model_folder(model)}; set DWINDLE_ASSETS to a folder with models/.")
            continue
        work = results.path.with_suffix(".work") / hashlib.sha256(f"{model} {row}".encode()).hexdigest()[:16]
        bench = benches.setdefault(model, Bench(model, peer, work))
        bench.work = work
        begun = time.process_time()
        try:
            student = bench.cut(row)
            if stage == "trained":
                student = bench.trained(row, student)
            record = key | bench.measured(student)
        except subprocess.CalledProcessError as error:
            record = key | {"failed": f"the peer ended with code {error.returncode}"}
        results.add(record | {"cpu_seconds": time.process_time() - begun})
        if stage == "trained":
            shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Run, print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="Only this model; repeat for more.")
    parser.add_argument("--table", action="append", choices=list(STEPS), help="Only this table.")
    parser.add_argument("--stage", action="append", choices=["cut", "trained"], help="Only this stage.")
    parser.add_argument("--peer", help="Python of the environment with Torch-Pruning.")
    parser.add_argument("--print", action="store_true", dest="only_print", help="Print the tables and do nothing.")
    parser.add_argument("--write", type=Path, help="Put the tables between the marks of this page and do nothing.")
    asked = parser.parse_args()
    results = Results(asked.results)
    if asked.write:
        write_text(asked.write, written_into(asked.write.read_text(), results.records))
        return
    if not asked.only_print:
        run(results, asked.model or list(MODELS), asked.table or list(STEPS), asked.stage or ["cut", "trained"],
            asked.peer)  # fmt: skip
    sys.stdout.write(markdown(results.records) + "\n")


if __name__ == "__main__":
    main()
