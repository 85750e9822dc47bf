"""Print line and branch coverage of each room from the .coverage file of a finished `coverage run --branch`.

Error paths are the `raise` statements: the share of them that was executed, and with `--missed` where the others are.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import coverage

ROOMS = ("data", "prune", "distill", "adapters", "quantize", "export", "devices", "pipeline", "starter")
LEAST_LINES = 90.0


def raises(path: Path) -> set[int]:
    """Return the first lines of a file's `raise` statements with an error of their own (a bare `raise` passes on)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None}


def main() -> int:
    """Print the table; exit code 1 if all lines together are covered by less than `LEAST_LINES` per cent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--missed", action="store_true", help="name the errors that no test raised")
    given = parser.parse_args()
    measured = coverage.Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(place), show_contexts=False)
        files = json.loads(place.read_text())["files"]
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 6)
    for name, entry in files.items():
        parts = Path(name).parts
        room = next((part for part in reversed(parts[:-1]) if part in ROOMS), "core")
        found, errors = entry["summary"], raises(Path(name))
        missed = errors & set(entry["missing_lines"])
        numbers = (found["covered_lines"], found["num_statements"], found["covered_branches"], found["num_branches"],
                   len(errors) - len(missed), len(errors))  # fmt: skip
        for owner in (room, "all"):
            sums[owner] = [a + b for a, b in zip(sums[owner], numbers, strict=True)]
        if given.missed:
            print(*(f"{name}:{line}" for line in sorted(missed)), sep="\n", end="\n" if missed else "")
    for room in ("core", *ROOMS, "all"):
        if sums[room][1]:
            shares = [100 * part / max(1, whole) for part, whole in zip(sums[room][::2], sums[room][1::2], strict=True)]
            print(f"{room:10} lines {shares[0]:5.1f} %  branches {shares[1]:5.1f} %  errors raised {shares[2]:5.1f} %")
    lines, statements, *_ = sums["all"]
    return 0 if statements and 100 * lines / statements >= LEAST_LINES else 1


if __name__ == "__main__":
    sys.exit(main())
