"""What each MIL operation of a decoder means, in numpy.

One function an operation, from its named inputs to its output, after the reference in coremltools'
`converters/mil/mil/ops/defs`. Floats are float32: the evaluator has widened what the program declares as fp16. An
operation that is not in `OPERATIONS` is not guessed at; the evaluator refuses the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["OPERATIONS", "slices", "widened"]

Array = NDArray[Any]
Inputs = Mapping[str, Any]
_NUMPY_TYPES: dict[str, type] = {
    "fp32": np.float32, "fp16": np.float32, "int32": np.int32, "int16": np.int16, "uint16": np.uint16,
    "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip


def widened(value: Any) -> Any:
    """Return fp16 arrays and numbers as float32, all else as it is."""
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float16 else value


def slices(shape: tuple[int, ...], inputs: Inputs) -> tuple[slice | int, ...]:
    """Return the numpy index of a slice_by_index or slice_update over an array of that shape.

    >>> slices((4, 6), {"begin": [1, 2], "end": [0, 5], "end_mask": [True, False]})
    (slice(1, None, 1), slice(2, 5, 1))
    """
    rank = len(shape)
    begin, end = np.reshape(inputs["begin"], -1), np.reshape(inputs["end"], -1)
    stride = _given(inputs, "stride", np.ones(rank, np.int32))
    begin_mask, end_mask, squeeze_mask = (
        _given(inputs, name, np.zeros(rank, np.bool_)) for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    return tuple(
        int(begin[axis]) if squeeze_mask[axis]
        else slice(None if begin_mask[axis] else int(begin[axis]), None if end_mask[axis] else int(end[axis]),
                   int(stride[axis]))
        for axis in range(rank)
    )  # fmt: skip


def _given(inputs: Inputs, name: str, otherwise: Array) -> Array:
    value = inputs.get(name)
    return otherwise if value is None else np.reshape(value, -1)


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(int(number) for number in np.reshape(value, -1))


def _axes(inputs: Inputs) -> tuple[int, ...] | None:
    return None if inputs.get("axes") is None else _integers(inputs["axes"])


def _slice_update(inputs: Inputs) -> Array:
    updated: Array = inputs["x"].copy()
    updated[slices(updated.shape, inputs)] = inputs["update"]
    return updated


def _reshape(inputs: Inputs) -> Array:
    x = inputs["x"]
    shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(_integers(inputs["shape"]))]
    reshaped: Array = x.reshape(shape)
    return reshaped


def _linear(inputs: Inputs) -> Array:
    bias = inputs.get("bias")
    product: Array = inputs["x"] @ inputs["weight"].T
    return product if bias is None else product + bias


def _matmul(inputs: Inputs) -> Array:
    x, y = inputs["x"], inputs["y"]
    x = np.swapaxes(x, -1, -2) if inputs.get("transpose_x") else x
    y = np.swapaxes(y, -1, -2) if inputs.get("transpose_y") else y
    product: Array = x @ y
    return product


def _softmax(x: Array, axis: int = -1) -> Array:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    shares: Array = shifted / shifted.sum(axis, keepdims=True)
    return shares


def _attention(inputs: Inputs) -> Array:
    query, key, mask = inputs["query"], inputs["key"], inputs.get("attn_mask")
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    mixed: Array = _softmax(scores) @ inputs["value"]
    return mixed


def _layer_norm(inputs: Inputs) -> Array:
    x, axes = inputs["x"], _axes(inputs)
    centred = x - x.mean(axes, keepdims=True)
    normal: Array = centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + inputs.get("epsilon", 1e-5))
    normal = normal if inputs.get("gamma") is None else normal * inputs["gamma"]
    return normal if inputs.get("beta") is None else normal + inputs["beta"]


def _real_div(inputs: Inputs) -> Array:
    x, y = np.asarray(inputs["x"]), inputs["y"]
    quotient: Array = x // y if x.dtype.kind in "iu" else x / y
    return quotient


def _split(inputs: Inputs) -> list[Array]:
    axis, sizes = int(inputs["axis"]), inputs.get("split_sizes")
    parts = int(inputs["num_splits"]) if sizes is None else np.cumsum(_integers(sizes))[:-1]
    return list(np.split(inputs["x"], parts, axis))


def _gelu(inputs: Inputs) -> Array:
    x, mode = inputs["x"], str(inputs.get("mode", "EXACT"))
    if mode == "TANH_APPROXIMATION":
        curve = np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3))
    elif mode == "EXACT":
        curve = _erf(x * np.float32(math.sqrt(0.5)))
    else:
        curve = 2 * _sigmoid(np.float32(1.702) * x) - 1
    product: Array = np.float32(0.5) * x * (1 + curve)
    return product


def _erf(x: Array) -> Array:
    """Return the error function, which numpy lacks."""
    values: Array = torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return values


def _sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), by way of tanh: exact for all x, and nothing overflows."""
    half: Array = np.tanh(np.float32(0.5) * x)
    return np.float32(0.5) * (half + 1)


def _lut_to_dense(inputs: Inputs) -> Array:
    """Return lut[block of (o, i), indices[o, i]]; scalar palettes only, blocks of any shape."""
    indices, lut = np.asarray(inputs["indices"]), np.asarray(inputs["lut"])
    if lut.shape[-1] != 1:
        raise ValueError(f"palettes of vectors (length {lut.shape[-1]}) are not evaluated")
    blocks = np.ix_(*(np.arange(n) // (n // lut.shape[axis]) for axis, n in enumerate(indices.shape)))
    dense: Array = lut[(*blocks, indices.astype(np.int64), 0)]
    return dense


def _shift_scale(inputs: Inputs) -> Array:
    """Return scale * (data - offset), both repeated over their blocks."""
    data, offset = np.asarray(inputs["data"]).astype(np.float32), inputs.get("offset")
    if offset is not None:
        data = data - _repeated(np.asarray(offset).astype(np.float32), data.shape)
    scaled: Array = data * _repeated(np.asarray(inputs["scale"]), data.shape)
    return scaled


def _repeated(table: Array, shape: tuple[int, ...]) -> Array:
    for axis, extent in enumerate(shape):
        if table.shape[axis] not in (1, extent):
            table = np.repeat(table, extent // table.shape[axis], axis=axis)
    return table


def _unary(function: Callable[[Any], Any]) -> Callable[[Inputs], Any]:
    return lambda inputs: function(inputs["x"])


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Inputs], Any]:
    return lambda inputs: function(inputs["x"], inputs["y"])


def _reduction(function: Callable[..., Any]) -> Callable[[Inputs], Any]:
    return lambda inputs: function(inputs["x"], axis=_axes(inputs), keepdims=bool(inputs.get("keep_dims")))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": np.abs, "cos": np.cos, "erf": _erf, "exp": np.exp, "floor": np.floor,
    "identity": lambda x: x, "logical_not": np.logical_not, "relu": lambda x: np.maximum(x, 0), "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x), "sin": np.sin, "sqrt": np.sqrt, "square": np.square, "tanh": np.tanh,
    "shape": lambda x: np.array(x.shape, np.int32),
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "equal": np.equal, "floor_div": np.floor_divide, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "maximum": np.maximum, "minimum": np.minimum, "mod": np.mod, "mul": np.multiply,
    "not_equal": np.not_equal, "pow": np.power, "sub": np.subtract,
}  # fmt: skip

OPERATIONS: dict[str, Callable[[Inputs], Any]] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    "cast": lambda inputs: np.asarray(inputs["x"]).astype(_NUMPY_TYPES[str(inputs["dtype"])]),
    "concat": lambda inputs: np.concatenate([np.atleast_1d(v) for v in inputs["values"]], int(inputs["axis"])),
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "expand_dims": lambda inputs: np.expand_dims(inputs["x"], _integers(inputs["axes"])),
    "fill": lambda inputs: np.full(_integers(inputs["shape"]), inputs["value"]),
    "fill_like": lambda inputs: np.full(inputs["ref_tensor"].shape, inputs["value"]),
    "gather": lambda inputs: np.take(inputs["x"], inputs["indices"], axis=int(inputs.get("axis", 0))),
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "range_1d": lambda inputs: np.arange(inputs["start"], inputs["end"], inputs["step"]),
    "real_div": _real_div,
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "reshape": _reshape,
    "rsqrt": lambda inputs: 1 / np.sqrt(inputs["x"] + inputs.get("epsilon", 1e-12)),
    "scaled_dot_product_attention": _attention,
    "select": lambda inputs: np.where(inputs["cond"], inputs["a"], inputs["b"]),
    "slice_by_index": lambda inputs: inputs["x"][slices(inputs["x"].shape, inputs)],
    "slice_update": _slice_update,
    "softmax": lambda inputs: _softmax(inputs["x"], int(inputs.get("axis", -1))),
    "split": _split,
    "squeeze": lambda inputs: np.squeeze(inputs["x"], _axes(inputs)),
    "tile": lambda inputs: np.tile(inputs["x"], _integers(inputs["reps"])),
    "transpose": lambda inputs: np.transpose(inputs["x"], _integers(inputs["perm"])),
}
