"""The run folder: where everything of one run lives, who may write to it, and what can be taken over from before.

    OUT/recipe.yaml  report.json  report.html  run.jsonl  README.md
    OUT/steps/NN-name[-variant]/   record.json (with its key) and model/ (a Hugging Face folder)
    OUT/export/FORMAT/             artifacts
    OUT/.work/                     checkpoints of a training that is under way; gone when its step is done

A step's key hashes its name, its options, the content of everything it reads and the code it runs; an entry whose
key is equal is taken over. Two runs cannot write to one folder: an advisory lock is held while a run lasts, and the
operating system drops it when the process ends, so no stale lock can block.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import OutputError
from dwindle.storage import atomic_folder, write_json

__all__ = ["RunFolder"]

_LOG = logging.getLogger("dwindle")
_MARK = "recipe.yaml"


class RunFolder:
    """One run's folder. Use as a context manager: it is locked inside the block."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self, identity: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Hold the folder for one process; refuse one that holds something else or is in use.

        `identity` is what makes two runs the same run (teacher); other options may change between runs.
        """
        self._check(identity)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Choose another output.") from error
        try:
            _lock(handle, self.path)
            write_json(self.path / ".run.json", dict(identity))
            yield self
        finally:
            os.close(handle)

    def _check(self, identity: Mapping[str, Any]) -> None:
        if self.path.is_file():
            raise OutputError(f"{self.path} is a file; an output folder is needed.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / ".run.json").exists():
            if {p.name for p in self.path.iterdir()} <= {".lock", "data"}:
                return
            raise OutputError(f"{self.path} is not empty and holds no dwindle run. Choose another output folder.")
        found = json.loads((self.path / ".run.json").read_text(encoding="utf-8"))
        differing = [f"{k}: found {found.get(k)}, needed {v}" for k, v in identity.items() if found.get(k) != v]
        if differing:
            raise OutputError(f"{self.path} holds another run ({'; '.join(differing)}). Choose another output folder.")

    def step_folder(self, index: int, name: str, variant: str | None) -> Path:
        """Return steps/NN-name[-variant]."""
        return self.path / "steps" / (f"{index:02d}-{name}" + (f"-{variant}" if variant else ""))

    def work_folder(self, key: str) -> Path:
        """Return the place for checkpoints of the step with this key."""
        return self.path / ".work" / key[:16]

    def cached(self, folder: Path, key: str) -> dict[str, Any] | None:
        """Return the stored entry of a step if it was made under the same key, else None."""
        try:
            entry: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return entry if entry.get("key") == key else None

    def store(self, folder: Path, key: str, fill: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """Let `fill` write into a folder beside `folder`, add record.json with the key, put it in place; return it."""
        with atomic_folder(folder) as partial:
            entry = {"key": key, **fill(partial)}
            (partial / "record.json").write_text(json.dumps(entry, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return entry

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to run.jsonl: what happened, when (seconds since the epoch), with what."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, allow_nan=False)
        with (self.path / "run.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks of this kind; say so rather than pretend
        _LOG.warning("%s is not locked on this system; do not start two runs on it", path)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(f"{path} is in use by another dwindle run. Wait for it or choose another output.") from error
