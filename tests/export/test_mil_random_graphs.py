"""Random chains of the evaluator's operations give what torch gives: shapes, axes, masks and broadcasts drawn by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.export.mil_operations import OPERATIONS

Step = Callable[[np.ndarray[Any, Any], torch.Tensor, np.random.Generator], tuple[Any, torch.Tensor]]

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs, "cos": torch.cos, "erf": torch.erf, "floor": torch.floor, "identity": lambda x: x,
    "relu": torch.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "sin": torch.sin, "tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip


def call(name: str, **inputs: Any) -> Any:
    return OPERATIONS[name](inputs)


def unary(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    name = str(rng.choice(list(_UNARY)))
    return call(name, x=x), _UNARY[name](t)


def binary(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    """Against a tensor whose axes are each the same or 1: every broadcast there is."""
    name = str(rng.choice(list(_BINARY)))
    y = rng.standard_normal([n if rng.random() < 0.5 else 1 for n in x.shape]).astype(np.float32)
    return call(name, x=x, y=y), _BINARY[name](t, torch.from_numpy(y))


def gelu(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    if rng.random() < 0.5:
        return call("gelu", x=x, mode="EXACT"), F.gelu(t)
    return call("gelu", x=x, mode="TANH_APPROXIMATION"), F.gelu(t, approximate="tanh")


def softmax(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(-x.ndim, x.ndim))
    return call("softmax", x=x, axis=axis), t.softmax(axis)


def layer_norm(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    gamma, beta = (rng.standard_normal(x.shape[-1]).astype(np.float32) for _ in range(2))
    found = call("layer_norm", x=x, axes=[-1], gamma=gamma, beta=beta, epsilon=np.float32(1e-3))
    return found, F.layer_norm(t, t.shape[-1:], torch.from_numpy(gamma), torch.from_numpy(beta), 1e-3)


def reduction(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(x.ndim))
    name, other = [("reduce_mean", torch.mean), ("reduce_sum", torch.sum), ("reduce_max", torch.amax)][rng.integers(3)]
    return call(name, x=x, axes=[axis], keep_dims=True), other(t, dim=axis, keepdim=True)


def transpose(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    order = [int(axis) for axis in rng.permutation(x.ndim)]
    return call("transpose", x=x, perm=order), t.permute(order)


def reshape(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    """0 keeps an axis, -1 is what is left."""
    return call("reshape", x=x, shape=[0, -1]), t.reshape(t.shape[0], -1)


def axes(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(x.ndim + 1))
    wider = call("expand_dims", x=x, axes=[axis])
    assert wider.shape == t.unsqueeze(axis).shape
    return call("squeeze", x=wider, axes=[axis]), t


def concat(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(x.ndim))
    return call("concat", values=[x, 2 * x], axis=axis), torch.cat([t, 2 * t], axis)


def split(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(x.ndim))
    if x.shape[axis] < 2:
        return x, t
    first = int(rng.integers(1, x.shape[axis]))
    sizes = [first, x.shape[axis] - first]
    return call("split", x=x, axis=axis, split_sizes=sizes)[1], t.split(sizes, axis)[1]


def linear(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    weight = rng.standard_normal((int(rng.integers(1, 5)), x.shape[-1])).astype(np.float32)
    bias = rng.standard_normal(len(weight)).astype(np.float32)
    return call("linear", x=x, weight=weight, bias=bias), F.linear(t, torch.from_numpy(weight), torch.from_numpy(bias))


def matmul(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    if rng.random() < 0.5:
        return call("matmul", x=x, y=x, transpose_x=True), t.mT @ t
    return call("matmul", x=x, y=x, transpose_y=True), t @ t.mT


def attention(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    mask = np.tril(np.ones((x.shape[-2], x.shape[-2]), bool))
    found = call("scaled_dot_product_attention", query=x, key=2 * x, value=x, attn_mask=mask)
    return found, F.scaled_dot_product_attention(t, 2 * t, t, attn_mask=torch.from_numpy(mask))


def sliced(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    begin = [int(rng.integers(n)) for n in x.shape]
    end = [int(rng.integers(b + 1, n + 1)) for b, n in zip(begin, x.shape, strict=True)]
    masks = [[bool(rng.random() < 0.3) for _ in x.shape] for _ in range(2)]
    index = tuple(slice(None if bm else b, None if em else e)
                  for b, e, bm, em in zip(begin, end, *masks, strict=True))  # fmt: skip
    return call("slice_by_index", x=x, begin=begin, end=end, begin_mask=masks[0], end_mask=masks[1]), t[index]


def gathered(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    axis = int(rng.integers(x.ndim))
    rows = rng.integers(x.shape[axis], size=3)
    return call("gather", x=x, indices=rows, axis=axis), t.index_select(axis, torch.from_numpy(rows))


def selected(x: Any, t: torch.Tensor, rng: np.random.Generator) -> tuple[Any, torch.Tensor]:
    limit = np.float32(rng.standard_normal())
    chosen = call("greater_equal", x=x, y=limit)
    return call("select", cond=chosen, a=x, b=-x), torch.where(t >= float(limit), t, -t)


STEPS: tuple[Step, ...] = (unary, binary, gelu, softmax, layer_norm, reduction, transpose, reshape, axes, concat, split,
                           linear, matmul, attention, sliced, gathered, selected)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=4), chosen=st.lists(st.sampled_from(STEPS), min_size=1, max_size=8),
       seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_chains_agree_with_torch(shape: list[int], chosen: list[Step], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x: Any = rng.standard_normal(shape).astype(np.float32)
    t = torch.from_numpy(x.copy())
    for step in chosen:
        x, t = step(x, t, rng)
        assert x.shape == tuple(t.shape), step.__name__
        np.testing.assert_allclose(
            x, t.numpy(), rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(x).max())), err_msg=step.__name__
        )
        x = np.clip(x, -8, 8).astype(np.float32)  # both go on from one array: what is compared is one step at a time
        t = torch.from_numpy(x.copy())
        if x.size > 4000:
            return


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), row_block=st.integers(1, 3), column_block=st.integers(1, 3),
       bits=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_palettes_and_scales_are_those_of_their_block(
    rows: int, columns: int, row_block: int, column_block: int, bits: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = rows * row_block, columns * column_block
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    palettes = rng.standard_normal((rows, columns, 2**bits, 1)).astype(np.float32)
    dense = call("constexpr_lut_to_dense", indices=codes, lut=palettes)
    scale, offset = rng.standard_normal((rows, columns)).astype(np.float32), rng.integers(0, 8, (rows, columns))
    affine = call("constexpr_blockwise_shift_scale", data=codes, scale=scale, offset=offset)
    for o in range(shape[0]):
        for i in range(shape[1]):
            block = o // row_block, i // column_block
            assert dense[o, i] == palettes[(*block, codes[o, i], 0)]
            assert affine[o, i] == pytest.approx(
                float(scale[block]) * (float(codes[o, i]) - float(offset[block])), rel=1e-6
            )
