"""The quality table: dwindle and the peers at 4, 3, 2 and mixed 3.5 bits, on one protocol, into one results file.

    python benchmarks/quality.py --results quality.json --peers .venv-peers/bin/python --peers .venv-peers-2/bin/python
    python benchmarks/quality.py --results quality.json --print            # the table of what is there
    python benchmarks/quality.py --results quality.json --write docs/quantization.md

`protocol` says what is measured on what, `quality_rows` which rows there are. Every side runs in a process of its own
and leaves its linears, as its format gives them back, in a safetensors file; this process alone measures. Each record
is written as soon as it is measured, so a run can be stopped and taken up again: what the results file has is not done
twice. A method that fails is a record with the reason, and a row of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol import MODELS, RealModel, model_folder
from quality_rows import DWINDLE, PEERS, DwindleRow, PeerRow
from quality_table import markdown, written_into
from safetensors.torch import load_file, save_file

from dwindle.storage import write_json, write_text

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]
_KEY = ("model", "peer", "method", "kind", "bits")


class Results:
    """The records of one results file, by model, peer, method, kind and bits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = json.loads(path.read_text()) if path.exists() else []

    def has(self, record: Record) -> bool:
        """Return True if a record of this key is there."""
        return any(all(r[k] == record[k] for k in _KEY) for r in self.records)

    def add(self, record: Record) -> None:
        """Put a record in the place of an older one of its key, and write the file."""
        self.records = [r for r in self.records if any(r[k] != record[k] for k in _KEY)] + [record]
        write_json(self.path, self.records)


class Measured:
    """One model with its meter and the windows that all sides get."""

    def __init__(self, name: str, folder: Path, tokens: int | None) -> None:
        self.real = RealModel(name)
        self.meter = self.real.meter(tokens)
        self.windows = folder / "windows.safetensors"
        save_file({"ids": self.real.calibration().ids.contiguous()}, self.windows)

    def quality(self, linears: Path) -> Record:
        """Return the quality of the linears in a file."""
        found = self.real.measure(self.meter, load_file(linears))
        return {
            "nats_per_token": found.nats_per_token,
            "kl": found.kl_nats_per_token,
            "agreement": found.top1_agreement,
            "evaluation_tokens": self.meter.evaluation.tokens,
        }


def _lines(command: list[str], log: Path) -> Iterator[Record]:
    """Run one side and yield the JSON records it prints; what else it says goes to the log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as side,
    ):
        assert side.stdout is not None
        for line in side.stdout:
            if line.startswith("{"):
                yield json.loads(line)


def run_dwindle(row: DwindleRow, model: str, measured: Measured, results: Results, folder: Path) -> None:
    """Do and record what is missing of one of dwindle's rows on one model."""
    for bits in row.bits:
        record: Record = {"model": model, "peer": "dwindle", "method": row.method, "kind": row.kind, "bits": bits,
                          "group": row.group, "uses_text": row.uses_text}  # fmt: skip
        if results.has(record):
            continue
        output, log = folder / "dwindle.safetensors", folder / "dwindle.log"
        options = row.options_for(bits, model)
        command = [sys.executable, str(HERE / "dwindle_job.py"), "--model", model]
        found = list(_lines([*command, "--options", json.dumps(options), "--output", str(output)], log))
        if found:
            record |= found[-1] | measured.quality(output)
        else:
            record["failed"] = log.read_text().strip().splitlines()[-1][:300]
        _add(results, record | {"options": options})


def run_peers(rows: list[PeerRow], model: str, measured: Measured, results: Results, folder: Path, python: str) -> None:
    """Do and record what is missing of the rows of one peer's script on one model, in one process."""
    wanted: dict[tuple[str, float], Record] = {}
    for row in rows:
        for bits in row.bits:
            record = {"model": model, "peer": row.peer, "method": row.method, "kind": row.kind, "bits": bits,
                      "group": row.group, "uses_text": row.uses_text}  # fmt: skip
            if not results.has(record):
                wanted[row.method, bits] = record
    if not wanted:
        return
    script, log = HERE / "peers" / rows[0].script, folder / f"{rows[0].script}.log"
    jobs = [f"{method}:{bits:g}" for method, bits in wanted]
    command = [python, str(script), "--model", str(model_folder(model)), "--windows", str(measured.windows)]
    for found in _lines([*command, "--output", str(folder), *jobs], log):
        record = wanted.pop((found["method"], found["bits"])) | found
        if "failed" not in found:
            linears = folder / f"{found['method']}:{found['bits']:g}.safetensors"
            record |= measured.quality(linears)
            linears.unlink()
        _add(results, record)
    for record in wanted.values():  # the process ended without a word on them
        _add(results, record | {"failed": log.read_text().strip().splitlines()[-1][:300]})


def _add(results: Results, record: Record) -> None:
    results.add(record)
    outcome = record.get("failed") or "{bits_per_weight:.3f} b/w, KL {kl:.4f}".format(**record)
    print("{model} {peer} {method} {bits:g}: ".format(**record) + outcome, flush=True)


def run(results: Results, models: list[str], sides: list[str], peers: list[str], tokens: int | None) -> None:
    """Do what is missing, model by model, dwindle first."""
    for model in models:
        if not model_folder(model).is_dir():
            print(f"{model}: skipped, there is no {model_folder(model)}; set DWINDLE_ASSETS to a folder with models/.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            measured = Measured(model, Path(folder), tokens)
            if "dwindle" in sides:
                for row in DWINDLE:
                    run_dwindle(row, model, measured, results, Path(folder))
            if "peers" in sides:
                for script in dict.fromkeys(row.script for row in PEERS):
                    rows = [row for row in PEERS if row.script == script]
                    if rows[0].environment <= len(peers):
                        python = peers[rows[0].environment - 1]
                        run_peers(rows, model, measured, results, Path(folder), python)
                    else:
                        print(f"{script}: skipped, it needs environment {rows[0].environment}; give --peers for each.")


def main() -> None:
    """Run, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="Only this model; repeat for more.")
    parser.add_argument("--side", action="append", choices=["dwindle", "peers"], help="Only this side.")
    parser.add_argument("--peers", action="append", default=[], help="Python of a peers' environment; in their order.")
    parser.add_argument("--tokens", type=int, help="Measure on the first so many tokens only.")
    parser.add_argument("--print", action="store_true", dest="only_print", help="Print the table and do nothing.")
    parser.add_argument("--write", type=Path, help="Put the table between the marks of this page and do nothing.")
    options = parser.parse_args()
    results = Results(options.results)
    if options.write:
        write_text(options.write, written_into(options.write.read_text(), results.records))
        return
    if not options.only_print:
        run(results, options.model or list(MODELS), options.side or ["dwindle", "peers"], options.peers, options.tokens)
    print(markdown(results.records))


if __name__ == "__main__":
    main()
