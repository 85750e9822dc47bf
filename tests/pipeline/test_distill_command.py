"""`dwindle distill` from the command line: live, on-policy, measured on its way, planned from configs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, OutputError, RecipeError, UnsupportedModel
from dwindle.pipeline.cli import cli

WORDS = "The cat sat on the mat. A dog ran to the tree, and the bird sang over it all day long.\n\n"


@pytest.fixture
def line(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_bundle("llama", initializer_range=0.2).save(tmp_path / "teacher")
    tiny_bundle("llama", seed=3).save(tmp_path / "student")
    (tmp_path / "train.txt").write_text(WORDS * 60)
    (tmp_path / "test.txt").write_text("The bird sat on the tree and ran over the cat all day. " * 8)
    return tmp_path


def dwindle(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def command(line: Path, *words: object) -> list[object]:
    return ["distill", "-t", line / "teacher", "-m", line / "student", *words]


def test_a_student_writes_half_of_its_text_and_is_measured(line: Path) -> None:
    done = dwindle(*command(line, "-d", line / "train.txt", "-o", line / "out", "--loss", "jsd", "--on-policy", "0.5",
                            "--text", line / "test.txt", "--tokens", "2K", "--batch-size", 4, "--set",
                            "data.context=32", "--set", "log_every=4", "--set", "evaluate_every=8", "--json"))  # fmt: skip
    record = json.loads(done.stdout)
    last = record["details"]["history"][-1]
    assert last["jsd_written"] > 0
    assert 0 < last["evaluation_kl_nats_per_token"] < record["details"]["history"][0]["jsd"] * 100
    assert ModelBundle.load(line / "out").lineage.steps[-1] == "distill"
    assert not list(line.glob(".*"))


def test_the_plan_needs_configs_alone(line: Path) -> None:
    for name in ("teacher", "student"):
        (line / name / "model.safetensors").unlink()
    words = command(
        line, "--plan", "--gpus", 4, "--tokens", "1M", "--set", "precision=bf16", "--set", "data.context=64"
    )
    told = json.loads(dwindle(*words, "--json").stdout)
    assert told["processes"] == 4
    assert told["piece_tokens"] == 8 * 64
    assert told["fits"]
    assert told["tokens"] == 1_000_000
    shown = dwindle(*words).stdout
    assert "teacher weights" in shown
    assert "tokens/s" in shown


def test_the_plan_of_an_offloaded_teacher_of_another_family(line: Path) -> None:
    """Of 12 layers one is in memory: 4 bytes per weight of it and of what is outside the layers."""
    config = {"model_type": "gpt2", "vocab_size": 272, "n_embd": 64, "n_layer": 12, "n_head": 4, "n_positions": 64}
    (line / "gpt2.json").write_text(json.dumps(config))
    words = ["distill", "-t", line / "gpt2.json", "-m", line / "student", "--plan", "--gpus", 4, "--json"]
    whole, offloaded = (json.loads(dwindle(*words, *more).stdout)["bytes_per_process"]
                        for more in ([], ["--offload-teacher"]))  # fmt: skip
    layer, root = 12 * 64 * 64 + 13 * 64, (272 + 64 + 2) * 64
    assert whole["teacher weights"] == 4 * (12 * layer + root) // 4
    assert offloaded["teacher weights"] == 4 * (layer + root)
    assert "teacher's gathered layers" not in offloaded


def test_a_teacher_of_another_family_stays_on_the_disk(line: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["gpt2"](vocab_size=272, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(line / "gpt2")
    for file in (line / "teacher").glob("tokenizer*"):
        (line / "gpt2" / file.name).write_bytes(file.read_bytes())
    records = []
    for name, more in (("resident", []), ("offloaded", ["--offload-teacher"])):
        done = dwindle("distill", "-t", line / "gpt2", "-m", line / "student", "-d", line / "train.txt", "-o",
                       line / name, "--tokens", "1K", "--batch-size", 4, "--text", line / "test.txt", "--set",
                       "data.context=32", "--json", *more)  # fmt: skip
        records.append(json.loads(done.stdout)["details"]["history"])
    assert records[0] == records[1]
    assert records[0][-1]["evaluation_kl_nats_per_token"] > 0
    weights = [(line / name / "model.safetensors").read_bytes() for name in ("resident", "offloaded")]
    assert weights[0] == weights[1]
    with pytest.raises(UnsupportedModel, match="quantized"):
        (line / "gpt2" / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": {"bits": 4}}))
        dwindle("distill", "-t", line / "gpt2", "-m", line / "student", "-d", line / "train.txt", "-o", line / "x")


def test_what_is_missing_or_wrong_is_named(line: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing -d TEXT, -o FOLDER"):
        dwindle(*command(line))
    with pytest.raises(RecipeError, match=r"missing -t TEACHER \(or --cache"):
        dwindle("distill", "-m", line / "student", "-d", line / "train.txt", "-o", line / "out")
    with pytest.raises(RecipeError, match="--plan needs -t"):
        dwindle("distill", "-m", line / "student", "--plan")
    words = command(line, "-d", line / "train.txt", "-o", line / "out")
    with pytest.raises(RecipeError, match="'jds' is not one of"):
        dwindle(*words, "--loss", "jds")
    with pytest.raises(RecipeError, match="precison is unknown"):
        dwindle(*words, "--set", "precison=bf16")
    with pytest.raises(RecipeError, match="--tokens gives it already"):
        dwindle(*words, "--tokens", "2K", "--set", "tokens=3K")
    with pytest.raises(DataError, match=r"train.*evaluation|evaluation.*train"):
        dwindle(*words, "--text", line / "train.txt")
    with pytest.raises(RecipeError, match=r"--set losses: --loss gives it already"):
        dwindle(*words, "--loss", "jsd", "--set", "losses=[jsd]")
    with pytest.raises(RecipeError, match=r"--set cache\.draws: --cache gives cache already"):
        dwindle(*words, "--cache", line / "cache", "--set", "cache.draws=16")
    with pytest.raises(RecipeError, match=r"--set cache\.draws: cache is 'C' already"):
        dwindle(*words, "--set", "cache=C", "--set", "cache.draws=16")
    with pytest.raises(RecipeError, match=r"distill\.cache\.drws is unknown"):
        dwindle(*words, "--set", "cache.folder=C", "--set", "cache.drws=16")
    assert not (line / "out").exists()


def test_what_a_plan_cannot_mean_is_named(line: Path) -> None:
    with pytest.raises(RecipeError, match=r"h100' is unknown \([^()]*\)\.$"):
        dwindle(*command(line, "--plan", "--gpu", "h100"))
    with pytest.raises(RecipeError, match=r"data\.context: 'long' is no number"):
        dwindle(*command(line, "--plan", "--set", "data.context=long"))
    with pytest.raises(RecipeError, match=r"data\.contxt is unknown"):
        dwindle(*command(line, "--plan", "--set", "data.contxt=32"))
    with pytest.raises(DataError, match=r"data\.context=2,000 is longer than the model's context of 64"):
        dwindle(*command(line, "--plan", "--set", "data.context=2k"))


def test_the_output_is_looked_at_before_anything_is_loaded(line: Path) -> None:
    (line / "mine").mkdir()
    (line / "mine" / "letter.txt").write_text("dear")
    words = ["distill", "-t", line / "no", "-m", line / "no", "-d", line / "train.txt", "-o"]
    with pytest.raises(OutputError, match=r"something else than a model \(letter\.txt\)"):
        dwindle(*words, line / "mine")
    with pytest.raises(OutputError, match=r"no name for an output"):
        dwindle(*words, ".")
    for more in (["--keep", "ffn=0.5"], ["--keep", "ffn=0.5", "--method", "soft_top_k"]):
        with pytest.raises(OutputError, match=r"something else than a model"):
            dwindle("prune", "-m", line / "no", "-o", line / "mine", *more)
