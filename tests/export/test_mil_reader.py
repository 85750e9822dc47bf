"""What is read of a saved package: types, codes of every width, shapes, states, and what is damaged or no program."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwindle.errors import OutputError, UnsupportedModel
from dwindle.export.coreml_files import SPECIFICATION_FILE, WEIGHTS_FILE, quiet_coremltools, read_specification
from dwindle.export.coreml_runner import CoreMLEvaluatorRunner
from dwindle.export.mil_evaluator import MilProgram
from dwindle.export.mil_reader import Constant, Value, read_functions

with quiet_coremltools():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types


def _saved(package: Path, program: Any) -> Path:
    with quiet_coremltools():
        model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
                           compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY,
                           skip_model_load=True)  # fmt: skip
        model.save(str(package))
    return package


_FLOAT16 = 10
"""MIL.proto's number of that type."""


@pytest.fixture(scope="module")
def codes() -> dict[str, np.ndarray[Any, Any]]:
    """Codes over the whole range of every type that a package stores, by its name."""
    rows = np.random.default_rng(0)
    bounds = {"uint1": (0, 2), "uint2": (0, 4), "uint3": (0, 8), "uint4": (0, 16), "uint6": (0, 64), "uint8": (0, 256)}
    return {name: rows.integers(low, high, (16, 24)).astype(np.uint8) for name, (low, high) in bounds.items()}


@pytest.fixture(scope="module")
def package(codes: dict[str, np.ndarray[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with palettes of all widths, signed codes, two states' worth of types, and a length that is free."""

    def typed(values: Any, name: str) -> Any:
        return values.astype(types.nptype_from_builtin(types.string_to_builtin(name)))

    with quiet_coremltools():

        @mb.program(
            input_specs=[mb.TensorSpec(shape=(1, 24)), mb.StateTensorSpec(shape=(2, 3), dtype=types.fp16)],
            opset_version=ct.target.iOS18,
        )
        def program(x: Any, memory: Any) -> Any:
            results = []
            for name, indices in codes.items():
                lut = np.arange(2 ** int(name[4:]), dtype=np.float16).reshape(1, 1, -1, 1)
                dense = mb.constexpr_lut_to_dense(indices=typed(indices, name), lut=lut, name=f"w_{name}")
                results.append(mb.linear(x=mb.cast(x=x, dtype="fp16"), weight=dense, bias=np.zeros(16, np.float16)))
            signed = mb.constexpr_blockwise_shift_scale(
                data=typed(codes["uint4"].astype(np.int16) - 8, "int4"), scale=np.ones((16, 1), np.float16), name="s"
            )
            results.append(mb.linear(x=mb.cast(x=x, dtype="fp16"), weight=signed, bias=np.zeros(16, np.float16)))
            return (*results, mb.add(x=mb.read_state(input=memory), y=np.float16(1)))

    return _saved(tmp_path_factory.mktemp("read") / "p.mlpackage", program)


def test_codes_of_every_width_are_read_as_they_were(package: Path, codes: dict[str, np.ndarray[Any, Any]]) -> None:
    stored = MilProgram.load(package).constants
    for name, indices in codes.items():
        assert np.array_equal(stored[f"w_{name}"]["indices"], indices), name
    assert np.array_equal(stored["s"]["data"], codes["uint4"].astype(np.int16) - 8)
    assert stored["s"]["data"].dtype == np.int8


def test_a_function_tells_its_inputs_states_and_outputs(package: Path) -> None:
    (function,) = read_functions(package).values()
    assert dict(function.inputs) == {"x": (1, 24)}
    assert dict(function.states) == {"memory": (2, 3)}
    assert list(function.outputs.values())[-1] == (2, 3)
    last = function.operations[-1]
    assert (last.kind, last.is_float16) == ("add", True)
    assert isinstance(last.inputs["x"], Value)
    assert isinstance(last.inputs["y"], Constant)
    assert last.inputs["y"].value == 1


def test_equal_constants_have_equal_keys(package: Path) -> None:
    (function,) = read_functions(package).values()
    biases = [op.inputs["bias"].key for op in function.operations if op.kind == "linear"]
    again = [op.inputs["bias"].key for op in read_functions(package)["main"].operations if op.kind == "linear"]
    assert biases == again
    assert len({op.inputs["indices"].key for op in function.operations if "indices" in op.inputs}) == 6


def test_damaged_weights_are_told(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "p.mlpackage"
    shutil.copytree(package, broken)
    stored = (broken / WEIGHTS_FILE).read_bytes()
    (broken / WEIGHTS_FILE).write_bytes(stored[:64] + b"\0" * (len(stored) - 64))
    with pytest.raises(OutputError, match=r"cannot be read .* holds no constant at 64"):
        read_functions(broken)
    (broken / WEIGHTS_FILE).unlink()
    with pytest.raises(OutputError, match=r"weight\.bin is missing"):
        read_functions(broken)


def test_a_program_of_other_operators_or_none_is_told(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "p.mlpackage"
    shutil.copytree(package, broken)
    message = read_specification(broken)
    body = message.mlProgram.functions["main"]
    body.opset = "CoreML99"
    (broken / SPECIFICATION_FILE).write_bytes(message.SerializeToString())
    with pytest.raises(OutputError, match="no operations for 'CoreML99'"):
        read_functions(broken)
    message.ClearField("mlProgram")
    (broken / SPECIFICATION_FILE).write_bytes(message.SerializeToString())
    with pytest.raises(OutputError, match="holds a damaged model, an mlprogram is needed"):
        read_functions(broken)


def test_constants_too_short_for_their_shape_are_told(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "p.mlpackage"
    shutil.copytree(package, broken)
    message = read_specification(broken)
    body = message.mlProgram.functions["main"]
    for op in body.block_specializations[body.opset].operations:
        for value in op.attributes.values():
            if op.type == "const" and value.type.tensorType.rank == 1 and value.type.tensorType.dataType == _FLOAT16:
                value.type.tensorType.dimensions[0].constant.size *= 1000
    (broken / SPECIFICATION_FILE).write_bytes(message.SerializeToString())
    with pytest.raises(OutputError, match="bytes are stored for"):
        read_functions(broken)


def test_several_functions_need_a_name(package: Path, tmp_path: Path) -> None:
    double = tmp_path / "p.mlpackage"
    shutil.copytree(package, double)
    message = read_specification(double)
    functions = message.mlProgram.functions
    functions["other"].CopyFrom(functions["main"])
    (double / SPECIFICATION_FILE).write_bytes(message.SerializeToString())
    with pytest.raises(OutputError, match=r"has several functions, name one of (main, other|other, main)\."):
        MilProgram.load(double)
    both = MilProgram.load_all(double)
    assert set(both) == {"main", "other"}
    weights = [next(step.inputs["weight"] for step in program.steps if step.kind == "linear")
               for program in both.values()]  # fmt: skip
    assert weights[0] is weights[1]


def test_a_package_that_is_no_decoder_is_told_with_all_that_is_missing(package: Path) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        CoreMLEvaluatorRunner(package)
    message = str(refusal.value)
    assert "main takes x and returns" in message
    assert "states have the shapes [(2, 3)]" in message
    assert "a single token, or any number, is needed" in message
