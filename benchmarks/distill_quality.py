"""The table of losses: one pruned student, distilled with each loss and by TRL's GKD, on the same tokens.

    python benchmarks/distill_quality.py --results distill_quality.json --peer .venv-peers/bin/python
    python benchmarks/distill_quality.py --results distill_quality.json --write docs/distillation.md

The student is the model with half of its FFN units, cut as `dwindle prune` does by default; the full model is the
teacher. Every row starts from it and takes the same steps over the same windows in the same order, with the same AdamW,
rates and clipping. TRL's GKD (`peers/trl_gkd.py`) gets the student's folder, the windows in the order of their use and
the rate of each step, trains in its own environment, and its weights are measured here as all others are. Nothing is
measured on text that anything was fitted or trained on. A row is written as soon as it is measured and not done twice.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from marked_page import between
from protocol import RealModel, Training, model_folder
from safetensors.torch import load_file, save_file

from dwindle import distill, prune
from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, training_set
from dwindle.data_order import windows_of_step
from dwindle.distill import DistillOptions
from dwindle.schedules import schedule_of
from dwindle.storage import write_json, write_text
from dwindle.token_set import TokenSet

PEER = Path(__file__).resolve().parent / "peers" / "trl_gkd.py"
BEGIN, END = "<!-- distillation table: begin -->", "<!-- distillation table: end -->"
EVALUATION_TOKENS = 32_768
Record = dict[str, Any]


SETTINGS = {"stories260K": Training(300, 8, 128, 2e-3), "pycode-6m": Training(150, 4, 128, 3e-4)}


@dataclass(frozen=True)
class Row:
    """One way to train the student."""

    name: str
    """Label in the table."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What `DistillOptions` gets beside steps, batch and rate."""
    peer_beta: float | None = None
    """The `beta` of TRL's GKD: the row is the peer's."""
    models: tuple[str, ...] = tuple(SETTINGS)


def _row(*losses: str, **options: Any) -> Mapping[str, Any]:
    return {"losses": losses, **options}


ROWS = (
    Row("label_cross_entropy", _row("label_cross_entropy")),
    Row("forward_kl (default)", _row("forward_kl")),
    Row("TRL GKD, beta 0.5 (its default)", peer_beta=0.5),
    Row("0.9 forward_kl + 0.1 label_cross_entropy", _row("forward_kl=0.9", "label_cross_entropy=0.1")),
    Row("jsd", _row("jsd")),
    Row("top1_blend=0.9", _row("top1_blend=0.9")),
    Row("skew_kl", _row("skew_kl")),
    Row("taid", _row("taid")),
    Row("reverse_kl", _row("reverse_kl")),
    Row("TRL GKD, beta 0 (forward KL)", peer_beta=0.0),
    Row("0.5 forward_kl + 0.5 label_cross_entropy", _row("forward_kl=0.5", "label_cross_entropy=0.5")),
    Row("jsd, on_policy 0.25", _row("jsd", on_policy=distill.OnPolicyOptions(share=0.25)), models=("stories260K",)),
)


class Bench:
    """One model with its student and its texts."""

    def __init__(self, name: str) -> None:
        self.real, self.setting = RealModel(name), SETTINGS[name]
        self.teacher = self.real.bundle

    @cached_property
    def meter(self) -> Any:
        """Return the meter; the full model is the reference of the KL."""
        return self.real.meter(EVALUATION_TOKENS)

    @cached_property
    def student(self) -> ModelBundle:
        """Return the pruned model."""
        return prune.run(self.teacher, prune.PruneOptions(ffn_keep=0.5), self.real.calibration())[0]

    @cached_property
    def tokens(self) -> TokenSet:
        """Return the training windows."""
        setting = self.setting
        train = tuple(self.real.text.place(place) for place in self.real.text.train)
        wanted = (setting.windows + setting.batch) * (setting.context + 1)
        options = DataOptions(train=train, context=setting.context, train_tokens=wanted)
        return training_set(options, self.teacher.tokenizer, self.teacher.anatomy.context)

    def options(self, row: Row) -> DistillOptions:
        """Return how a row trains."""
        return self.setting.options(**row.options)

    def trained(self, row: Row, peer: str | None) -> ModelBundle:
        """Return the student after a row's training."""
        if row.peer_beta is not None:
            return self._peer_trained(row, peer)
        return distill.run(self.student, self.options(row), teacher=self.teacher, train=self.tokens)[0]

    def _peer_trained(self, row: Row, peer: str | None) -> ModelBundle:
        if peer is None:
            raise SystemExit("give --peer, the Python of an environment with TRL.")
        options, ids = self.options(row), self.tokens.ids
        steps = range(self.setting.steps)
        windows = [windows_of_step(len(ids), options.batch_size, options.seed, step) for step in steps]
        schedule = schedule_of(options.schedule, options.warmup_share, options.decay_share, options.final_share)
        rates = [options.learning_rate * schedule.scale(step, len(steps)) for step in steps]
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            self.student.save(place / "student")
            run = {"ids": ids[torch.cat(windows)].contiguous(), "rates": torch.tensor(rates, dtype=torch.float64)}
            save_file(run, place / "run")
            command = [peer, str(PEER), "--student", str(place / "student"),
                       "--teacher", str(model_folder(self.real.name)), "--run", str(place / "run"),
                       "--output", str(place / "trained"), "--batch", str(options.batch_size),
                       "--beta", str(row.peer_beta)]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment.pop("PYTHONPATH", None)
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            weights = load_file(place / "trained")
        return self._with_weights(weights)

    def _with_weights(self, weights: Mapping[str, torch.Tensor]) -> ModelBundle:
        model = copy.deepcopy(self.student.model)
        own = dict(model.named_parameters())
        if set(own) != set(weights):
            raise SystemExit(f"the peer's weights have other names: {sorted(set(own) ^ set(weights))[:3]}")
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)
        return replace(self.student, model=model).stored_dtype_rounded()


def run(path: Path, models: list[str], peer: str | None) -> None:
    """Do the rows that are missing."""
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    for model in models:
        if not model_folder(model).is_dir():
            print(f"{model}: skipped, there is no {model_folder(model)}; set DWINDLE_ASSETS to a folder with models/.")
            continue
        bench = Bench(model)
        chosen = [row for row in ROWS if model in row.models and (peer or row.peer_beta is None)]
        for row in [Row("teacher"), Row("pruned, not trained"), *chosen]:
            if any((record["model"], record["row"]) == (model, row.name) for record in records):
                continue
            begun = sum(os.times()[:4])
            untrained = {"teacher": bench.teacher, "pruned, not trained": bench.student}.get(row.name)
            bundle = untrained or bench.trained(row, peer)
            seconds = sum(os.times()[:4]) - begun
            found = bench.meter.measure(bundle)
            records.append({
                "model": model, "row": row.name, "nats_per_token": found.nats_per_token,
                "kl": found.kl_nats_per_token, "agreement": found.top1_agreement, "parameters": found.parameters,
                "cpu_seconds": None if untrained else seconds, "setting": vars(bench.setting),
            })  # fmt: skip
            write_json(path, records)
            print(f"{model}, {row.name}: {found.nats_per_token:.4f} nats, KL {found.kl_nats_per_token:.4f}, "
                  f"{seconds:.0f} CPU s", flush=True)  # fmt: skip


def markdown(records: list[Record]) -> str:
    """Return a table per model, the best trained row first."""
    tables = []
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        fixed = [record for record in own if record["cpu_seconds"] is None]
        trained = sorted((r for r in own if r["cpu_seconds"] is not None), key=lambda r: r["nats_per_token"])
        how = own[0]["setting"]
        lines = [f"**{model}**, half of its FFN, {how['steps']} steps of {how['batch']} x {how['context']} tokens, "
                 f"rate {how['learning_rate']:g}", "",
                 "| trained with | nats/token | KL | agreement |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {r['row']} | {r['nats_per_token']:.4f} | {r['kl']:.4f} | {r['agreement']:.4f} |"
                  for r in [*fixed, *trained]]  # fmt: skip
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def written_into(page: str, records: list[Record]) -> str:
    """Return the page with the tables between its marks.

    >>> written_into(f"a\\n{BEGIN}\\nold\\n{END}\\nb", []).splitlines() == ["a", BEGIN, "", END, "b"]
    True
    """
    return between(page, BEGIN, END, markdown(records))


def main() -> None:
    """Run, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=list(SETTINGS), help="Only this model; repeat for more.")
    parser.add_argument("--peer", help="Python of an environment with TRL; without it dwindle's rows alone.")
    parser.add_argument("--write", type=Path, help="Put the tables between the marks of this page and do nothing.")
    asked = parser.parse_args()
    if not asked.write:
        torch.set_num_threads(1)
        run(asked.results, asked.model or list(SETTINGS), asked.peer)
    records = json.loads(asked.results.read_text())
    if asked.write:
        write_text(asked.write, written_into(asked.write.read_text(), records))
    else:
        sys.stdout.write(markdown(records) + "\n")


if __name__ == "__main__":
    main()
