"""What curation and teacher-written text buy: students of one shape, trained on the same number of tokens.

    python benchmarks/data_pays.py --results data_pays.json
    python benchmarks/data_pays.py --results data_pays.json --write docs/data.md

The student is the model with half of its FFN units (pycode-6m: a tenth, because half of them is as good as all), the
full model its teacher, forward KL the loss. Raw text is real text with near-duplicates, boilerplate and noise planted
in it (`dirty_text`); curated is what the stages leave of it; each row that leaves one out shows its share.
Teacher-written text (kind `continue`, from a tenth of the real text) is mixed with real text by shares of 0, 1/3 and 1,
where real text is ample and where there is only that tenth, gone through again. Everything is measured on clean text
that nothing was trained on. A row is written when it is measured and not done twice; `--minutes` stops before another
begins.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dirty_text import planted
from marked_page import between
from protocol import RealModel, Training, model_folder

from dwindle import distill, prune
from dwindle.bundle import ModelBundle
from dwindle.data.curation.code_quality import CodeQuality
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.keep_range import KeepRange
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.quality import Quality
from dwindle.data.curation.rebalance import Rebalance
from dwindle.data.curation.repetition import Repetition
from dwindle.data.curation.stage import Stage, run_chain
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.curation.teacher_score import TeacherScore
from dwindle.data.document import Document
from dwindle.data.packing import pack
from dwindle.data.sources import read_documents
from dwindle.data.synthesis import SynthesisOptions
from dwindle.data.synthesis.step import synthesized
from dwindle.storage import write_json, write_text
from dwindle.token_set import TokenSet

BEGIN, END = "<!-- data table: begin -->", "<!-- data table: end -->"
EVALUATION_TOKENS = 16_384
STAGES = ("duplicates", "rules", "teacher_score")
Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A model's students: how they are cut and trained, and on how much real text."""

    training: Training
    ffn_keep: float
    """Share of the FFN units that are left: so few that the student has something to learn."""
    real_bytes: int
    scores: KeepRange
    """Nats/token of the teacher that are kept: chosen from the scores of the raw text, between its humps."""
    code: bool = False


SETTINGS = {
    "stories260K": Setting(Training(200, 8, 128, 2e-3), 0.5, 700_000, KeepRange(0.8, 2.6)),
    "pycode-6m": Setting(Training(80, 4, 128, 1e-3), 0.1, 240_000, KeepRange(1.0, 5.2), code=True),
}
ROWS = ("raw", "curated", *(f"curated without {stage}" for stage in STAGES), "real text, nothing planted",
        "1/3 teacher-written", "all teacher-written", "a tenth of the real text, repeated",
        "that tenth and 1/3 teacher-written")  # fmt: skip


class Bench:
    """One model, its student and its texts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.real_model, self.setting, self.folder = RealModel(name), SETTINGS[name], folder / name
        self.teacher = self.real_model.bundle
        self.windows = self.setting.training.windows

    @cached_property
    def meter(self) -> Any:
        """Return the meter on unseen clean text."""
        return self.real_model.meter(EVALUATION_TOKENS)

    @cached_property
    def student(self) -> ModelBundle:
        """Return the pruned model."""
        options = prune.PruneOptions(ffn_keep=self.setting.ffn_keep)
        return prune.run(self.teacher, options, self.real_model.calibration())[0]

    @cached_property
    def real(self) -> list[Document]:
        """Return the real text: whole stories, or stretches of source files."""
        found: list[Document] = []
        how, left = ({"kind": "code"} if self.setting.code else {}), self.setting.real_bytes
        for place in self.real_model.text.train:
            for part in read_documents(self.real_model.text.place(place), "text"):
                if left > 0:
                    found.append(Document(part.text, "real", id=f"real#{len(found)}", how=how))
                    left -= part.bytes
        return found

    @cached_property
    def raw(self) -> list[Document]:
        """Return the real text among what is planted."""
        return planted(self.real, code=self.setting.code)

    def stages(self, left_out: str | None = None) -> list[Stage]:
        """Return the chain, without one of its parts."""
        rules: list[Stage] = [CodeQuality()] if self.setting.code else [Quality(), Repetition()]
        parts: dict[str, list[Stage]] = {
            "rules": rules,
            "duplicates": [ExactDuplicates(), NearDuplicates()],
            "teacher_score": [TeacherScore(str(model_folder(self.real_model.name)), loss=self.setting.scores)],
            "rebalance": [Rebalance()],
        }
        return [stage for name, part in parts.items() if name != left_out for stage in part]

    def curated(self, left_out: str | None = None) -> tuple[list[Document], dict[str, int]]:
        """Return what the stages leave, and how many documents each dropped."""
        with tempfile.TemporaryDirectory() as folder:
            kept, counts = run_chain(self.stages(left_out), iter(self.raw), folder=Path(folder))
            documents = list(kept)
        return documents, {count.name: count.documents_in - count.documents_out for count in counts}

    @cached_property
    def written(self) -> list[Document]:
        """Return enough text by the teacher, begun as a tenth of the real documents do."""
        tokens = self.windows * (self.setting.training.context + 1)
        options = SynthesisOptions(("continue",), pieces=round(1.25 * tokens / 250), piece_tokens=300, batch_size=64,
                                   most_share=1)  # fmt: skip
        count = StageCount("synthesize")
        return list(synthesized(self.teacher, options, self.tenth, folder=self.folder / "written", count=count))

    @property
    def tenth(self) -> list[Document]:
        """Return every tenth real document."""
        return self.real[::10]

    def packed(self, documents: Sequence[Document]) -> TokenSet:
        """Return all windows of documents, shuffled."""
        return pack(documents, self.teacher.tokenizer, role="train", context=self.setting.training.context, seed=0)

    def mixed(self, real: Sequence[Document], written_share: float) -> TokenSet:
        """Return the windows of the run: so many of the teacher's, the rest real ones, gone through again if few."""
        tokens = self.packed(real)
        news = round(written_share * self.windows)
        parts = []
        for source, count in ((tokens, self.windows - news), (self.packed(self.written) if news else tokens, news)):
            parts.append(source.ids[torch.arange(count) % len(source.ids)])
        return replace(tokens, ids=torch.cat(parts), sha256=f"{tokens.sha256}-{written_share:.3f}")

    def row(self, name: str) -> tuple[TokenSet, dict[str, Any]]:
        """Return the training windows of a row, and what to say of them."""
        if name == "raw":
            return self.packed(self.raw), {"sources": Counter(d.source for d in self.raw)}
        if name.startswith("curated"):
            documents, dropped = self.curated(name.partition(" without ")[2] or None)
            return self.packed(documents), {"sources": Counter(d.source for d in documents), "dropped": dropped}
        share = {"1/3 teacher-written": 1 / 3, "all teacher-written": 1.0,
                 "that tenth and 1/3 teacher-written": 1 / 3}.get(name, 0.0)  # fmt: skip
        real = self.tenth if "tenth" in name else self.real
        return self.mixed(real, share), {}

    def trained(self, tokens: TokenSet, seed: int) -> ModelBundle:
        """Return the student after training on windows."""
        options = self.setting.training.options(seed=seed)
        return distill.run(self.student, options, teacher=self.teacher, train=tokens)[0]


def run(path: Path, models: Sequence[str], seeds: Sequence[int], rows: Sequence[str], minutes: float) -> None:
    """Do the rows that are missing."""
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for model in models:
        if not model_folder(model).is_dir():
            print(f"{model}: skipped, there is no {model_folder(model)}; set DWINDLE_ASSETS to a folder with models/.")
            continue
        bench = Bench(model, path.with_suffix(""))
        for seed in seeds:
            for row in rows:
                if any((r["model"], r["row"], r["seed"]) == (model, row, seed) for r in records):
                    continue
                if time.monotonic() > end:
                    return
                begun = sum(os.times()[:4])
                tokens, told = bench.row(row)
                found = bench.meter.measure(bench.trained(tokens, seed))
                records.append({
                    "model": model, "row": row, "seed": seed, "nats_per_token": found.nats_per_token,
                    "kl": found.kl_nats_per_token, "windows": len(tokens.ids), "windows_trained": bench.windows,
                    "cpu_seconds": sum(os.times()[:4]) - begun, **told,
                })  # fmt: skip
                write_json(path, records)
                print(f"{model}, {row}, seed {seed}: {found.nats_per_token:.4f} nats, {len(tokens.ids)} windows, "
                      f"{records[-1]['cpu_seconds']:.0f} CPU s {told}", flush=True)  # fmt: skip


def markdown(records: Sequence[Record]) -> str:
    """Return a table per model: mean over seeds, and the lowest and highest where there are several."""
    tables = []
    for model in dict.fromkeys(record["model"] for record in records):
        setting = SETTINGS[model]
        lines = [
            f"**{model}**, {setting.ffn_keep:.0%} of its FFN, {told(setting.training)}",
            "",
            "| trained on | nats/token | lowest to highest | KL to the teacher | seeds |",
            "|---|---|---|---|---|",
        ]
        for row in ROWS:
            own = [record for record in records if (record["model"], record["row"]) == (model, row)]
            if own:
                nats, kl = ([record[key] for record in own] for key in ("nats_per_token", "kl"))
                spread = f"{min(nats):.4f} to {max(nats):.4f}" if len(own) > 1 else "-"
                numbers = f"{sum(nats) / len(nats):.4f} | {spread} | {sum(kl) / len(kl):.4f} | {len(own)}"
                lines.append(f"| {row} | {numbers} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def told(training: Training) -> str:
    """Return how students are trained, in words.

    >>> told(Training(80, 4, 128, 1e-3))
    '80 steps of 4 x 128 tokens at 0.001'
    """
    return f"{training.steps} steps of {training.batch} x {training.context} tokens at {training.learning_rate:g}"


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON file of the records; grows.")
    parser.add_argument("--model", action="append", choices=tuple(SETTINGS))
    parser.add_argument("--seed", type=int, action="append", help="Order of the windows; repeat for more.  [0 1 2]")
    parser.add_argument("--row", action="append", choices=ROWS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Begin no row after so long.")
    parser.add_argument("--write", type=Path, help="Only put the tables into this page, between its marks.")
    options = parser.parse_args()
    if options.write:
        body = markdown(json.loads(options.results.read_text()))
        write_text(options.write, between(options.write.read_text(), BEGIN, END, body))
        return
    run(options.results, options.model or tuple(SETTINGS), options.seed or (0, 1, 2), options.row or ROWS,
        options.minutes)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
