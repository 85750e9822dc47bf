"""Measuring during training: the numbers of `dwindle.measure`, samples in the log, nothing changed by looking."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.distill import DistillOptions, run
from dwindle.distill.probe import Probe
from dwindle.distill.teacher_signal import LiveTeacher
from dwindle.measure import Meter
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

Factory = Callable[..., Any]


def tokens(bundle: Any, role: str, rows: int, length: int) -> TokenSet:
    ids = torch.randint(3, bundle.anatomy.vocab, (rows, length), generator=torch.Generator().manual_seed(rows))
    return TokenSet(ids, role, "random", role[0] * 64, 1, encoding_sha256(bundle.tokenizer))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_numbers_are_those_of_the_meter(tiny_bundle: Factory, family: str) -> None:
    teacher, student = tiny_bundle(family, seed=1), tiny_bundle(family, seed=2)
    evaluation = tokens(student, "evaluation", 1, 90)
    expected = Meter(evaluation, teacher, context=16).measure(student)
    with torch.no_grad():
        found = Probe(evaluation, LiveTeacher(teacher), 16, student.tokenizer)(student.model, 1)
    assert found["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert found["kl_nats_per_token"] == pytest.approx(expected.kl_nats_per_token, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(expected.top1_agreement)


def test_a_run_is_measured_on_its_way_and_ends_with_the_same_bits(tiny_bundle: Factory, tmp_path: Path) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2)
    train, evaluation = tokens(student, "train", 16, 17), tokens(student, "evaluation", 1, 70)
    options = DistillOptions(steps=6, batch_size=4, log_every=2, evaluate_every=3)
    plain = run(student, options, teacher=teacher, train=train)[0]
    watched, record = run(student, options, teacher=teacher, train=train, folder=tmp_path, evaluation=evaluation)
    assert watched.content_sha256 == plain.content_sha256
    seen = {line["step"]: line.get("evaluation_kl_nats_per_token") for line in record.details["history"]}
    assert seen[2] is None
    assert seen[6] < seen[4]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 4, 6, 6]
    assert all(sample["prompt"] and sample["text"] for sample in samples)
