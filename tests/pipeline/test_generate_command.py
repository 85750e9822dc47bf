"""`dwindle generate`: models and artifacts, adapters, the best of N, accuracy against N; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle import export
from dwindle.export import ExportOptions
from dwindle.pipeline.cli import main

CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[a]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Callable[..., Any], write_adapter: Any) -> Path:
    """A folder with a tiny model, an artifact with the adapter `a`, `b` that is trained only, `c` of another base."""
    folder = tmp_path_factory.mktemp("generate")
    bundle = tiny_bundle()
    bundle.save(folder / "model")
    for name, base, seed in (("a", bundle, 1), ("b", bundle, 2), ("c", tiny_bundle(seed=9), 3)):
        write_adapter(base, folder / name, seed=seed)
    options = ExportOptions(formats=("onnx",), decode_steps=2, prompts=1, longest_tokens=8)
    export.run(bundle, options, folder, adapters=[folder / "a"])
    export.run(bundle, options, folder / "bare")
    (folder / "task.jsonl").write_text("".join(
        json.dumps({"prompt": text, "answer": answer}) + "\n" for text, answer in (("cat", "x"), ("dog", ""))))  # fmt: skip
    (folder / "bad.jsonl").write_text('{"prompt": "cat"}\n{"text": "dog"}\nnothing\n')
    (folder / "judge.py").write_text("import json, sys\nsys.exit(len(json.load(sys.stdin)['answer']) % 2)\n")
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["generate", *map(str, words)])
    out = capsys.readouterr()
    return int(str(end.value.code or 0)), out.out, out.err


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    code, out, err = told(capsys, *words, "--json", "--max-tokens", "6")
    assert code == 0, err
    return str(json.loads(out)["answers"][0]["answer"])


def test_model_and_artifact_say_the_same_with_and_without_adapters(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for adapter in (None, "a", "b"):
        extra = () if adapter is None else ("--adapter", place / adapter)
        found[adapter] = answer(capsys, "-m", place / "model", "cat", *extra)
        assert answer(capsys, "-m", place / "onnx", "cat", *extra) == found[adapter]
    assert answer(capsys, "-m", place / "onnx", "cat", "--adapter", "a") == found["a"]
    assert len(set(found.values())) == 3
    code, out, _ = told(capsys, "-m", place / "onnx", "cat", "--max-tokens", "6")
    assert (code, out) == (0, found[None] + "\n")


def test_the_best_of_several(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, "-m", place / "onnx", "cat", "--best-of", "5", "--max-tokens", "5", "--json",
                          "--checker", f"script:{place / 'judge.py'}")  # fmt: skip
    assert code == 0, err
    (asked,) = json.loads(out)["answers"]
    assert len(asked["candidates"]) == 5
    passing = [one for one in asked["candidates"] if one["passed"]] or asked["candidates"]
    assert asked["candidates"][asked["picked"]] == max(passing, key=lambda one: one["mean_log_probability"])
    code, out, err = told(capsys, "-m", place / "onnx", "cat", "--best-of", "3", "--max-tokens", "5", "--json",
                          "--verifier", "reward:b")  # fmt: skip
    assert code == 2
    assert "no folder, and none of the artifact's own" in err
    code, out, err = told(capsys, "-m", place / "onnx", "cat", "--best-of", "3", "--max-tokens", "5", "--json",
                          "--verifier", f"reward:{place / 'b'}", "--adapter", "a")  # fmt: skip
    assert code == 0, err
    (asked,) = json.loads(out)["answers"]
    rewards = [one["reward"] for one in asked["candidates"]]
    assert asked["picked"] == rewards.index(max(rewards))
    assert json.loads(out)["curve"][-1]["verifier_tokens"] == 2 * json.loads(out)["curve"][-1]["tokens"]


def test_a_task_is_told_as_accuracy_against_n(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", place / "model", "--task", place / "task.jsonl", "--checker", f"script:{place / 'judge.py'}",
             "--best-of", "4", "--max-tokens", "4")  # fmt: skip
    code, out, err = told(capsys, *words, "--json")
    assert code == 0, err
    rows = json.loads(out)["curve"]
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows), "a checker never gets worse"
    assert rows[-1]["accuracy"] == rows[-1]["solved"]
    assert rows[-1]["tokens"] <= 16
    code, out, _ = told(capsys, *words)
    assert code == 0
    assert "accuracy" in out
    assert "2 prompts" in out


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no prompt": ((), "give a PROMPT or --task FILE"),
    "both": (("cat", "--task", "{place}/task.jsonl"), "give a PROMPT or --task FILE"),
    "no answers": (("cat", "--best-of", "0"), "best_of=0 (needed: at least 1)"),
    "greedy copies": (("cat", "--best-of", "2", "--temperature", "0"), "makes equal answers"),
    "unknown checker": (("cat", "--checker", "exat"), "did you mean 'exact'"),
    "unknown verifier": (("cat", "--verifier", "chekcer"), "did you mean 'checker'"),
    "no checker": (("cat", "--verifier", "checker"), "none was named"),
    "unknown adapter": (("cat", "--adapter", "aa"), "did you mean 'a'"),
    "another base": (("cat", "--adapter", "{place}/c"), "trained on tiny"),
    "no adapter": (("cat", "--adapter", "{place}"), "no adapter_card.json"),
    "bad records": (("--task", "{place}/bad.jsonl"), "2 of 3 records have no text under 'prompt'"),
    "no template": (("cat", "--template", "chat"), "no chat template"),
    "bad sampling": (("cat", "--top-p", "2"), "top_p=2"),
    "a device for an artifact": (("cat", "--torch-device", "cuda"), "which its own runtime executes"),
    "too long": (("x" * 80,), "fit into the context of 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_2(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = REFUSED[case]
    code, _, err = told(capsys, "-m", place / "onnx", *(word.format(place=place) for word in words))
    assert wanted in err
    assert code == 2


def test_an_artifact_that_is_not_ready_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = told(capsys, "-m", place / "bare" / "onnx", "cat", "--adapter", place / "a")
    assert code == 2
    assert "not ready for adapters" in err


def test_an_artifacts_tokenizer_of_a_newer_transformers_loads(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(place / "bare" / "onnx", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": ["<pad>"]}))
    assert answer(capsys, "-m", folder, "cat") == answer(capsys, "-m", place / "bare" / "onnx", "cat")
