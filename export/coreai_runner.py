"""An exported Core AI asset as a DecodeRunner, executed by Apple's own runtime.

The runtime is part of coreai-core and runs on Linux too, as an interpreter on the CPU: what is checked is the saved
asset and Apple's reading of it, not the Neural Engine's or a GPU's rounding and speed. A float16 asset is computed in
float32 there, for the reason that `coreai_float32.py` gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dwindle.errors import ExportFailed, OutputError, RecipeError, UnsupportedModel, offenders
from dwindle.export.adapter_shelf import AdapterShelf
from dwindle.export.coreai_adapters import INPUTS_FILE, LEAST_RANK, base_arrays
from dwindle.export.coreai_asset import ASSET, PROGRAM, PROGRAM_HASH, STATES, quiet_coreai
from dwindle.export.coreai_float32 import widened
from dwindle.storage import hash_file

__all__ = ["CoreAIRunner"]


class CoreAIRunner:
    """Runs `prefill` and `decode` of an asset; the KV cache is two arrays that the runtime writes in place."""

    def __init__(self, folder: Path, *, as_saved: bool = False) -> None:
        """Open `model.aimodel` in an artifact folder. Raises OutputError if it is none of ours.

        `as_saved` computes a float16 asset in float16, as the interpreter understands it.
        """
        with quiet_coreai():
            described = _described(folder / ASSET)
            compute = described["dwindle.compute"]
            widen = compute == "float16" and not as_saved
            self._functions = _finished(_loaded(folder / ASSET, widen))
        self._facts: dict[str, Any] = json.loads(described["dwindle.adapters"])
        self._shelf: AdapterShelf[dict[str, Any]] = AdapterShelf(
            folder, described["dwindle.source_sha256"], self._facts.get("inputs", "none")
        )
        self.context = int(described["dwindle.context_length"])
        self.prefill_tokens = int(described["dwindle.prefill_tokens"])
        """Tokens that `prefill` takes; 0: any number from 2 on."""
        how = "its float16 computed as float32" if widen else compute
        self.executed_by = f"Core AI runtime (coreai-core on the CPU), {how}; no Neural Engine or GPU was used"
        self._shape = json.loads(described["dwindle.state_shape"])
        self._dtype = np.dtype("float32" if widen else compute)
        self._unchanged = self._arrays(base_arrays(self._facts)) if self._facts else {}
        self._adapter: dict[str, Any] = self._unchanged
        self.reset()

    @property
    def adapters(self) -> Sequence[str]:
        """Return the names of the adapters that were loaded."""
        return self._shelf.names

    def load_adapter(self, folder: Path) -> str:
        """Load a packaged adapter; return its name.

        Raises RecipeError or UnsupportedModel for one that does not belong to this asset, or is damaged.
        """
        path = self._shelf.file_of(folder, INPUTS_FILE)
        try:
            with safe_open(path, "pt") as held:
                base = (held.metadata() or {}).get("base_sha256")
                found = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UnsupportedModel(f"{path} cannot be read ({error}). Package the adapter again.") from error
        wanted = base_arrays(self._facts)
        free = None if self._facts["rank"] else LEAST_RANK
        strange = sorted(found.keys() ^ wanted.keys())
        strange += [name for name in found.keys() & wanted.keys() if not _alike(found[name], wanted[name], free)]
        if strange or base != self._shelf.base_sha256:
            raise UnsupportedModel(
                f"{path} was packaged for another export: {len(strange)} arrays are not what this asset takes "
                f"({offenders(strange, 6)}). Package the adapter for this one."
            )
        return self._shelf.add(folder.resolve().name, self._arrays(found))

    def activate(self, name: str | None) -> None:
        """Use an adapter that was loaded, or with None the base, from the next text on; the cache is emptied."""
        self._adapter = self._shelf.pick(name) or self._unchanged
        self.reset()

    def _arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        from coreai.runtime import NDArray

        return {name: NDArray(tensor.float().numpy().astype(self._dtype)) for name, tensor in tensors.items()}

    def reset(self) -> None:
        """Empty the cache."""
        from coreai.runtime import NDArray

        self._state = {name: NDArray(np.zeros(self._shape, self._dtype)) for name in STATES}
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens: later ones write over what is behind them."""
        self.length = length

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32. Static programs get them in pieces of their own length."""
        tokens = ids.shape[1]
        if self.length + tokens > self.context:
            raise RecipeError(f"the asset holds a context of {self.context:,} tokens; {self.length + tokens:,} were "
                              "fed. Export it with a larger context_length.")  # fmt: skip
        fed, pieces = ids.numpy().astype(np.int32), []
        while fed.shape[1]:
            size = self._piece(fed.shape[1])
            pieces.append(self._call(fed[:, :size]))
            fed = fed[:, size:]
        return torch.from_numpy(np.concatenate(pieces).astype(np.float32))

    def _piece(self, left: int) -> int:
        """Return how many of the tokens left are fed at once. One that `prefill` has no room to pad is decoded."""
        if not self.prefill_tokens:
            return left
        return min(left, self.prefill_tokens) if self.length + self.prefill_tokens <= self.context else 1

    def _call(self, ids: Any) -> Any:
        from coreai.runtime import NDArray

        tokens = ids.shape[1]
        name = "decode" if tokens == 1 else "prefill"
        end = self.length + tokens
        if self.prefill_tokens:
            padded = 1 if tokens == 1 else self.prefill_tokens
            ids = np.pad(ids, ((0, 0), (0, padded - tokens)))
            positions = np.arange(self.length, self.length + padded, dtype=np.int32)
        else:
            positions = np.arange(end, dtype=np.int32)
        inputs = {"input_ids": NDArray(ids), "position_ids": NDArray(positions[None]), **self._adapter}
        logits = _finished(self._functions[name](inputs, state=self._state))["logits"].numpy()
        self.length = end
        return logits[0, :tokens].copy()


async def _loaded(asset: Path, widen: bool) -> dict[str, Any]:
    """Return the asset's functions. They stay whole when the folder they were compiled into has gone."""
    from coreai.authoring import AIModelAsset

    saved = AIModelAsset.load(asset)
    with tempfile.TemporaryDirectory() as folder:
        if widen:
            saved = widened(saved.program).save_asset(Path(folder) / ASSET)
        async with saved.executable() as model:
            with _native_notices_dropped():
                return {name: model.load_function(name) for name in ("prefill", "decode")}


@contextlib.contextmanager
def _native_notices_dropped() -> Iterator[None]:
    """Keep off the screen what the runtime writes past Python when it loads a function."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _alike(found: Tensor, wanted: Tensor, free: int | None) -> bool:
    """Return whether a shape is that of an input; sizes of `free` in what is wanted stand for any."""
    return found.dim() == wanted.dim() and all(
        size == needed or (needed == free and size >= needed)
        for size, needed in zip(found.shape, wanted.shape, strict=True)
    )


def _finished(work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns. It runs on a thread of its own, because the caller may be in an event loop.

    Raises ExportFailed for what the runtime raises; some faults of a program it meets by ending the process.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(asyncio.run, work).result()
    except Exception as error:
        raise ExportFailed(f"export: Core AI's runtime failed on the asset it was given: {error}") from error


def _described(asset: Path) -> dict[str, str]:
    """Return the asset's own metadata. Raises OutputError if it is not ours, or damaged: the runtime would just end."""
    from coreai.authoring import AIModelAsset

    try:
        described: Any = AIModelAsset.load(asset).metadata
        metadata = described.creator_defined_metadata
        found = {key: metadata[key] for key in ("dwindle.context_length", "dwindle.prefill_tokens", "dwindle.compute",
                                                "dwindle.state_shape", "dwindle.source_sha256",
                                                "dwindle.adapters")}  # fmt: skip
        whole = bytes.fromhex(hash_file(asset / PROGRAM)) == (asset / PROGRAM_HASH).read_bytes()
    except (RuntimeError, KeyError, OSError) as error:
        raise OutputError(
            f"{asset} is no Core AI asset written by dwindle ({error}). Export the model again."
        ) from error
    if not whole:
        raise OutputError(f"{asset}: {PROGRAM} is not what {PROGRAM_HASH} says. Export the model again.")
    return found
