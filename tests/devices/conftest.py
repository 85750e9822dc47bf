from __future__ import annotations

import json
from pathlib import Path

import pytest

from dwindle.report import Artifact

QUANTITY = "{value: 1, unit: UNIT, source: a test, date: 2026-11, trust: measured}"
PROFILE = """
name: toaster-2
title: Toaster 2
memory:
  physical: {value: 1, unit: GB, source: a test, date: 2026-11, trust: measured}
  default: {value: 500, unit: MB, source: a test, date: 2026-11, trust: measured}
  pessimistic: {value: 100, unit: MB, source: a test, date: 2026-11, trust: measured}
bandwidth: {value: 10, unit: GB/s, source: a test, date: 2026-11, trust: measured}
compute_units:
  cpu:
    effective_compute: {value: 100, unit: GFLOP/s, source: a test, date: 2026-11, trust: measured}
    bandwidth_share: {value: 0.5, unit: share, source: a test, date: 2026-11, trust: measured}
    overhead: {value: 1, unit: ms, source: a test, date: 2026-11, trust: measured}
    sustained: {value: 0.5, unit: share, source: a test, date: 2026-11, trust: measured}
runtimes:
  onnx: {unit: cpu, minimum_os: ToastOS 3, weight_formats: [float32, int4]}
"""


@pytest.fixture
def toaster(tmp_path: Path) -> Path:
    path = tmp_path / "toaster-2.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(autouse=True)
def own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    return tmp_path / "configuration"


@pytest.fixture
def artifact() -> Artifact:
    """An artifact of 10 MB: an int4 layer of 16 M parameters, and a tied float embedding of half a million."""
    layers = {
        "model.layers.0.mlp.up_proj": {"bits": 4.0, "bytes": 8_000_000, "parameters": 16_000_000, "format": "int4"},
        "model.embed_tokens": {"bits": 32.0, "bytes": 2_000_000, "parameters": 500_000, "format": "float32"},
    }
    details = {"layers": layers, "kv_bytes_per_token": 1000, "context_length": 512, "vocabulary": 1000}
    return Artifact("onnx", "export/onnx", 10_100_000, "0" * 64, variant="onnx", details=details)


def write_decoder(folder: Path, *, context: int = 32, extra_input: bool = False, cache: bool = True) -> Path:
    """A runnable ONNX folder with the inputs and outputs of an exported decoder, and no sense."""
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    vocabulary, heads, width = 11, 2, 4
    rng = np.random.default_rng(0)
    table = rng.standard_normal((vocabulary, heads * width)).astype(np.float32)
    weights = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(table.T.copy(), "head"),
        numpy_helper.from_array(np.array([0, 0, heads, width]), "split"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        helper.make_node("Reshape", ["x", "split"], ["by_head"]),
        helper.make_node("Transpose", ["by_head"], ["new"], perm=[0, 2, 1, 3]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", t])
              for n, t in (("input_ids", "T"), ("attention_mask", "S"), ("position_ids", "T"))]  # fmt: skip
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", vocabulary])]
    for part in ("key", "value") if cache else ():
        past, present = f"past_key_values.0.{part}", f"present.0.{part}"
        nodes.append(helper.make_node("Concat", [past, "new"], [present], axis=2))
        inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["B", heads, "P", width]))
        outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["B", heads, "S", width]))
    if extra_input:
        inputs.append(helper.make_tensor_value_info("mystery", TensorProto.FLOAT, [1]))
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocabulary, "max_position_embeddings": context}))
    return folder
