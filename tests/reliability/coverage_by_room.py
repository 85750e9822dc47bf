"""Print line and branch coverage of each room from the .coverage file of a finished `coverage run --branch`."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import coverage

ROOMS = ("data", "prune", "distill", "adapters", "quantize", "export", "devices", "pipeline", "starter")
LEAST_LINES = 90.0


def main() -> int:
    """Print the table; exit code 1 if all lines together are covered by less than `LEAST_LINES` per cent."""
    measured = coverage.Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "coverage.json"
        measured.json_report(outfile=str(place), show_contexts=False)
        files = json.loads(place.read_text())["files"]
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for name, entry in files.items():
        parts = Path(name).parts
        room = next((part for part in reversed(parts[:-1]) if part in ROOMS), "core")
        found = entry["summary"]
        numbers = (found["covered_lines"], found["num_statements"], found["covered_branches"], found["num_branches"])
        for owner in (room, "all"):
            sums[owner] = [a + b for a, b in zip(sums[owner], numbers, strict=True)]
    table = io.StringIO()
    for room in ("core", *ROOMS, "all"):
        lines, statements, taken, branches = sums[room]
        if statements:
            table.write(
                f"{room:10} lines {100 * lines / statements:5.1f} %  branches {100 * taken / max(1, branches):5.1f} %\n"
            )
    print(table.getvalue(), end="")
    lines, statements, _, _ = sums["all"]
    return 0 if statements and 100 * lines / statements >= LEAST_LINES else 1


if __name__ == "__main__":
    sys.exit(main())
