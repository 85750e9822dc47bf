"""Print docs/licences.md: every distribution of requirements/full.txt with its version and licence, as installed.

The licence is what the distribution itself states: its SPDX expression, else its classifiers, else its licence field.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

PINS = Path(__file__).with_name("full.txt")
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|EUPL|CDDL|MPL|EPL)\b|GNU|Mozilla", re.IGNORECASE)


def licence_of(name: str) -> str:
    """Return the licence that an installed distribution states, on one line."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return str(expression)
    classified = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    if classified and classified != ["OSI Approved"]:
        return "; ".join(sorted(set(classified)))
    lines = str(about.get("License") or "").strip().splitlines()
    return lines[0][:80] if lines else "not stated"


def main() -> int:
    """Print the page; exit code 1 if a pinned distribution is not installed."""
    names = [line.partition("==")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    rows, gone = [], []
    for name in sorted({*names, "torch"}, key=str.lower):
        try:
            rows.append((name, metadata.version(name), licence_of(name).replace("|", "/")))
        except metadata.PackageNotFoundError:
            gone.append(name)
    print("# Licences of what dwindle is installed with\n")
    print(
        "Made by `python requirements/licences.py` from what each distribution states of itself. dwindle is Apache-2.0."
    )
    print("None of these is part of dwindle; `pip` installs them beside it.\n")
    print("| distribution | version | licence |\n|---|---|---|")
    for name, version, licence in rows:
        print(f"| {name} | {version} | {licence} |")
    with_terms = [f"{name} ({licence})" for name, _, licence in rows if COPYLEFT.search(licence)]
    unstated = [name for name, _, licence in rows if licence == "not stated"]
    print(f"\nWith terms on sharing changes: {', '.join(with_terms) or 'none'}.")
    print(f"Without a statement in their metadata: {', '.join(unstated) or 'none'}.")
    if gone:
        print(f"not installed: {', '.join(gone)}", file=sys.stderr)
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
