"""A saved Core ML package, executed on any system: its program read back from disk and computed in numpy.

Core ML itself runs on Apple's systems only. What can be checked elsewhere is what was written: the program with its
slices, masks, states and lengths, and the codes, tables and constants of weight.bin. `MilProgram` reads those, never
the converter's objects in memory, and computes them in float32: what the program declares as fp16 is widened, so the
result shows every error of the export and nothing of a device's rounding. `fp16_peak` is the largest number that an
fp16 value would have had to hold; above 65,504 it would have been infinite on a device.

Packed weights are unpacked once and kept (4 bytes a weight). States are arrays that the program updates; a write into
a state that nothing else sees is done in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwindle.errors import MissingExtra, OutputError, UnsupportedModel, offenders
from dwindle.export.coreml_files import MANIFEST_FILE, WEIGHTS_FILE, quiet_coremltools, read_specification
from dwindle.export.mil_operations import OPERATIONS, slices, widened

__all__ = ["FP16_LARGEST", "MilProgram"]

FP16_LARGEST = 65504.0
_READ, _WRITE, _UPDATE = "read_state", "coreml_update_state", "slice_update"
_STATEFUL = (_READ, _WRITE)
_VIEWS = ("expand_dims", "identity", "reshape", "slice_by_index", "split", "squeeze", "transpose")
"""Operations whose result numpy may leave in the memory of their input."""

Array = NDArray[Any]
State = dict[str, Array]


@dataclass(frozen=True)
class _Step:
    """One operation of the program, ready to be computed."""

    kind: str
    function: Callable[[Mapping[str, Any]], Any] | None
    inputs: Mapping[str, Any]
    """Name -> a `_Name`, a list of them, or a constant."""
    outputs: tuple[str, ...]
    fp16: bool
    """It makes new numbers, and declares them as fp16."""
    in_place: bool = False
    """A write into a state that may change the array itself."""
    frees: tuple[str, ...] = ()
    """Values that no later step needs."""


class _Name(str):
    """The name of a value that is computed in each run."""


@dataclass
class MilProgram:
    """One function of a package. `load` makes it; a call computes it."""

    steps: tuple[_Step, ...]
    outputs: tuple[tuple[str, Any], ...]
    """Name of each output and the value it is."""
    state_shapes: Mapping[str, tuple[int, ...]]
    operations: Counter[str]
    """How often each operation stands in the program."""
    constants: Mapping[str, Any] = field(repr=False)
    """Inputs of the packed weights as they were stored, by name of the weight: {name: {input: value}}."""
    fp16_peak: float = 0.0
    """Largest |value| of anything declared as fp16, over all calls (a masked score is about 1e4)."""

    @classmethod
    def load(cls, package: Path, function: str = "main") -> MilProgram:
        """Return a function of a saved .mlpackage.

        Raises OutputError if it is no readable mlprogram, UnsupportedModel naming every operation that has no
        meaning here, MissingExtra without coremltools.
        """
        body = _read(package, function)
        operations = Counter(str(op.op_type) for op in body.operations)
        unknown = sorted(set(operations) - set(OPERATIONS) - {"const", *_STATEFUL})
        if unknown:
            raise UnsupportedModel(f"{package}: {len(unknown)} operations cannot be evaluated: {offenders(unknown)}. "
                                   "Execute the package on a Mac instead.")  # fmt: skip
        return _compiled(body, operations)

    def new_state(self) -> State:
        """Return all states, zero."""
        return {name: np.zeros(shape, np.float32) for name, shape in self.state_shapes.items()}

    def __call__(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Return the outputs by name; `state` is updated."""
        values: dict[str, Any] = {name: widened(np.asarray(value)) for name, value in inputs.items()}
        state = self.new_state() if state is None else state
        for step in self.steps:
            results = self._result(step, {name: _resolved(v, values) for name, v in step.inputs.items()}, state)
            values.update(zip(step.outputs, results, strict=False))
            for name in step.frees:
                del values[name]
        return {name: _resolved(value, values) for name, value in self.outputs}

    def _result(self, step: _Step, inputs: Mapping[str, Any], state: State) -> tuple[Any, ...]:
        if step.kind == _READ:
            return (state[step.inputs["state"]],)
        if step.kind == _WRITE:
            state[step.inputs["state"]] = inputs["value"]
            return (inputs["value"],)
        if step.in_place:
            inputs["x"][slices(inputs["x"].shape, inputs)] = inputs["update"]
            return (inputs["x"],)
        assert step.function is not None
        result = step.function(inputs)
        results = tuple(result) if isinstance(result, list) else (result,)
        if step.fp16:
            self.fp16_peak = max(self.fp16_peak, *(max(float(r.max()), -float(r.min())) for r in results))
        return results


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, _Name):
        return values[value]
    return [_resolved(item, values) for item in value] if isinstance(value, list) else value


def _read(package: Path, function: str) -> Any:
    """Return the function as coremltools reads it back from disk."""
    try:
        with quiet_coremltools():
            import coremltools.converters.mil.frontend.milproto.load as milproto
    except ImportError as error:
        raise MissingExtra("Reading a Core ML package", "coreml") from error
    if not (package / MANIFEST_FILE).is_file():
        raise OutputError(f"{package} is no Core ML package. Give one that a coreml export wrote.")
    try:
        with quiet_coremltools():
            spec = read_specification(package)
            program = milproto.load(spec, spec.specificationVersion, str((package / WEIGHTS_FILE).parent))
    except Exception as error:  # whatever a damaged file makes coremltools stumble over
        raise OutputError(f"{package} cannot be read ({type(error).__name__}: {error}). It is damaged or no "
                          "mlprogram; export it again.") from error  # fmt: skip
    if function not in program.functions:
        raise OutputError(f"{package} has no function {function!r}; it has {', '.join(program.functions)}.")
    return program.functions[function]


def _compiled(body: Any, operations: Counter[str]) -> MilProgram:
    """Return the program: constants taken out, packed weights unpacked, the rest as steps."""
    states = {name: var for name, var in body.inputs.items() if "state" in type(var.sym_type).__name__.lower()
              or getattr(var.sym_type, "__name__", "") == "state"}  # fmt: skip
    known: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    steps: list[_Step] = []
    for op in body.operations:
        kind, outputs = str(op.op_type), tuple(str(var.name) for var in op.outputs)
        if kind == "const":
            known[outputs[0]] = widened(op.outputs[0].val)
        elif kind in _STATEFUL:
            var = op.inputs["input" if kind == _READ else "state"]
            inputs = {"state": str(var.name)} | ({} if kind == _READ else {"value": _input(op.inputs["value"], known)})
            steps.append(_Step(kind, None, inputs, outputs, fp16=False))
        else:
            inputs = {name: _input(var, known) for name, var in op.inputs.items() if var is not None}
            if kind.startswith("constexpr_"):
                packed[outputs[0]] = inputs
                known[outputs[0]] = OPERATIONS[kind](inputs)
                continue
            fp16 = kind not in _VIEWS and op.outputs[0].is_tensor_or_scalar_of("fp16")
            steps.append(_Step(kind, OPERATIONS[kind], inputs, outputs, fp16))
    ends = tuple((str(var.name), _input(var, known)) for var in body.outputs)
    shapes = {name: tuple(int(n) for n in var.sym_type.wrapped_type().get_shape()) for name, var in states.items()}
    return MilProgram(_scheduled(steps, {str(v) for _, v in ends}), ends, shapes, operations, packed)


def _input(var: Any, known: Mapping[str, Any]) -> Any:
    """Return the constant a variable is, or the name under which a run will find it."""
    if isinstance(var, list | tuple):
        return [_input(item, known) for item in var]
    if str(var.name) in known:
        return known[str(var.name)]
    return _Name(var.name)


def _names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    return [value] if isinstance(value, _Name) else []


def _scheduled(steps: list[_Step], kept: set[str]) -> tuple[_Step, ...]:
    """Return the steps with what each one frees, and with writes into states done in place where nothing can tell."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in [n for value in step.inputs.values() for n in _names(value)] + list(step.outputs):
            last[name] = index
    last.update(dict.fromkeys(kept, len(steps)))
    frees: list[list[str]] = [[] for _ in range(len(steps) + 1)]
    for name, index in last.items():
        frees[index].append(name)
    seen_in: dict[str, str] = {}
    scheduled = []
    for index, step in enumerate(steps):
        in_place = step.kind == _UPDATE and _is_private(steps, index, seen_in, last)
        scheduled.append(replace(step, in_place=in_place, frees=tuple(frees[index])))
        source = step.inputs.get("x")
        if step.kind in _STATEFUL:
            seen_in.update(dict.fromkeys(step.outputs, step.inputs["state"]))
        elif step.kind in _VIEWS and isinstance(source, _Name) and source in seen_in:
            seen_in.update(dict.fromkeys(step.outputs, seen_in[source]))
    return tuple(scheduled)


def _is_private(steps: list[_Step], index: int, seen_in: Mapping[str, str], last: Mapping[str, int]) -> bool:
    """Return whether the update at `index` is written back at once and no later step sees the old state.

    `seen_in` maps the values that are a state, or a view of one, to that state.
    """
    step, after = steps[index], steps[index + 1] if index + 1 < len(steps) else None
    state = seen_in.get(step.inputs["x"]) if isinstance(step.inputs["x"], _Name) else None
    if state is None or after is None or after.kind != _WRITE or after.inputs["state"] != state:
        return False
    written_back = after.inputs["value"] == step.outputs[0] and last[step.outputs[0]] == index + 1
    return written_back and all(last[name] <= index for name, source in seen_in.items() if source == state)
