"""Fuzz every reader of foreign bytes: `python tests/reliability/fuzz.py --cases 1000000`.

Two engines over the same targets: `mutations` (structure-aware, any case is found again by target and number) and, with
`--atheris RUNS`, Google's coverage-guided one, each target in a process of its own. Cases are divided among the targets
by what they cost. Prints one line per target with its counts, and each finding with how to see it again; exit code 1
if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_targets import Finding, Target, Watch, classify, targets
from mutations import mutate
from valid_files import make

_MEMORY_BYTES = 12 << 30


def case_of(target: Target, number: int) -> bytes:
    """Return the bytes of case `number` of a target: a pure function of the two."""
    rng = random.Random(f"{target.name}:{number}")  # a string seed is hashed the same way in every process
    return mutate(rng.choice(target.seeds), target.form, rng)


def share(chosen: list[Target], cases: int) -> dict[str, int]:
    """Divide cases so that a target gets as many as what it costs allows."""
    weights = {target.name: target.cost**-1.2 for target in chosen}
    return {name: max(20, round(cases * weight / sum(weights.values()))) for name, weight in weights.items()}


def fuzz(target: Target, cases: int, watch: Watch, first: int = 0) -> tuple[Counter[str], dict[str, tuple[int, str]]]:
    """Run cases of one target; return the count of each outcome, and each kind of finding with its first case."""
    counts: Counter[str] = Counter()
    found: dict[str, tuple[int, str]] = {}
    for number in range(first, first + cases):
        try:
            counts[classify(target, case_of(target, number), watch)] += 1
        except Finding as error:
            counts["finding"] += 1
            where = traceback.extract_tb(error.__cause__.__traceback__)[-1] if error.__cause__ else None
            place = f"{Path(where.filename).name}:{where.lineno}" if where else ""
            found.setdefault(f"{str(error)[:60]} {place}", (number, f"{error} {place}"))
    return counts, found


def _guided(target: Target, runs: int, watch: Watch) -> None:
    """Run atheris on one target; ends the process."""
    import atheris

    def one(data: bytes) -> None:
        classify(target, data, watch, 30.0)

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], corpus, f"-runs={runs}", "-max_len=20000", "-timeout=60", "-verbosity=0",
                       "-print_final_stats=1", "-rss_limit_mb=12000"], one)  # fmt: skip
        atheris.Fuzz()


def main() -> int:
    """Fuzz what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="cases of the structure-aware engine, all targets")
    parser.add_argument("--atheris", type=int, default=0, help="runs of atheris per target")
    parser.add_argument("--target", action="append", help="only these targets")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--guided", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help="folder of the valid files (kept for the next time)")
    parser.add_argument("--json", type=Path, help="write the counts here")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    if given.guided:
        import atheris

        with atheris.instrument_imports(include=["dwindle"]):
            from dwindle.pipeline import recipe  # noqa: F401
    scratch = Path(tempfile.mkdtemp(prefix="dwindle-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    import logging

    logging.getLogger("dwindle").setLevel(logging.CRITICAL)
    workshop = make(given.files or scratch / "files")
    known = targets(workshop, scratch)
    watch = Watch(scratch)
    if given.guided:
        _guided(known[given.guided], given.atheris, watch)
    unknown = [name for name in given.target or () if name not in known]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; known: {', '.join(known)}")
    chosen = [target for name, target in known.items() if not given.target or name in given.target]
    total: Counter[str] = Counter()
    table: dict[str, dict[str, object]] = {}
    for target in sorted(chosen, key=lambda one: one.cost):
        cases, began = share(chosen, given.cases)[target.name] if given.cases else 0, time.perf_counter()
        counts, found = fuzz(target, cases, watch, given.first)
        seconds = time.perf_counter() - began
        total.update(counts)
        table[target.name] = {**counts, "seconds": round(seconds, 1)}
        print(f"{target.name:32} {cases:8,} cases {seconds:7.1f} s  {dict(counts)}", flush=True)
        for number, told in found.values():
            print(f"  FINDING case {number}: {told}", flush=True)
        if given.atheris:
            total.update(_atheris(target, given, workshop))
    print(f"all: {sum(total.values()):,} cases, {dict(total)}")
    if given.json:
        given.json.write_text(json.dumps({"targets": table, "all": dict(total)}, indent=2) + "\n")
    return 1 if total["finding"] else 0


def _atheris(target: Target, given: argparse.Namespace, workshop: Path) -> Counter[str]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--guided", target.name, "--atheris", str(given.atheris), "--files",
         str(workshop)], capture_output=True, text=True, check=False,
    )  # fmt: skip
    stat = next((line for line in done.stderr.splitlines() if "number_of_executed_units" in line), "units: 0")
    units = int(stat.rpartition(":")[2])
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if "Finding" in line or "Exception" in line][-1:]
        print(f"  FINDING atheris on {target.name} after {units:,}: {told or done.stderr[-2000:]}", flush=True)
    else:
        print(f"  atheris: {units:,} cases", flush=True)
    return Counter({"atheris": units, "finding": int(done.returncode != 0)})


if __name__ == "__main__":
    sys.exit(main())
