"""The graphs that this machine is measured with: chains of products, and a decoder too narrow to weigh. Torch-free.

No two matrices of a chain are alike, because ONNX Runtime packs equal ones once and shares them: a chain of equal
matrices reads a few megabytes again and again from a cache and tells nothing of a model. Weights are scaled so that
numbers stay of one size along the chain: products of denormal numbers take three times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["BLOCK", "HEAD", "HEADS", "narrow_decoder", "pairs", "product_chain"]

BLOCK = 32
"""Weights to a scale in packed matrices."""
HEADS, HEAD = 4, 64
"""Heads of the narrow decoder, which share one head of keys and values, and their width."""
_NARROW, _TOKENS = 64, 256
"""Its width and vocabulary."""
_PER_CODE = 0.21
"""One over the spread of 4-bit codes around 8."""
_LONGEST = 1024
"""Positions that it can turn."""
_LITTLE_ROUNDS = 5
"""Pairs of small operators on lengths, as many as the exporter's padding takes."""

Shape = tuple[int, int]
"""Inputs and outputs of a matrix."""
Weights = dict[str, Callable[[], Any]]
"""Name -> what makes the array."""


def pairs(width: int, ffn: int, count: int) -> list[Shape]:
    """Return the shapes of so many pairs: up to twice the FFN (gate and up in one), of which half goes down again.

    >>> pairs(2, 3, 1)
    [(2, 6), (3, 2)]
    """
    return [(width, 2 * ffn), (ffn, width)] * count


def product_chain(shapes: Sequence[Shape], accuracy_level: int | None = None) -> bytes:
    """Return a graph of products one after the other, float32, or in 4 bits where MatMulNBits' accuracy is named.

    Where a product gives more than the next one takes, the next one takes half of it.
    """
    from onnx import helper

    nodes: list[Any] = []
    weights: Weights = {}
    x = "x"
    for place, (inputs, outputs) in enumerate(shapes):
        name = f"product{place}"
        if accuracy_level is None:
            weights |= _float(name, inputs, outputs, place)
            nodes.append(helper.make_node("MatMul", [x, name], [f"{name}.y"]))
        else:
            weights |= _packed(name, inputs, outputs, place)
            nodes.append(_packed_product(name, x, (inputs, outputs), accuracy_level))
        x = f"{name}.y"
        taken = shapes[place + 1][0] if place + 1 < len(shapes) else outputs
        if taken < outputs:
            nodes.append(helper.make_node("Split", [x], [f"{name}.half", f"{name}.rest"], axis=-1, num_outputs=2))
            x = f"{name}.half"
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    ends = [_value("x", [1, "rows", shapes[0][0]]), _value("y", [1, "rows", shapes[-1][1]])]
    return _serialized(nodes, ends[:1], ends[1:], weights)


def narrow_decoder(layers: int) -> bytes:
    """Return a decoder as the exporter writes them, operator by operator, whose weights are too few to matter."""
    from onnx import TensorProto, helper

    nodes, weights = _lengths(), _constants() | _float("table", _TOKENS, _NARROW, 0)
    nodes.append(helper.make_node("Gather", ["table", "input_ids"], ["embedded"]))
    x, rest = "embedded", "embedded"
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "rows"]),
              helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"])]  # fmt: skip
    outputs = [_value("logits", [1, "rows", _TOKENS])]
    for layer in range(layers):
        made, held = _layer(f"layer{layer}", layer, x, rest)
        nodes += made
        weights |= held
        x, rest = f"layer{layer}.down.y", f"layer{layer}.after.rest"
        for part in ("key", "value"):
            inputs.append(_value(f"past_key_values.{layer}.{part}", [1, 1, "past", HEAD]))
            outputs.append(_value(f"present.{layer}.{part}", [1, 1, "past", HEAD]))
    nodes.append(_norm("last", x, rest))
    weights |= _packed("head", _NARROW, _TOKENS, layers)
    nodes.append(_packed_product("head", "last.y", (_NARROW, _TOKENS), 1, "logits"))
    return _serialized(nodes, inputs, outputs, weights)


def _lengths() -> list[Any]:
    """Return what tells attention how long the texts are, and as many small steps as the exporter's padding takes."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["summed"], keepdims=1),
        helper.make_node("Sub", ["summed", "one"], ["before"]),
        helper.make_node("Squeeze", ["before", "one"], ["filled.0"]),
    ]
    for number in range(_LITTLE_ROUNDS):
        here, there, back = f"filled.{number}", f"filled.{number}.there", f"filled.{number + 1}"
        nodes += [helper.make_node("Add", [here, "one"], [there]), helper.make_node("Sub", [there, "one"], [back])]
    return [
        *nodes,
        helper.make_node("Cast", [f"filled.{_LITTLE_ROUNDS}"], ["filled"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["long"], start=1, end=2),
        helper.make_node("Squeeze", ["long"], ["scalar"]),
        helper.make_node("Cast", ["scalar"], ["total_length"], to=TensorProto.INT32),
    ]


def _constants() -> Weights:
    import numpy as np

    angles = np.zeros((_LONGEST, HEAD // 2), np.float32)
    return {
        "one": lambda: np.ones(1, np.int64),
        "gamma": lambda: np.ones(_NARROW, np.float32),
        "cos": lambda: angles + np.float32(1),
        "sin": lambda: angles,
    }


def _layer(at: str, place: int, x: str, rest: str) -> tuple[list[Any], Weights]:
    """Return the operators and weights of one layer; its output is `at`.down.y beside `at`.after.rest."""
    from onnx import helper

    attended = (HEADS + 2) * HEAD
    shapes = {"qkv": (_NARROW, attended), "o": (HEADS * HEAD, _NARROW), "up": (_NARROW, 2 * _NARROW),
              "down": (_NARROW, _NARROW)}  # fmt: skip
    weights: Weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        weights |= _packed(f"{at}.{name}", *shape, 4 * place + number)
    cache = [f"{end}.{place}.{part}" for end in ("past_key_values", "present") for part in ("key", "value")]
    nodes = [
        _norm(f"{at}.before", x, rest),
        _packed_product(f"{at}.qkv", f"{at}.before.y", shapes["qkv"], 1),
        helper.make_node("GroupQueryAttention",
                         [f"{at}.qkv.y", "", "", *cache[:2], "filled", "total_length", "cos", "sin"],
                         [f"{at}.attended", *cache[2:]], domain="com.microsoft", num_heads=HEADS, kv_num_heads=1,
                         do_rotary=1),
        _packed_product(f"{at}.o", f"{at}.attended", shapes["o"], 1),
        _norm(f"{at}.after", f"{at}.o.y", f"{at}.before.rest"),
        _packed_product(f"{at}.up", f"{at}.after.y", shapes["up"], 1),
        helper.make_node("Split", [f"{at}.up.y"], [f"{at}.gate", f"{at}.value"], axis=-1, num_outputs=2),
        helper.make_node("QuickGelu", [f"{at}.gate"], [f"{at}.silu"], domain="com.microsoft", alpha=1.0),
        helper.make_node("Mul", [f"{at}.silu", f"{at}.value"], [f"{at}.mixed"]),
        _packed_product(f"{at}.down", f"{at}.mixed", shapes["down"], 1),
    ]  # fmt: skip
    return nodes, weights


def _norm(name: str, x: str, rest: str) -> Any:
    """Return RMSNorm of a sum, which is passed on as `name`.rest."""
    from onnx import helper

    return helper.make_node("SkipSimplifiedLayerNormalization", [x, rest, "gamma"],
                            [f"{name}.y", "", "", f"{name}.rest"], domain="com.microsoft", epsilon=1e-6)  # fmt: skip


def _packed_product(name: str, x: str, shape: Shape, accuracy_level: int, y: str | None = None) -> Any:
    from onnx import helper

    return helper.make_node("MatMulNBits", [x, f"{name}.codes", f"{name}.scales"], [y or f"{name}.y"],
                            domain="com.microsoft", K=shape[0], N=shape[1], bits=4, block_size=BLOCK,
                            accuracy_level=accuracy_level)  # fmt: skip


def _float(name: str, inputs: int, outputs: int, seed: int) -> Weights:
    """Return a float32 matrix [I, O] of its own."""

    def values() -> Any:
        import numpy as np

        shares = np.random.default_rng(seed).random((inputs, outputs), np.float32)
        return (shares - np.float32(0.5)) * np.float32(math.sqrt(12 / inputs))

    return {name: values}


def _packed(name: str, inputs: int, outputs: int, seed: int) -> Weights:
    """Return codes and scales of 4-bit weights of its own."""

    def codes() -> Any:
        import numpy as np

        raw = np.random.default_rng(seed).bytes(outputs * inputs // 2)
        return np.frombuffer(raw, np.uint8).reshape(outputs, inputs // BLOCK, BLOCK // 2)

    def scales() -> Any:
        import numpy as np

        shares = np.random.default_rng(seed).random(outputs * inputs // BLOCK, np.float32)
        return (shares + np.float32(0.5)) * np.float32(_PER_CODE / math.sqrt(inputs))

    return {f"{name}.codes": codes, f"{name}.scales": scales}


def _value(name: str, shape: list[int | str]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _serialized(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Weights) -> bytes:
    """Return the graph's file; weights are made one by one, so that they are there twice and not four times."""
    from onnx import helper

    graph = helper.make_graph(list(nodes), "probe", list(inputs), list(outputs))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    for name, made in weights.items():
        array, tensor = made(), model.graph.initializer.add()
        tensor.name, tensor.data_type, tensor.raw_data = name, _type(array), array.tobytes()
        tensor.dims.extend(array.shape)
    return bytes(model.SerializeToString())


def _type(array: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
