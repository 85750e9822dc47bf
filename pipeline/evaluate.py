"""Measure a model folder or an exported artifact on a text: the numbers of report.json, made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.data import evaluation_set
from dwindle.errors import DataError
from dwindle.measure import LogitSlices, Meter, logit_slices
from dwindle.report import Measurement

__all__ = ["evaluate"]


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    torch_device: str = "cpu",
) -> Measurement:
    """Return size and quality of a model folder, a Hugging Face id or an exported artifact's folder.

    `reference` is the teacher for KL and agreement; `max_tokens` cuts the text as a recipe's `evaluation_tokens`
    does; `context` is the window length T (the model's context if None).
    """
    teacher = None if reference is None else ModelBundle.load(reference, torch_device=torch_device)
    folder = Path(model)
    if (folder / "manifest.json").exists():
        return _evaluate_artifact(folder, text, teacher, max_tokens, context)
    bundle = ModelBundle.load(model, torch_device=torch_device)
    evaluation = evaluation_set(str(text), bundle.tokenizer, max_tokens=max_tokens)
    return Meter(evaluation, teacher, context).measure(bundle)


def _evaluate_artifact(
    folder: Path, text: str | Path, teacher: ModelBundle | None, max_tokens: int | None, context: int | None
) -> Measurement:
    from transformers import AutoTokenizer

    from dwindle.export import open_artifact

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    runner = open_artifact(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation = evaluation_set(str(text), tokenizer, max_tokens=max_tokens)
    longest = int(manifest["context_length"])
    if context is not None and context > longest:
        raise DataError(f"--context {context}: the artifact takes at most {longest} tokens.")

    def slices(ids: Tensor, n: int) -> Iterator[Tensor]:
        for row in ids:
            runner.reset()
            yield from torch.split(runner.step(row[None]), n)

    meter = Meter(evaluation, teacher, batch_tokens=1)
    vocabulary = int(manifest["vocabulary"])
    quality = meter.quality(
        slices, None if teacher is None else _reference(teacher), vocab=vocabulary, context=context or longest
    )
    size = int(manifest["parameters"])
    return Measurement(
        parameters=size,
        bytes=int(manifest["bytes"]),
        bits_per_weight=8 * int(manifest["bytes"]) / size,
        nats_per_token=quality.nats_per_token,
        bits_per_byte=quality.bits_per_byte,
        kl_nats_per_token=quality.kl_nats_per_token,
        top1_agreement=quality.top1_agreement,
    )


def _reference(teacher: ModelBundle) -> LogitSlices:
    teacher.model.eval()
    return logit_slices(teacher)
