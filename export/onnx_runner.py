"""An exported ONNX decoder, executed by plain ONNX Runtime on the CPU with the KV cache kept here.

Adapters are swapped between texts in one session. Where buffers are bound they are bound as well; `run` is handed them
as ONNX Runtime's active adapters, which the runtime ignores beside a binding.

A graph of the fused form (see `onnx_attention`) reads and writes one buffer a tensor, bound as past and as present, so
a step copies nothing; the buffers double when a text outgrows them. A graph of the plain form returns a grown cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwindle.errors import ExportFailed, MissingExtra, OutputError, UnsupportedModel, offenders
from dwindle.export.adapter_shelf import AdapterShelf
from dwindle.export.onnx_adapters import ADAPTER_FILE, model_version, read_adapter_file

__all__ = ["OnnxRunner"]

_FIRST_SLOTS = 256
"""Tokens the shared buffers hold at first, where the context is not shorter."""
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class _Held:
    """An adapter in a session's memory."""

    values: Mapping[str, Any]
    """Inputs to bind."""
    options: Any
    """RunOptions in which it is active; None where buffers are bound."""
    active: Any
    """The runtime's object; the options hold no reference to it."""


class OnnxRunner:
    """A DecodeRunner over the `model.onnx` of an artifact folder."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """Open a session. `threads` None leaves the number to ONNX Runtime (one a physical core).

        Raises MissingExtra without onnxruntime, OutputError if the folder holds no model of ours, ExportFailed if the
        runtime does not take it; so does `step`.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtra("Running an ONNX model", "onnx") from error
        path = folder / "model.onnx"
        if not path.is_file():
            raise OutputError(f"{folder} holds no model.onnx. Give a folder that an ONNX export wrote.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # refusals are raised below, not printed
        options.intra_op_num_threads = threads or 0
        self._runtime: Any = onnxruntime
        self.executed_by = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
        with self._refusals(path):
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        written = self.session.get_modelmeta().custom_metadata_map
        if "dwindle.context_length" not in written:
            raise OutputError(f"{path} does not say its context length. Give a folder that an ONNX export wrote.")
        self._shelf: AdapterShelf[_Held] = AdapterShelf(
            folder, written.get("dwindle.source_sha256", ""), written.get("dwindle.adapter_inputs", "none")
        )
        self._adapter: _Held | None = None
        self.context = int(written["dwindle.context_length"])
        """Longest text the graph is meant for, in tokens."""
        inputs = {value.name: value for value in self.session.get_inputs()}
        self._shared = "position_ids" not in inputs
        self._empty = {name: np.zeros((1, value.shape[1], 0, value.shape[3]), _TYPES[value.type])
                       for name, value in inputs.items() if name.startswith("past_key_values.")}  # fmt: skip
        self.reset()

    @property
    def adapters(self) -> Sequence[str]:
        """Return the names of the adapters that were loaded."""
        return self._shelf.names

    def load_adapter(self, folder: Path) -> str:
        """Load a packaged adapter; return its name, which is that of the folder.

        Raises RecipeError or UnsupportedModel for one that does not belong to this model, or is damaged.
        """
        path = self._shelf.file_of(folder, ADAPTER_FILE)
        try:
            values, version = read_adapter_file(path)
            active = None if self._shared else self._runtime.LoraAdapter()  # a binding takes the arrays themselves
            if active is not None:
                active.Load(str(path))
        except Exception as error:  # whatever a damaged file makes the runtime stumble over
            raise UnsupportedModel(
                f"{path} cannot be read by ONNX Runtime ({error}). Package the adapter again."
            ) from error
        inputs = {value.name: value.shape for value in self.session.get_overridable_initializers()}
        strange = [name for name, value in values.items() if not _fits(value.shape(), inputs.get(name))]
        if strange or version != model_version(self._shelf.base_sha256):
            raise UnsupportedModel(
                f"{path} was packaged for another export: {len(strange)} of its {len(values)} arrays are no inputs of "
                f"this model ({offenders(strange, 6)}). Package the adapter for this one."
            )
        options = None if active is None else self._runtime.RunOptions()
        if options is not None:
            options.add_active_adapter(active)
        return self._shelf.add(folder.resolve().name, _Held(values, options, active))

    def activate(self, name: str | None) -> None:
        """Use an adapter that was loaded, or with None the base, from the next text on; the cache is emptied."""
        self._adapter = self._shelf.pick(name)
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._past: dict[str, Any] = dict(self._empty)
        self._buffers: dict[str, Any] = {}
        self._slots = self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not self._shared:
            self._past = {name: past[:, :, :length] for name, past in self._past.items()}
        self.length = length

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32."""
        past, self.length = self.length, self.length + ids.shape[1]
        feeds = {"input_ids": ids.numpy().astype(np.int64), "attention_mask": np.ones((1, self.length), np.int64)}
        if self._shared:
            return torch.from_numpy(self._bound(feeds, past)[0])
        feeds["position_ids"] = np.arange(past, self.length, dtype=np.int64)[None]
        with self._refusals("a step"):
            logits, *present = self.session.run(
                ["logits", *map(_present, self._empty)], {**feeds, **self._past},
                run_options=None if self._adapter is None else self._adapter.options,
            )  # fmt: skip
        self._past = dict(zip(self._empty, present, strict=True))
        return torch.from_numpy(logits[0])

    def _bound(self, feeds: dict[str, Any], past: int) -> Any:
        """Return logits [1, T, V] of a step over the shared buffers."""
        if self.length > self._slots:
            self._grow(past)
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_present(name), buffer)
        for name, value in self._adapter.values.items() if self._adapter else ():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        with self._refusals("a step"):
            self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    @contextmanager
    def _refusals(self, what: Path | str) -> Iterator[None]:
        """Turn what ONNX Runtime raises, which names the operator by its module, into ExportFailed."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime"):
                raise
            raise ExportFailed(f"{self.executed_by} refuses {what}: {error}") from error

    def _grow(self, past: int) -> None:
        """Make room for `length` tokens at least, keeping the first `past`."""
        wanted = max(self.length, 2 * self._slots, _FIRST_SLOTS)
        self._slots = max(self.length, min(wanted, self.context))
        for name, empty in self._empty.items():
            array = np.zeros((1, empty.shape[1], self._slots, empty.shape[3]), empty.dtype)
            if name in self._buffers:
                array[:, :, :past] = self._buffers[name].numpy()[:, :, :past]
            self._buffers[name] = self._runtime.OrtValue.ortvalue_from_numpy(array)


def _fits(shape: Sequence[int], declared: Sequence[int | str] | None) -> bool:
    """Return whether an array has the shape that an input declares, whose named sizes are free."""
    return (
        declared is not None
        and len(shape) == len(declared)
        and all(isinstance(size, str) or size == found for found, size in zip(shape, declared, strict=True))
    )


def _present(name: str) -> str:
    return "present" + name.removeprefix("past_key_values")
