"""Run the recipe of a finished run once more, elsewhere, and compare: every step's model, every artifact, every number.

What is compared is what a rerun can repeat: hashes of the inputs, of what each step stored and of each artifact, and
all numbers of report.json but times, memory and what was measured on this host's clock. Where something differs, the
versions, the machine and the code that differ are listed beside it: they are the first place to look.

On one machine, with the versions, the number of threads and the seed of the report, a CPU run repeats to the bit.
Paths in a recipe are as they were written: run this from the folder that `dwindle run` was run from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import DataError, OutputError
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.write_reports import read_report
from dwindle.report import Report
from dwindle.storage import hash_folder

__all__ = ["Reproduction", "differences", "reproduce"]

_OF_THE_CLOCK = ("seconds", "peak_rss_bytes", "export_seconds", "parity_seconds", "tokens_per_second")


@dataclass(frozen=True)
class Reproduction:
    """What came out of running a run again."""

    run: str
    again: str
    compared: int
    """Hashes and numbers that were held against each other."""
    differing: tuple[str, ...]
    """One line each: what differs, before and after."""
    surroundings: tuple[str, ...]
    """Versions, machine and code that are not as they were."""

    @property
    def equal(self) -> bool:
        """Return whether everything is the same."""
        return not self.differing

    def to_json(self) -> dict[str, Any]:
        """Return the object for `--json`."""
        return {**asdict(self), "equal": self.equal}

    def text(self) -> str:
        """Return the result for a person."""
        around = [f"  {line}" for line in self.surroundings]
        if self.equal:
            told = [f"{self.run}: reproduced. {self.compared} hashes and numbers are the same."]
            return "\n".join(told + (["Although these differ:", *around] if around else []))
        lines = [f"{self.run}: {len(self.differing)} of {self.compared} hashes and numbers differ:"]
        lines += [f"  {line}" for line in self.differing]
        return "\n".join(lines + (["These differ too, and may be why:", *around] if around else []))


def reproduce(run: Path, again: Path, *, notify: Callable[[str], None] | None = None) -> Reproduction:
    """Run `run`'s recipe into the folder `again` and return what differs.

    Raises DataError if `run` is no finished run, OutputError if `again` holds something already.
    """
    from dwindle.pipeline.runner import run as run_recipe

    before = read_report(run)
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise DataError(f"{run} holds no recipe.yaml: it is no run folder.")
    if again.exists() and (not again.is_dir() or any(again.iterdir())):
        raise OutputError(
            f"{again} is not empty. Name a fresh folder: what is there would be taken over, not made again."
        )
    device = str(before.environment.get("torch_device") or "cpu")
    after = run_recipe(Recipe.load(recipe), again, torch_device=device, notify=notify)
    found, differing = differences(before, after, run, again)
    surroundings = tuple(_differing_values(before.environment, after.environment))
    return Reproduction(str(run), str(again), found, tuple(differing), surroundings)


def differences(before: Report, after: Report, run: Path, again: Path) -> tuple[int, list[str]]:
    """Return how many things were compared, and a line for each that differs."""
    pairs = [
        ("inputs", _flat(before.inputs), _flat(after.inputs)),
        ("models", _models(run), _models(again)),
        ("artifacts", {a.path: a.sha256 for a in before.artifacts}, {a.path: a.sha256 for a in after.artifacts}),
        ("steps", _steps(before), _steps(after)),
        ("parity", _parities(before), _parities(after)),
        ("targets", _targets(before), _targets(after)),
    ]  # fmt: skip
    count, lines = 0, []
    for what, ours, theirs in pairs:
        count += len(ours.keys() | theirs.keys())
        lines += [f"{what}: {line}" for line in _differing_values(ours, theirs)]
    return count, lines


def _models(folder: Path) -> dict[str, str]:
    """Return the hash of every model and adapter that a step stored."""
    places = sorted(p for p in folder.glob("steps/*/*") if p.is_dir())
    return {p.relative_to(folder / "steps").as_posix(): hash_folder(p) for p in places}


def _steps(report: Report) -> dict[str, Any]:
    return _numbers([_plain(asdict(step)) for step in report.steps])


def _parities(report: Report) -> dict[str, Any]:
    return _numbers({artifact.path: asdict(artifact)["parity"] for artifact in report.artifacts})


def _targets(report: Report) -> dict[str, Any]:
    """Return what was estimated for targets: the same inputs give the same numbers. Measurements do not repeat."""
    return {
        f"{target.profile} {target.artifact or target.variant} {metric.name}": metric.value
        for target in report.targets
        for metric in target.metrics
        if metric.basis != "measured" and target.profile != "host"
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k not in _OF_THE_CLOCK}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> dict[str, Any]:
    return _flat(json.loads(json.dumps(value, default=str)))


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Return every leaf of nested mappings and lists by its dotted place.

    >>> _flat({"a": {"b": [1, 2]}})
    {'a.b.0': 1, 'a.b.1': 2}
    """
    if isinstance(value, Mapping):
        inner = [_flat(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        inner = [_flat(v, f"{where}.{i}" if where else str(i)) for i, v in enumerate(value)]
    else:
        return {where: value}
    return {k: v for one in inner for k, v in one.items()}


def _differing_values(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    flat = _flat(dict(ours)), _flat(dict(theirs))
    for name in sorted(flat[0].keys() | flat[1].keys()):
        before, after = flat[0].get(name), flat[1].get(name)
        if before != after:
            yield f"{name} was {_short(before)}, is {_short(after)}"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)[:100]
