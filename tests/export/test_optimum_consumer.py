"""optimum's ORTModelForCausalLM loads an exported folder and generates what transformers generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.export.artefact import write_companions
from dwindle.export.onnx_graph import export_onnx
from dwindle.export.options import ExportOptions

OPTIONS = ExportOptions(formats=("onnx",), decode_steps=32)


@pytest.fixture(scope="module")
def model_class() -> Any:
    """ORTModelForCausalLM, where optimum-onnx is installed (it needs transformers < 4.58)."""
    return pytest.importorskip("optimum.onnxruntime").ORTModelForCausalLM


def loaded(model_class: Any, bundle: Any, folder: Path, operators: str) -> Any:
    export_onnx(bundle, folder, ExportOptions(formats=("onnx",), decode_steps=32, operators=operators))  # type: ignore[arg-type]
    write_companions(bundle, folder)
    return model_class.from_pretrained(folder, use_io_binding=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "operators"), [("llama", "fused"), ("gemma3_text", "fused"), ("llama", "plain")])
def test_generate_equals_transformers(
    family: str, operators: str, model_class: Any, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle(family, pad_token_id=258)
    model = loaded(model_class, bundle, tmp_path, operators)
    tokenizer = bundle.tokenizer
    tokenizer.padding_side = "left"
    texts = ["One day, a girl", "She", "area(width)"]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 258}
    for batch in ([texts[0]], texts):
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        expected = bundle.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
        )
        found = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_logits_of_a_whole_text(model_class: Any, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("smollm3")
    model = loaded(model_class, bundle, tmp_path, "fused")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = bundle.model(input_ids=ids).logits
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
