"""Training a miniature teacher: the same seed gives the same bits; the folder loads in stock transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dwindle.starter.train_teacher import TeacherOptions, main, train_teacher

MINIATURE = TeacherOptions(
    vocabulary=512,
    hidden=64,
    feed_forward=128,
    layers=2,
    heads=2,
    context=64,
    tokenizer_documents=60,
    documents=60,
    steps=3,
    warmup_steps=1,
    wired=False,
    batch_size=2,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    runs = {"first": MINIATURE, "again": MINIATURE, "other": replace(MINIATURE, seed=1)}
    for name, options in runs.items():
        train_teacher(options, root / name, export_every=1)
    return {name: root / name for name in runs}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(folders: dict[str, Path]) -> None:
    first, again, other = (load_file(folders[name] / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (folders["first"] / file).read_bytes() == (folders["again"] / file).read_bytes()


def test_the_folder_is_complete_and_loads_in_stock_transformers(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["first"])
    tokenizer = AutoTokenizer.from_pretrained(folders["first"])
    assert model.config.model_type == "llama"
    assert model.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert load_file(folders["first"] / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert len((folders["first"] / "training_log.jsonl").read_text().splitlines()) == 1
    assert [path.name for path in folders["first"].parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_with_a_work_folder_goes_on_to_the_same_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    train_teacher(MINIATURE, tmp_path / "model", work=tmp_path / "work")
    train_teacher(MINIATURE, tmp_path / "model", work=tmp_path / "work")
    first, finished = (load_file(folder / "model.safetensors") for folder in (folders["first"], tmp_path / "model"))
    assert all(torch.equal(first[name], finished[name]) for name in first)


def test_a_run_can_go_on_from_a_teacher_and_keeps_its_log(folders: dict[str, Path], tmp_path: Path) -> None:
    train_teacher(replace(MINIATURE, start=folders["first"], seed=1), tmp_path / "model")
    first, further = (load_file(folder / "model.safetensors") for folder in (folders["first"], tmp_path / "model"))
    assert first.keys() == further.keys()
    assert not all(torch.equal(first[name], further[name]) for name in first)
    assert len((tmp_path / "model" / "training_log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (folders["first"] / "tokenizer.json").read_bytes()


def test_help_shows_the_defaults() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for option in ("--output", "--steps", "--seed", "--work", "--start"):
        assert option in result.output
