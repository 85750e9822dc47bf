"""`make bench`: each case is one job done by dwindle and by a peer, in turn, in fresh processes.

Prints, per case, the medians of wall seconds and peak resident memory, the quality both reached, and the ratio
peer / dwindle of each pair of runs. Absolute seconds mean little on a shared machine; the ratios of alternated runs
are what to quote.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = {
    "palettize-2048x2048-4bit-16rows": ("palettize.py", ["--rows", "2048", "--columns", "2048", "--bits", "4"]),
    "palettize-3072x8192-4bit-16rows": ("palettize.py", ["--rows", "3072", "--columns", "8192", "--bits", "4"]),
}


def once(python: str, script: str, who: str, arguments: list[str]) -> dict[str, float]:
    """Run one side of a case in a fresh process; it prints one JSON line last."""
    command = [python, "-P", str(HERE / script), "--who", who, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Run the chosen cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=sys.executable, help="Python of the environment that has the peers.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", action="append", choices=list(CASES), help="Only this case; repeat for more.")
    parser.add_argument("--json", type=Path, help="Also write all single results here.")
    options = parser.parse_args()
    everything = {}
    for name in options.case or CASES:
        script, arguments = CASES[name]
        pairs = [
            (once(sys.executable, script, "dwindle", arguments), once(options.peers, script, "peer", arguments))
            for _ in range(options.runs)
        ]
        everything[name] = pairs
        print(f"\n{name} ({options.runs} alternated runs)")
        for key in pairs[0][0]:
            ours, peer = (statistics.median(side[key] for side in sides) for sides in zip(*pairs, strict=True))
            ratios = sorted(p[key] / o[key] for o, p in pairs if o[key])
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "-"
            print(f"  {key:24} dwindle {ours:<12.6g} peer {peer:<12.6g} peer/dwindle {spread}")
    if options.json:
        options.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
