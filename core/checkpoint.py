"""Training checkpoints: sharded, atomic, hashed, and bound to the run that wrote them.

Layout: `FOLDER/checkpoints/step-00000200/` holds the files of `torch.distributed.checkpoint` (every process writes
its own shards) and `checkpoint.json`: the step, the fingerprint of the run, the progress (losses so far), and the
sha256 of every file and of its own content. The folder appears under its name only when it is whole.

What is stored: trainable parameters, persistent buffers, and the optimizer's two moments and step per parameter.
Frozen parameters and uint8 buffers (packed codes) are not: they are what the run started from, and the fingerprint
holds their checksum. Tensors are handed to `torch.distributed.checkpoint` by name and loaded in place, so neither
saving nor loading makes a full copy, and a checkpoint written by two processes loads in one.
`torch.distributed.checkpoint.state_dict.get_state_dict` is not used: it writes frozen weights too.

`torch.distributed.checkpoint` keeps its index as a pickle, which `checkpoint_reader` opens without running anything. A
checkpoint is a run's private state, not a model to pass on; models are stored as safetensors by `core.bundle`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from dwindle.checkpoint_reader import TensorReader
from dwindle.errors import DwindleError, RecipeError, UnsupportedModel
from dwindle.sharding import Processes
from dwindle.storage import atomic_folder, hash_file, hash_json, read_json, write_json

__all__ = ["Checkpoint", "Checkpoints"]

_log = logging.getLogger("dwindle")
_INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    step: int
    progress: Mapping[str, Any]
    fingerprint: Mapping[str, Any]


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every tensor a checkpoint holds, by name; the tensors are the live ones."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, torch.Tensor] = {f"parameter/{name}": p.detach() for name, p in trainable.items()}
    for name, value in model.state_dict().items():
        if name not in parameter_names and isinstance(value, torch.Tensor) and value.dtype != torch.uint8:
            state[f"buffer/{name}"] = value
    for name, parameter in trainable.items():
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer/{key}/{name}"] = value
    return state


class Checkpoints:
    """The checkpoints of one run; keeps the newest `keep`."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], keep: int, processes: Processes) -> None:
        self.folder = folder / "checkpoints"
        self.fingerprint = dict(fingerprint)
        self.keep = keep
        self.processes = processes

    def save(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
    ) -> None:
        """Write the checkpoint of `step`, then remove the oldest beyond `keep`, and damaged ones of later steps."""
        place = self.folder / f"step-{step:08d}"
        with self._shared_folder(place) as partial:
            with self._quiet():
                save_sharded(
                    _state(model, optimizer),
                    storage_writer=FileSystemWriter(partial, single_file_per_rank=True),
                    no_dist=self.processes.world == 1,
                )
            if self.processes.first:
                files = {p.name: hash_file(p) for p in sorted(partial.iterdir())}
                index = {"step": step, "fingerprint": self.fingerprint, "progress": dict(progress), "files": files}
                index = json.loads(json.dumps(index, allow_nan=False))
                write_json(partial / _INDEX, {**index, "sha256": hash_json(index)})
        if self.processes.first:
            places = self._places()
            ahead = [p for p in places if p.name > place.name]
            for surplus in ahead + [p for p in places if p not in ahead][self.keep :]:
                shutil.rmtree(surplus, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None if there is none; damaged ones are named in the log.

        Raises RecipeError, naming what differs, if it was written by a run with other options or data.
        """
        found: Checkpoint | None = None
        if self.processes.first:
            places = self._places()
            found = next((c for c in map(self._read, places) if c is not None), None)
            if places and found is None:
                _log.warning("%s: no checkpoint is whole; training starts at step 1.", self.folder)
        found = self.processes.shared(found)
        if found is not None:
            self._require_same_run(found)
        return found

    def load(self, checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors of `checkpoint` into model and optimizer, in place."""
        try:
            with self._quiet():
                load_sharded(
                    _state(model, optimizer),
                    storage_reader=TensorReader(checkpoint.path),
                    no_dist=self.processes.world == 1,
                )
        except Exception as error:  # what torch makes of a checkpoint whose files are whole but wrong
            raise UnsupportedModel(
                f"{checkpoint.path}: this checkpoint cannot be loaded ({error}). Delete its folder; training then goes "
                "on from the one before."
            ) from error

    @staticmethod
    @contextlib.contextmanager
    def _quiet() -> Iterator[None]:
        """Keep torch from warning that a single process is a single process, and its errors ordinary ones.

        `CheckpointException` is no `Exception`, so that nothing above would clean up after it.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                yield
            except CheckpointException as error:
                first = next(iter(error.failures.values()))[0]
                if not isinstance(first, Exception) or isinstance(first, DwindleError):
                    raise first from None  # Ctrl-C, SIGTERM or --max-memory in the middle of it
                raise RuntimeError(str(first)) from first

    def _places(self) -> list[Path]:
        """Return the checkpoint folders, newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.is_dir()), reverse=True)

    @contextlib.contextmanager
    def _shared_folder(self, place: Path) -> Iterator[Path]:
        """Yield one folder to all processes; the first one makes it, and moves it into place when all are done."""
        with contextlib.ExitStack() as stack:
            made = stack.enter_context(atomic_folder(place)) if self.processes.first else None
            partial = self.processes.shared(made)
            if partial is None:
                raise RuntimeError("the first process made no checkpoint folder")
            yield partial
            self.processes.wait()

    def _read(self, place: Path) -> Checkpoint | None:
        """Return the checkpoint at `place`, or None, with a warning that names the damage."""
        try:
            index = dict(read_json(place / _INDEX))
            if index.pop("sha256") != hash_json(index):
                raise ValueError("its content is not what was written")
            damaged = [
                name
                for name, sha256 in index["files"].items()
                if not (place / name).is_file() or hash_file(place / name) != sha256
            ]
            checkpoint = Checkpoint(place, index["step"], index["progress"], index["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged, checkpoint = [f"{_INDEX} ({error})"], None
        if damaged:
            _log.warning("%s: this checkpoint is damaged and passed over: %s.", place, ", ".join(damaged))
            return None
        return checkpoint

    def _require_same_run(self, found: Checkpoint) -> None:
        """Compare fingerprints; a key that one side does not know came with another version and cannot be compared."""
        ours = json.loads(json.dumps(self.fingerprint))
        differing = [
            f"{name} (checkpoint {found.fingerprint[name]!r}, now {ours[name]!r})"
            for name in sorted(found.fingerprint.keys() & ours.keys())
            if found.fingerprint[name] != ours[name]
        ]
        if differing:
            raise RecipeError(
                f"train: {found.path} was written by another run: {', '.join(differing)}. "
                "Use the same options and data to go on, or another folder to start anew."
            )
