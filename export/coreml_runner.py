"""A saved Core ML decoder as a DecodeRunner: by dwindle's evaluator anywhere, by Core ML itself on a Mac.

    runner = open_package(Path("model.mlpackage"))     # or a folder, or one of a cut model's packages
    runner.context, runner.vocabulary, runner.executed_by
    logits = runner.step(ids)                          # ids [1, T], any T that still fits; logits [T, V]

Functions of fixed length are fed in pieces: as many prefills as fit, then single tokens. The packages of a cut model
are run one after another, the hidden state going from each to the next.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwindle.errors import RecipeError
from dwindle.export.adapter_shelf import AdapterShelf
from dwindle.export.coreml_adapters import ADAPTERS_KEY
from dwindle.export.coreml_files import read_specification
from dwindle.export.coreml_interface import PackageInterface, interface_of, packages_at
from dwindle.export.kv_cache import MASKED
from dwindle.export.mil_evaluator import MilProgram
from dwindle.export.mil_reader import read_functions

__all__ = ["CoreMLEvaluatorRunner", "CoreMLNativeRunner", "CoreMLRunner", "open_package"]

_MACOS = "darwin"


class CoreMLRunner(ABC):
    """What both runners share: pieces, masks, positions, and the way through the packages."""

    executed_by: str

    def __init__(self, path: Path) -> None:
        """Read a package or a folder. Raises OutputError, UnsupportedModel or MissingExtra."""
        self.packages = packages_at(path)
        about = dict(read_specification(self.packages[0]).description.metadata.userDefined)
        self._functions: dict[str, dict[str, str]] = json.loads(about.get(ADAPTERS_KEY, "{}"))
        of_adapters = {name for found in self._functions.values() for name in found.values()}
        self.interface: PackageInterface = interface_of(
            self.packages,
            [
                {name: body for name, body in read_functions(p).items() if name not in of_adapters}
                for p in self.packages
            ],
        )
        self._shelf: AdapterShelf[dict[str, str]] = AdapterShelf(
            path, about.get("dwindle.source_sha256", ""), "functions" if self._functions else "none"
        )
        self._adapter: dict[str, str] | None = None
        self.context, self.vocabulary = self.interface.context, self.interface.vocabulary
        self.length = 0

    @property
    def adapters(self) -> Sequence[str]:
        """Return the names of the adapters that were loaded."""
        return self._shelf.names

    def load_adapter(self, folder: Path) -> str:
        """Take up an adapter that is a function of the package; return its name.

        Raises RecipeError for one of another base, or that is no function of this package.
        """
        name = folder.resolve().name
        card = self._shelf.card_of(folder)
        if name not in self._functions:
            raise RecipeError(f"{folder}: {card.task!r} is no function of {self.packages[0]}, which has "
                              f"{', '.join(self._functions)}. Export the model again with --adapter.")  # fmt: skip
        return self._shelf.add(name, self._functions[name])

    def activate(self, name: str | None) -> None:
        """Use an adapter that was loaded, or with None the base, from the next text on; the cache is emptied."""
        self._adapter = self._shelf.pick(name)
        self.reset()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens: later ones write over what is behind them."""
        self.length = length

    def reset(self) -> None:
        """Empty the cache."""
        self._new_states()
        self.length = 0

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32. Raises RecipeError past the context."""
        tokens = ids.shape[1]
        if self.length + tokens > self.context:
            raise RecipeError(f"the package holds a context of {self.context:,} tokens; {self.length + tokens:,} were "
                              "fed. Export it with a larger context_length.")  # fmt: skip
        logits, begin = [], 0
        for function, length in self.interface.pieces(tokens):
            logits.append(self._through(function, ids[:, begin : begin + length].numpy().astype(np.int32)))
            begin += length
            self.length += length
        return torch.from_numpy(np.concatenate(logits))

    def _through(self, function: str, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the logits [T, V] of one piece."""
        x: NDArray[Any] = ids
        tokens = ids.shape[1]
        mask = _mask(tokens, self.length, self.context if self.interface.fixed_slots else self.length + tokens)
        for index, feeds in enumerate(self.interface.feeds):
            feed = feeds[function]
            inputs = {feed.first: x}
            if feed.mask is not None:
                inputs[feed.mask] = mask
            if feed.position is not None:
                inputs[feed.position] = np.array([self.length], np.int32)
            x = np.asarray(self._computed(index, (self._adapter or {}).get(function, function), inputs)[feed.output])
        return np.ascontiguousarray(x[0], np.float32)

    @abstractmethod
    def _new_states(self) -> None:
        """Make the states of all packages anew."""

    @abstractmethod
    def _computed(self, index: int, function: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        """Return what a function of a package gives for these inputs."""


class CoreMLEvaluatorRunner(CoreMLRunner):
    """Computes the saved packages in numpy, float32. Says nothing about a device's rounding or speed."""

    executed_by = "dwindle MIL evaluator (numpy, float32) of the saved package; Core ML itself was not executed"

    def __init__(self, path: Path) -> None:
        """Read and unpack a package or a folder. Raises OutputError, UnsupportedModel or MissingExtra."""
        super().__init__(path)
        self.programs = [MilProgram.load_all(package) for package in self.packages]
        self.reset()

    @property
    def fp16_peak(self) -> float:
        """Return the largest |value| that fp16 had to hold so far; above 65,504 a device would have overflowed."""
        return max(program.fp16_peak for functions in self.programs for program in functions.values())

    def _new_states(self) -> None:
        self._states = [next(iter(functions.values())).new_state() for functions in self.programs]

    def _computed(self, index: int, function: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        return self.programs[index][function](inputs, self._states[index])


class CoreMLNativeRunner(CoreMLRunner):
    """Runs the packages in Core ML, fp16, on the compute units it picks. macOS 15 or newer.

    Only a test with the marker `macos` executes this class; on other systems it is never run.
    """

    executed_by = "Core ML"

    def __init__(self, path: Path) -> None:
        """Compile and load the packages. Raises RecipeError where there is no Core ML."""
        if sys.platform != _MACOS:
            raise RecipeError(f"Core ML runs on macOS, this is {sys.platform}. Use CoreMLEvaluatorRunner, which "
                              "computes the saved package itself.")  # fmt: skip
        super().__init__(path)
        import coremltools as ct

        self._models: list[dict[str, Any]] = [
            {name: ct.models.MLModel(str(package), function_name=name if len(names) > 1 else None) for name in names}
            for package in self.packages for names in [list(read_functions(package))]
        ]  # fmt: skip
        self.reset()

    def _new_states(self) -> None:
        # The functions of a package declare the same states, so one made by any of them serves all.
        self._states = [next(iter(functions.values())).make_state() for functions in self._models]

    def _computed(self, index: int, function: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        computed: Mapping[str, Any] = self._models[index][function].predict(dict(inputs), state=self._states[index])
        return computed


def open_package(path: Path) -> CoreMLRunner:
    """Return a runner over a package or a folder: Core ML itself on a Mac, dwindle's evaluator anywhere else."""
    return CoreMLNativeRunner(path) if sys.platform == _MACOS else CoreMLEvaluatorRunner(path)


def _mask(tokens: int, past: int, slots: int) -> NDArray[np.float16]:
    """Return causal_mask [1, 1, T, S]: 0 for slots up to a token's own, MASKED for those after it.

    >>> _mask(2, 1, 4)[0, 0].tolist()
    [[0.0, 0.0, -10000.0, -10000.0], [0.0, 0.0, 0.0, -10000.0]]
    """
    hidden = np.arange(slots)[None, :] > past + np.arange(tokens)[:, None]
    return np.where(hidden, np.float16(MASKED), np.float16(0))[None, None]
