"""`dwindle recover` and `dwindle adapters` on a tiny model, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dwindle.pipeline.cli import cli
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
WORDS = "The cat sat on the mat. A dog ran to the tree, and the bird sang over it all day long.\n\n"


@pytest.fixture
def line(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Path:
    teacher = tiny_bundle("llama", initializer_range=0.2)
    teacher.save(tmp_path / "teacher")
    quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0].save(tmp_path / "packed")
    (tmp_path / "train.txt").write_text(WORDS * 60)
    (tmp_path / "test.txt").write_text("The bird sat on the tree and ran over the cat all day. " * 8)
    return tmp_path


def dwindle(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def test_recover_writes_an_adapter_that_the_catalogue_shows(line: Path) -> None:
    done = dwindle("recover", "-t", line / "teacher", "-m", line / "packed", "-d", line / "train.txt", "-o",
                   line / "all" / "recovery", "--rank", 4, "--tokens", "4K", "--batch-size", 2, "--learning-rate",
                   "0.01", "--text", line / "test.txt", "--json")  # fmt: skip
    record = json.loads(done.stdout)
    assert record["name"] == "recover"
    assert record["after"]["kl_nats_per_token"] < record["before"]["kl_nats_per_token"]
    assert not list(line.glob("all/.*"))
    listed = json.loads(dwindle("adapters", "list", line / "all", "-m", line / "packed", "--json").stdout)["adapters"]
    assert [(one["name"], one["task"], one["rank"], one["fits"]) for one in listed] == [
        ("recovery", "recovery", 4, True)
    ]
    assert listed[0]["metrics"]["kl_closed"] > 0
    shown = dwindle("adapters", "show", line / "all" / "recovery").stdout
    assert "recovery" in shown
    assert listed[0]["base_sha256"] in shown


def test_nonsense_is_refused(line: Path) -> None:
    from dwindle.errors import OutputError, RecipeError

    words = ["recover", "-t", line / "teacher", "-d", line / "train.txt", "-o", line / "a"]
    with pytest.raises(RecipeError, match="the model is not quantized"):
        dwindle(*words, "-m", line / "teacher")
    with pytest.raises(RecipeError, match=r"upp \(nearest: up"):
        dwindle(*words, "-m", line / "packed", "--target", "upp")
    with pytest.raises(RecipeError, match="rank"):
        dwindle(*words, "-m", line / "packed", "--rank", "many")
    with pytest.raises(OutputError, match=r"packed holds something else than an adapter"):
        dwindle("recover", "-t", line / "no", "-m", line / "no", "-d", line / "train.txt", "-o", line / "packed")
    assert not (line / "a").exists()


def records(folder: Path) -> Path:
    place = folder / "sounds.jsonl"
    rows = [{"question": f"{n}: a {a} says", "answer": s, "worse": s[::-1]}
            for n in range(20) for a, s in (("cat", "meow"), ("dog", "woof"))]  # fmt: skip
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_adapt_trains_from_a_recovery_adapter_and_says_what_the_base_lost(line: Path) -> None:
    place = records(line)
    dwindle("recover", "-t", line / "teacher", "-m", line / "packed", "-d", line / "train.txt", "-o", line / "all" / "r",
            "--rank", 4, "--tokens", "1K", "--batch-size", 2)  # fmt: skip
    words = ["adapt", "-m", line / "packed", "-d", place, "--prompt", "{question}", "--from", line / "all" / "r"]
    done = dwindle(*words, "-o", line / "all" / "sounds", "--completion", "answer", "--epochs", 4, "--learning-rate",
                   "0.01", "--general", line / "train.txt", "--text", line / "test.txt", "--json",
                   "--set", "batch_size=8", "--set", "task.held_out_share=0.2")  # fmt: skip
    record = json.loads(done.stdout)
    assert record["name"] == "adapt"
    told = record["details"]
    assert (told["task"], told["objective"], told["started_from"]) == ("sounds", "sft", "recovery")
    assert told["held_out"] == 8
    assert told["replayed_windows"] >= 1
    assert told["metrics_after"]["general_kl"] > 0
    assert record["before"]["kl_nats_per_token"] == 0
    done = dwindle(*words, "-o", line / "all" / "polite", "--chosen", "answer", "--rejected", "worse", "--epochs", 1)
    assert "adapt: polite, dpo" in done.stdout
    assert "win_rate" in done.stdout
    assert not list(line.glob("all/.*"))
    listed = json.loads(dwindle("adapters", "list", line / "all", "--json").stdout)["adapters"]
    assert [one["task"] for one in listed] == ["polite", "recovery", "sounds"]
    assert "0.01" not in str(listed[0]["options"]["learning_rate"])


@pytest.mark.parametrize(("flags", "key"), [
    (["--set", "task.chosen=answer", "--set", "task.rejected=worse"], "dpo_learning_rate"),
    (["--chosen", "answer", "--rejected", "worse"], "dpo_learning_rate"),
    (["--chosen", "answer", "--rejected", "worse", "--objective", "sft"], "learning_rate"),
    (["--completion", "answer"], "learning_rate"),
])  # fmt: skip
def test_the_learning_rate_is_that_of_the_objective(line: Path, flags: list[str], key: str) -> None:
    done = dwindle("adapt", "-m", line / "packed", "-d", records(line), "-o", line / "one", "--prompt", "question",
                   "--rank", 2, "--learning-rate", "0.00123", "--set", "steps=1", *flags)  # fmt: skip
    assert done.exit_code == 0
    assert json.loads((line / "one" / "adapter_card.json").read_text())["options"][key] == 0.00123


def test_adapt_refuses_nonsense(line: Path) -> None:
    from dwindle.errors import DataError, OutputError, RecipeError, UnsupportedModel

    words = ["adapt", "-m", line / "packed", "-d", records(line), "-o", line / "a"]
    with pytest.raises(DataError, match=r"completion: no column 'completion'.*The columns are question, answer, worse"):
        dwindle(*words, "--prompt", "question")
    with pytest.raises(RecipeError, match="chosen and rejected go together"):
        dwindle(*words, "--chosen", "answer")
    with pytest.raises(RecipeError, match=r"adapt\.rnk is unknown"):
        dwindle(*words, "--set", "rnk=4")
    with pytest.raises(RecipeError, match=r"--set task\.prompt: --prompt gives it already"):
        dwindle(*words, "--prompt", "question", "--set", "task.prompt=answer")
    with pytest.raises(UnsupportedModel, match="it is no adapter folder"):
        dwindle(*words, "--prompt", "question", "--completion", "answer", "--from", line / "packed")
    with pytest.raises(OutputError, match=r"packed holds something else than an adapter"):
        dwindle("adapt", "-m", line / "no", "-d", records(line), "-o", line / "packed", "--prompt", "question",
                "--completion", "answer")  # fmt: skip
    assert not (line / "a").exists()


def test_adapters_are_compared_and_merged(line: Path) -> None:
    from dwindle.errors import DataError, RecipeError

    place = records(line)
    for name, rank in (("one", 2), ("two", 4)):
        dwindle("adapt", "-m", line / "packed", "-d", place, "--prompt", "question", "--completion", "answer",
                "-o", line / "all" / name, "--rank", rank, "--epochs", 1)  # fmt: skip
    table = dwindle("adapters", "compare", line / "all", "-m", line / "packed").stdout
    assert table.partition("kind, rank")[2].partition("\n")[0].split() == ["lora", "2", "lora", "4"]
    found = json.loads(dwindle("adapters", "compare", line / "all" / "one", line / "all" / "two", "--json").stdout)
    assert [one["same_base"] for one in found["adapters"]] == [["two"], ["one"]]
    with pytest.raises(DataError, match="at least two are needed"):
        dwindle("adapters", "compare", line / "all" / "one")
    words = ["adapters", "merge", line / "all" / "two", "-o", line / "merged"]
    with pytest.raises(RecipeError, match="--requantize"):
        dwindle(*words, "-m", line / "packed")
    with pytest.raises(RecipeError, match="fits the very weights"):
        dwindle(*words, "-m", line / "teacher")
    done = dwindle(*words, "-m", line / "packed", "--requantize", "--text", line / "test.txt")
    assert "rounded again to their formats" in done.stdout
    assert "KL(base plus adapter || merged)" in done.stdout
    assert (line / "merged" / "model.safetensors").is_file()


def test_a_teachers_traces_become_data_to_adapt_on(line: Path) -> None:
    from dwindle.errors import GateFailed, OutputError, RecipeError

    words = ["adapters", "traces", "-t", line / "teacher", "-d", records(line), "-o", line / "traces.jsonl", "--prompt",
             "question", "--completion", "answer", "--set", "answer_tokens=3", "--samples", 2]  # fmt: skip
    told = json.loads(dwindle(*words, "--checker", "regex:[a-z]", "--json").stdout)
    rows = [json.loads(row) for row in (line / "traces.jsonl").read_text().splitlines()]
    assert told["solved"] == len(rows) > 0
    assert all(row["trace"].endswith(row["completion"]) for row in rows)
    with pytest.raises(OutputError, match="is a folder"):
        dwindle("adapters", "traces", "-t", line / "none", "-d", line / "none.jsonl", "-o", line)
    done = dwindle("adapt", "-m", line / "packed", "-d", line / "traces.jsonl", "-o", line / "a", "--epochs", 1,
                   "--set", "task.traces=trace", "--json")  # fmt: skip
    assert json.loads(done.stdout)["details"]["records"] > len(rows)
    with pytest.raises(GateFailed, match="no attempt at 40 records passed exact"):
        dwindle(*words, "--checker", "exact")
    with pytest.raises(RecipeError, match="samples=0"):
        dwindle(*words, "--samples", 0)


def test_what_is_trained_on_is_not_measured_on(line: Path) -> None:
    from dwindle.errors import DataError

    with pytest.raises(DataError, match="documents stand in two roles"):
        dwindle("recover", "-t", line / "teacher", "-m", line / "packed", "-d", line / "train.txt", "-o", line / "a",
                "--text", line / "train.txt")  # fmt: skip


def test_the_learning_rate_reaches_the_objective_that_the_records_ask_for() -> None:
    from dwindle.pipeline.commands.adapt import _options

    flags = dict.fromkeys(("objective", "prompt", "completion", "label", "chosen", "rejected", "epochs", "rank"))
    given = {**flags, "data": ("a.json",), "held_out": (), "seed": 0, "learning_rate": "1e-2"}
    pairs = ("task.chosen=good", "task.rejected=bad")
    assert _options("out", pairs, given)[0].dpo_learning_rate == 0.01
    assert _options("out", (*pairs, "objective=sft"), given)[0].learning_rate == 0.01
    assert _options("out", (), given)[0].learning_rate == 0.01
