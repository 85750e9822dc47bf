"""ONNX Runtime GenAI generates from an exported folder what transformers generates, with the chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import FAMILIES
from dwindle.export.artefact import write_companions
from dwindle.export.genai_config import genai_config
from dwindle.export.onnx_graph import export_onnx
from dwindle.export.options import ExportOptions
from dwindle.storage import write_json

OPTIONS = ExportOptions(formats=("onnx",), decode_steps=32)
TEMPLATE = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]:"


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai")


def exported(bundle: Any, folder: Path, options: ExportOptions = OPTIONS) -> Path:
    """Write what the export step writes of a folder that GenAI reads."""
    folder.mkdir(exist_ok=True)
    options = options.resolved(bundle.anatomy)
    export_onnx(bundle, folder, options)
    write_json(folder / "genai_config.json", genai_config(bundle, options))
    write_companions(bundle, folder)
    return folder


def greedy(bundle: Any, prompt: list[int], tokens: int) -> list[int]:
    """Return prompt and greedy continuation of the stock model, end marks ignored."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, bundle.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return [int(i) for i in ids[0]]


def generated(genai: Any, folder: Path, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Return GenAI's sequences of `length` tokens for prompts of equal length."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
    generator = genai.Generator(model, params)
    generator.append_tokens(prompts)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(i) for i in generator.get_sequence(row)] for row in range(len(prompts))]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_generates_the_stock_models_text(
    family: str, genai: Any, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle(family, eos_token_id=271)
    prompt = [256, 72, 101, 108, 108, 111, 32, 84]
    expected = greedy(bundle, prompt, 24)
    assert generated(genai, exported(bundle, tmp_path), [prompt], 32) == [expected]


@pytest.mark.parametrize("options", [replace(OPTIONS, operators="plain"), replace(OPTIONS, kv_cache="float16"),
                                     replace(OPTIONS, kv_cache="int8")])  # fmt: skip
def test_every_form_of_the_cache(
    options: ExportOptions, genai: Any, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("llama", head_dim=16, eos_token_id=271)
    prompt = [256, 72, 101, 108, 108, 111, 32, 84]
    expected = greedy(bundle, prompt, 8)
    assert generated(genai, exported(bundle, tmp_path, options), [prompt], 16) == [expected]


def test_an_unequal_batch_generates_what_each_row_does_alone(
    genai: Any, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = tiny_bundle("mistral", eos_token_id=271, pad_token_id=258)
    bundle.model.generation_config.pad_token_id = 258
    folder = exported(bundle, tmp_path)
    texts = ["<s>One day, a little girl", "<s>She knew", "<s>area(width, height)"]
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=40, min_length=40, batch_size=3)
    generator = genai.Generator(model, params)
    generator.append_tokens(tokenizer.encode_batch(texts))
    while not generator.is_done():
        generator.generate_next_token()
    for row, text in enumerate(texts):
        prompt = bundle.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = [int(i) for i in generator.get_sequence(row) if i != 258]
        assert found[: len(prompt)] == prompt
        assert found == greedy(bundle, prompt, len(found) - len(prompt))


def test_text_with_the_chat_template(genai: Any, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("qwen2", max_position_embeddings=128, eos_token_id=271)
    bundle.tokenizer.chat_template = TEMPLATE
    folder = exported(bundle, tmp_path)
    messages = [{"role": "user", "content": "Tell me a story."}]
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    text = tokenizer.apply_chat_template(
        messages='[{"role": "user", "content": "Tell me a story."}]', add_generation_prompt=True
    )
    assert text == bundle.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = [int(i) for i in tokenizer.encode(text)]
    assert prompt == bundle.tokenizer(text, add_special_tokens=False)["input_ids"]
    length = len(prompt) + 24
    found = generated(genai, folder, [prompt], length)[0]
    assert found == greedy(bundle, prompt, 24)
    stream = tokenizer.create_stream()
    assert "".join(stream.decode(token) for token in found[len(prompt) :])


def test_the_config_says_which_form_the_graph_has(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama", head_dim=16)
    for operators, shared in (("fused", True), ("plain", False)):
        config = genai_config(bundle, replace(OPTIONS, operators=operators).resolved(bundle.anatomy))  # type: ignore[arg-type]
        assert config["search"]["past_present_share_buffer"] is shared
        assert ("position_ids" in config["model"]["decoder"]["inputs"]) is not shared
        assert config["model"]["context_length"] == config["search"]["max_length"] == 64
