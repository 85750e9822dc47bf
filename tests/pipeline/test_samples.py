from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwindle.pipeline.samples import PROMPTS, SAMPLE_TOKENS, collect_samples
from dwindle.pipeline.write_reports import read_report

Factory = Callable[..., Any]


def test_a_run_has_samples_of_teacher_and_every_variant(small_run: Path) -> None:
    samples = read_report(small_run).samples
    assert 1 <= len(samples) <= PROMPTS
    valid = (small_run / "report.html").read_text()
    for sample in samples:
        assert sample.prompt
        assert list(sample.texts) == ["teacher", "apple", "onnx"]
    assert 'id="samples"' in valid
    stored = json.loads((small_run / "steps" / "00-samples" / "record.json").read_text())
    assert stored["samples"] == [{"prompt": s.prompt, "texts": dict(s.texts)} for s in samples]


def test_a_sample_is_what_the_model_says_next(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    prompt = "the small fox"
    (sample,) = collect_samples({"teacher": bundle}, [prompt])
    ids = bundle.tokenizer(prompt, return_tensors="pt").input_ids
    room = min(ids.shape[1] + SAMPLE_TOKENS, bundle.anatomy.context)
    whole = bundle.model.generate(ids, max_length=room, do_sample=False, pad_token_id=0)
    expected = bundle.tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert sample.texts["teacher"] == expected.strip()
    assert sample.prompt == prompt


def test_a_prompt_as_long_as_the_context_is_followed_by_nothing(tiny_bundle: Factory) -> None:
    (sample,) = collect_samples({"teacher": tiny_bundle("llama")}, ["a" * 63])
    assert sample.texts["teacher"] == ""
