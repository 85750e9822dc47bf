"""The evaluator against numpy and torch, on small programs that coremltools saved to disk and it read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwindle.errors import MissingExtra, OutputError, UnsupportedModel
from dwindle.export.coreml_files import SPECIFICATION_FILE, quiet_coremltools
from dwindle.export.mil_evaluator import MilProgram
from dwindle.export.mil_operations import OPERATIONS, slices

with quiet_coremltools():
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def _saved(folder: Path, build: Callable[..., Any], *specs: Any, **precision: Any) -> Path:
    """Save a program built from `build` as folder/p.mlpackage; return its path."""
    with quiet_coremltools():
        program = mb.program(input_specs=list(specs), opset_version=ct.target.iOS18)(build)
        package = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18,
                             compute_precision=precision.get("precision", ct.precision.FLOAT32),
                             pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True)  # fmt: skip
        package.save(str(folder / "p.mlpackage"))
    return folder / "p.mlpackage"


def test_operations_agree_with_torch(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return (
            mb.softmax(x=x, axis=-1, name="softmax"), mb.silu(x=x, name="silu"), mb.gelu(x=x, mode="EXACT", name="gelu"),
            mb.gelu(x=x, mode="TANH_APPROXIMATION", name="gelu_tanh"), mb.erf(x=x, name="erf"),
            mb.gelu(x=x, mode="SIGMOID_APPROXIMATION", name="gelu_sigmoid"), mb.square(x=x, name="square"),
            mb.layer_norm(x=x, axes=[-1], gamma=np.arange(8, dtype=np.float32), beta=np.ones(8, np.float32),
                          epsilon=1e-3, name="layer_norm"),
            mb.reduce_mean(x=x, axes=[1], keep_dims=False, name="mean"), mb.rsqrt(x=mb.square(x=x), name="rsqrt"),
            mb.matmul(x=x, y=x, transpose_y=True, name="matmul"), mb.sigmoid(x=mb.mul(x=x, y=100.0), name="sigmoid"),
            mb.real_div(x=x, y=3.0, name="div"), mb.transpose(x=x, perm=[2, 0, 1], name="transpose"),
            mb.tile(x=x, reps=[1, 2, 1], name="tile"), mb.split(x=x, num_splits=2, axis=2, name="split")[1],
            mb.split(x=x, split_sizes=[1, 2], axis=1, name="sizes")[1], mb.reduce_max(x=x, axes=[0], name="max"),
            mb.scaled_dot_product_attention(query=x, key=x, value=x, name="attention"),
        )  # fmt: skip

    program = MilProgram.load(_saved(tmp_path, build, mb.TensorSpec(shape=X.shape)))
    found = list(program({"x": X}).values())
    x, f = torch.from_numpy(X), torch.nn.functional
    wanted = (
        x.softmax(-1), f.silu(x), f.gelu(x), f.gelu(x, approximate="tanh"), torch.erf(x), x * torch.sigmoid(1.702 * x),
        x * x, f.layer_norm(x, (8,), torch.arange(8.0), torch.ones(8), 1e-3), x.mean(1), 1 / x.abs(),
        x @ x.transpose(1, 2), torch.sigmoid(100 * x), x / 3, x.permute(2, 0, 1), x.repeat(1, 2, 1), x[..., 4:],
        x[:, 1:], x.amax(0), f.scaled_dot_product_attention(x, x, x),
    )  # fmt: skip
    for name, value, reference in zip(program.output_shapes, found, wanted, strict=True):
        assert np.allclose(value, reference.numpy().squeeze() if name == "max" else reference, atol=2e-6), name
        assert value.dtype == np.float32


def test_attention_masks_hide(tmp_path: Path) -> None:
    query = X[None]
    hidden = np.triu(np.ones((1, 1, 3, 3), np.bool_), 1)
    inputs = {"query": query, "key": query, "value": query}
    by_flag = OPERATIONS["scaled_dot_product_attention"](inputs | {"attn_mask": ~hidden})
    by_bias = OPERATIONS["scaled_dot_product_attention"](inputs | {"attn_mask": hidden * np.float32(-1e9)})
    wanted = torch.nn.functional.scaled_dot_product_attention(*[torch.from_numpy(query)] * 3, is_causal=True)
    assert np.allclose(by_flag, wanted, atol=1e-6)
    assert np.allclose(by_bias, wanted, atol=1e-6)


def test_slices_follow_their_masks() -> None:
    given = {"begin": [1, 0, 2], "end": [0, 2, 0], "stride": [1, 1, 1], "begin_mask": [False, True, False],
             "end_mask": [True, False, False], "squeeze_mask": [False, False, True]}  # fmt: skip
    assert np.array_equal(X[slices(X.shape, given)], X[1:, :2, 2])
    reshaped = OPERATIONS["reshape"]({"x": X, "shape": [0, -1]})
    assert reshaped.shape == (2, 24)
    with pytest.raises(ValueError, match="palettes of vectors"):
        OPERATIONS["constexpr_lut_to_dense"]({"indices": np.zeros((2, 2)), "lut": np.zeros((1, 1, 2, 2))})


def test_packed_weights_are_unpacked_once(tmp_path: Path) -> None:
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
    lut = np.random.default_rng(1).normal(size=(2, 1, 16, 1)).astype(np.float16)
    data = (np.arange(64, dtype=np.int16).reshape(8, 8) % 16 - 8).astype(np.int8)
    scale = np.array([[0.5, 0.25]] * 8, np.float16)

    def typed(values: Any, name: str) -> Any:
        return values.astype(types.nptype_from_builtin(types.string_to_builtin(name)))

    def build(x: Any) -> Any:
        palettized = mb.constexpr_lut_to_dense(indices=typed(indices, "uint4"), lut=lut)
        integers = mb.constexpr_blockwise_shift_scale(data=typed(data, "int4"), scale=scale, name="integers")
        shifted = mb.constexpr_blockwise_shift_scale(
            data=typed(indices, "uint4"), scale=scale, offset=typed(np.full((8, 2), 3, np.uint8), "uint4")
        )
        x = mb.cast(x=x, dtype="fp16")
        return tuple(mb.cast(x=mb.linear(x=x, weight=weight, bias=np.zeros(8, np.float16)), dtype="fp32")
                     for weight in (palettized, integers, shifted))  # fmt: skip

    program = MilProgram.load(_saved(tmp_path, build, mb.TensorSpec(shape=(1, 8))))
    x = np.eye(8, dtype=np.float32)[3:4]
    palettized, integers, shifted = program({"x": x}).values()
    wide, blocks = lut.astype(np.float32), np.repeat(scale.astype(np.float32), 4, axis=1)
    assert np.array_equal(palettized[0], [wide[o // 4, 0, indices[o, 3], 0] for o in range(8)])
    assert np.array_equal(integers[0], (data * blocks)[:, 3])
    assert np.array_equal(shifted[0], ((indices.astype(np.float32) - 3) * blocks)[:, 3])
    assert np.array_equal(program.constants["integers"]["data"], data)
    assert all(step.kind != "constexpr_lut_to_dense" for step in program.steps)


def _counter(folder: Path, late_read: bool) -> MilProgram:
    """Return a program that writes x into row 1 of a state and adds what a view of it showed before.

    The view is read before the write, or, with `late_read`, after it.
    """

    def build(x: Any, memory: Any) -> Any:
        old = mb.read_state(input=memory)
        view = mb.squeeze(x=mb.expand_dims(x=old, axes=[0]), axes=[0])
        before = view if late_read else mb.mul(x=view, y=np.float16(1))
        new = mb.slice_update(x=old, update=x, begin=[1, 0], end=[2, 3])
        written = mb.coreml_update_state(state=memory, value=new)
        return mb.add(x=written, y=before, name="sum"), mb.mul(x=before, y=np.float16(1), name="before")

    specs = mb.TensorSpec(shape=(1, 3), dtype=types.fp16), mb.StateTensorSpec(shape=(2, 3), dtype=types.fp16)
    return MilProgram.load(_saved(folder, build, *specs, precision=ct.precision.FLOAT16))


@pytest.mark.parametrize("late_read", [False, True])
def test_states_keep_what_is_written_and_old_values_stay_old(late_read: bool, tmp_path: Path) -> None:
    program = _counter(tmp_path, late_read)
    assert [step.in_place for step in program.steps if step.kind == "slice_update"] == [not late_read]
    state = program.new_state()
    assert {name: value.shape for name, value in state.items()} == {"memory": (2, 3)}
    first = program({"x": np.ones((1, 3), np.float16)}, state)
    assert first["sum"].tolist() == [[0, 0, 0], [1, 1, 1]]
    second = program({"x": np.full((1, 3), 5, np.float16)}, state)
    assert second["sum"].tolist() == [[0, 0, 0], [6, 6, 6]]
    assert second["before"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert state["memory"].tolist() == [[0, 0, 0], [5, 5, 5]]
    assert program({"x": np.ones((1, 3), np.float16)})["before"].sum() == 0
    assert program.fp16_peak == 6


def test_what_fp16_cannot_hold_is_seen(tmp_path: Path) -> None:
    spec = mb.TensorSpec(shape=(1, 2), dtype=types.fp16)
    program = MilProgram.load(_saved(tmp_path, lambda x: mb.mul(x=x, y=np.float16(-300)), spec,
                                     precision=ct.precision.FLOAT16))  # fmt: skip
    program({"x": np.array([[1, 300]], np.float16)})
    assert program.fp16_peak == 90_000


def test_all_unknown_operations_are_named(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.cumsum(x=x, axis=-1), mb.topk(x=x, k=2, axis=-1)[0], mb.relu(x=x)

    package = _saved(tmp_path, build, mb.TensorSpec(shape=X.shape))
    with pytest.raises(UnsupportedModel, match="2 operations cannot be evaluated: cumsum, topk") as refusal:
        MilProgram.load(package)
    assert "relu" not in str(refusal.value)


def test_what_is_no_package_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"nothing\.mlpackage is no Core ML package"):
        MilProgram.load(tmp_path / "nothing.mlpackage")
    package = _saved(tmp_path, lambda x: mb.relu(x=x), mb.TensorSpec(shape=X.shape))
    with pytest.raises(OutputError, match=r"has no function 'decode'; it has main\."):
        MilProgram.load(package, "decode")
    specification = package / SPECIFICATION_FILE
    specification.write_bytes(specification.read_bytes()[: specification.stat().st_size // 2])
    with pytest.raises(OutputError, match="cannot be read"):
        MilProgram.load(package)


def test_a_missing_coremltools_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingExtra, match=r"dwindle\[coreml\]"):
        MilProgram.load(tmp_path)
