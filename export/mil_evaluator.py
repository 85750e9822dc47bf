"""A saved Core ML package, executed on any system: its program read back from disk and computed in numpy.

Core ML itself runs on Apple's systems only. What can be checked elsewhere is what was written: the program with its
slices, masks, states and lengths, and the codes, tables and constants of weight.bin. `MilProgram` reads those
(`mil_reader.py`), never the converter's objects in memory, and computes them in float32: what the program declares as
fp16 is widened, so the result shows every error of the export and nothing of a device's rounding. `fp16_peak` is the
largest number that an fp16 value would have had to hold; above 65,504 it would have been infinite on a device.

Packed weights are unpacked once and kept (4 bytes a weight), once for all functions of a package that share them.
States are arrays that the program updates; a write into a state that nothing else sees is done in place.

It serves any package whose operations are among `mil_operations.OPERATIONS`, ours or another's:

    program = MilProgram.load(Path("model.mlpackage"))            # or load(path, "decode"), or load_all(path)
    state = program.new_state()
    logits = program({"input_ids": ids, "causal_mask": mask}, state)["logits"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwindle.errors import OutputError, UnsupportedModel, offenders
from dwindle.export.mil_operations import OPERATIONS, slices, widened
from dwindle.export.mil_reader import Constant, MilFunction, MilOperation, Value, read_functions

__all__ = ["FP16_LARGEST", "MilProgram"]

FP16_LARGEST = 65504.0
_READ, _WRITE, _UPDATE = "read_state", "write_state", "slice_update"
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
    """Name -> a `Value`, a list of them, or what a constant is."""
    outputs: tuple[str, ...]
    fp16: bool
    """It makes new numbers, and declares them as fp16."""
    in_place: bool = False
    """A write into a state that may change the array itself."""
    frees: tuple[str, ...] = ()
    """Values that no later step needs."""


@dataclass
class MilProgram:
    """One function of a package. `load` makes it; a call computes it."""

    steps: tuple[_Step, ...]
    input_shapes: Mapping[str, tuple[int | None, ...]]
    """By name, with None for a length that is free."""
    output_shapes: Mapping[str, tuple[int | None, ...]]
    state_shapes: Mapping[str, tuple[int, ...]]
    operations: Counter[str]
    """How often each operation stands in the program."""
    constants: Mapping[str, Any] = field(repr=False)
    """Inputs of the packed weights as they were stored, by name of the weight: {name: {input: value}}."""
    fp16_peak: float = 0.0
    """Largest |value| of anything declared as fp16, over all calls (a masked score is about 1e4)."""

    @classmethod
    def load(cls, package: Path, function: str | None = None) -> MilProgram:
        """Return a function of a saved .mlpackage; without a name, the only one.

        Raises OutputError if it is no readable mlprogram or has no such function, UnsupportedModel naming every
        operation that has no meaning here, MissingExtra without coremltools.
        """
        functions = read_functions(package)
        names = list(functions) if function is None else [function]
        if len(names) != 1 or names[0] not in functions:
            wanted = f"has no function {function!r}; it has" if function else "has several functions, name one of"
            raise OutputError(f"{package} {wanted} {', '.join(functions)}.")
        return _programs(package, {names[0]: functions[names[0]]})[names[0]]

    @classmethod
    def load_all(cls, package: Path) -> dict[str, MilProgram]:
        """Return all functions of a package by name, sharing what is equal in them; raises as `load` does."""
        return _programs(package, read_functions(package))

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
        return {name: values[name] for name in self.output_shapes}

    def _result(self, step: _Step, inputs: Mapping[str, Any], state: State) -> tuple[Any, ...]:
        if step.kind == _READ:
            return (state[step.inputs["state"]],)
        if step.kind == _WRITE:
            state[step.inputs["state"]] = inputs["value"]
            return ()
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
    if isinstance(value, Value):
        return values[value]
    return [_resolved(item, values) for item in value] if isinstance(value, list) else value


def _programs(package: Path, functions: Mapping[str, MilFunction]) -> dict[str, MilProgram]:
    """Return the functions as programs, or raise UnsupportedModel for all operations that are not known."""
    present = {op.kind for function in functions.values() for op in function.operations}
    unknown = sorted((present | {kind for f in functions.values() for kind in f.blocks}) - set(OPERATIONS)
                     - set(_STATEFUL))  # fmt: skip
    if unknown:
        raise UnsupportedModel(f"{package}: {len(unknown)} operations cannot be evaluated: {offenders(unknown)}. "
                               "Execute the package on a Mac instead.")  # fmt: skip
    shared: dict[Hashable, Any] = {}
    return {name: _compiled(function, shared) for name, function in functions.items()}


def _compiled(function: MilFunction, shared: dict[Hashable, Any]) -> MilProgram:
    """Return the program: constants widened, packed weights unpacked, the rest as steps.

    `shared` holds what was made of constants, by their keys, for the next function.
    """
    known: dict[str, Constant] = {}
    packed: dict[str, Any] = {}
    steps: list[_Step] = []
    for op in function.operations:
        inputs = {name: _input(value, known, shared) for name, value in op.inputs.items()}
        if op.kind.startswith("constexpr_"):
            packed[op.outputs[0]] = inputs
            key = _key(op, known)
            if key not in shared:
                shared[key] = OPERATIONS[op.kind](inputs)
            known[op.outputs[0]] = Constant(shared[key], key)
            continue
        if op.kind in _STATEFUL:
            given = {"state": str(op.inputs["input"])} | ({"value": inputs["data"]} if op.kind == _WRITE else {})
            steps.append(_Step(op.kind, None, given, op.outputs, fp16=False))
            continue
        fp16 = op.kind not in _VIEWS and op.is_float16
        steps.append(_Step(op.kind, OPERATIONS[op.kind], inputs, op.outputs, fp16))
    operations = Counter(op.kind for op in function.operations)
    return MilProgram(_scheduled(steps, set(function.outputs)), function.inputs, function.outputs, function.states,
                      operations, packed)  # fmt: skip


def _input(value: Any, known: Mapping[str, Constant], shared: dict[Hashable, Any]) -> Any:
    """Return what a constant is, widened, or the name under which a run will find the value."""
    if isinstance(value, list):
        return [_input(item, known, shared) for item in value]
    constant = known.get(value) if isinstance(value, Value) else value
    if constant is None:
        return value
    if constant.key not in shared:
        shared[constant.key] = widened(constant.value)
    return shared[constant.key]


def _key(op: MilOperation, known: Mapping[str, Constant]) -> Hashable:
    """Return what tells the result of a constant operation from others."""
    given = {name: known[value] if isinstance(value, Value) else value for name, value in op.inputs.items()}
    return (op.kind, *((name, constant.key) for name, constant in sorted(given.items())))


def _names(value: Any) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    return [value] if isinstance(value, Value) else []


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
        elif step.kind in _VIEWS and isinstance(source, Value) and source in seen_in:
            seen_in.update(dict.fromkeys(step.outputs, seen_in[source]))
    return tuple(scheduled)


def _is_private(steps: list[_Step], index: int, seen_in: Mapping[str, str], last: Mapping[str, int]) -> bool:
    """Return whether the update at `index` is written back at once and no later step sees the old state.

    `seen_in` maps the values that are a state, or a view of one, to that state.
    """
    step, after = steps[index], steps[index + 1] if index + 1 < len(steps) else None
    state = seen_in.get(step.inputs["x"]) if isinstance(step.inputs["x"], Value) else None
    if state is None or after is None or after.kind != _WRITE or after.inputs["state"] != state:
        return False
    written_back = after.inputs["value"] == step.outputs[0] and last[step.outputs[0]] == index + 1
    return written_back and all(last[name] <= index for name, source in seen_in.items() if source == state)
