"""The shipped teacher: small enough, loadable by stock transformers, and good at what it is for."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dwindle.starter import KINDS, SPLITS, TEACHER, corpus
from dwindle.starter.evaluate_tasks import task_accuracy

MOST_NATS_PER_TOKEN = 0.9
LEAST_ACCURACY = 0.5  # of every kind; over all kinds it is 0.75


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TEACHER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TEACHER)


def test_the_folder_fits_the_repository() -> None:
    assert sum(path.stat().st_size for path in TEACHER.rglob("*")) < 10_000_000
    assert not [path for path in TEACHER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_its_shape_is_the_one_the_demo_prunes(model: PreTrainedModel) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert 3_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 5_000_000
    assert config.tie_word_embeddings
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    widths = (config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size)
    assert all(width % 32 == 0 for width in widths)
    assert config.intermediate_size % 64 == 0
    assert config.max_position_embeddings == 512


def test_its_log_is_whole_and_falls() -> None:
    lines = [json.loads(line) for line in (TEACHER / "training_log.jsonl").read_text().splitlines()]
    assert len(lines) > 50
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


@torch.no_grad()
def test_it_predicts_test_stories(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    nats, tokens = 0.0, 0
    for text in corpus(3, 20, "test"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
        loss = model(input_ids=ids, labels=ids).loss
        nats, tokens = nats + float(loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    assert nats / tokens < MOST_NATS_PER_TOKEN < math.log(model.config.vocab_size)


def test_it_answers_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    accuracy = task_accuracy(model, tokenizer, SPLITS["test"][5_000_000:5_000_012])
    assert set(accuracy) == set(KINDS)
    assert sum(accuracy.values()) / len(accuracy) >= 0.75, accuracy


@pytest.mark.slow
def test_it_answers_every_kind_of_question(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    accuracy = task_accuracy(model, tokenizer, SPLITS["test"][6_000_000:6_000_060])
    assert min(accuracy.values()) >= LEAST_ACCURACY, accuracy
