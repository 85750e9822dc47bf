"""A recipe that cuts the vocabulary: the steps after it work in the new tokens, the teacher stays the full one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, build_token_sets
from dwindle.pipeline.cli import main
from dwindle.pipeline.evaluate import evaluate
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run
from dwindle.report import Report

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "and",
    "dog",
    "ran",
    "to",
    "town",
    "then",
    "a",
    "in",
    "of",
    "is",
    "was",
    "his",
    "her",
    "house",
    "tree",
    "bird",
]
RARE = ["sing", "song", "long", "way"]


def text(paragraphs: int, seed: int, words: list[str]) -> str:
    import random

    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(paragraphs)) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, worded: Callable[..., Any]) -> Path:
    """A folder with a teacher of 352 tokens, a training text of most of its words, and one with all of them."""
    folder = tmp_path_factory.mktemp("words")
    worded(intermediate_size=64).save(folder / "teacher")
    (folder / "train.txt").write_text(text(40, 1, WORDS))
    (folder / "valid.txt").write_text(text(4, 2, WORDS + RARE))
    return folder


def recipe_of(place: Path, **data: Any) -> Recipe:
    return Recipe.parse({
        "version": 1,
        "teacher": {"model": str(place / "teacher")},
        "data": {"train": [str(place / "train.txt")], "evaluation": str(place / "valid.txt"), "calibration_windows": 8,
                 **data},
        "steps": [
            {"prune": {"vocabulary_keep": 0.9, "ffn_keep": 0.5}},
            {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 4096, "batch_size": 4}},
            {"quantize": {"scheme": "integer"}},
            {"export": {"formats": ["onnx"], "prompts": 1}},
        ],
    })  # fmt: skip


@pytest.fixture(scope="module")
def line(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("line") / "out"
    return folder, run(recipe_of(place), folder)


def test_the_report_tells_the_vocabulary(line: tuple[Path, Report]) -> None:
    folder, report = line
    assert report.exit_code == 0, report.failures
    prune, distill, quantize = report.steps
    assert prune.details["vocabulary"][0] == 352
    assert prune.details["vocabulary"][1] <= 320
    assert prune.details["vocabulary_coverage"] == 1
    assert prune.after.parameters == prune.details["plan"]["parameters_after"]
    assert distill.after.kl_nats_per_token < prune.after.kl_nats_per_token
    assert quantize.after.bytes < distill.after.bytes
    assert any("nats/token across prune" in line.what and "bits/byte compare" in line.why for line in report.skipped)
    comparable = quantize.after.bits_per_byte / prune.before.bits_per_byte * prune.before.nats_per_token
    assert f"{comparable:.3f} nats/token" in (folder / "report.html").read_text()
    for step in ("01-prune", "02-distill", "03-quantize"):
        bundle = ModelBundle.load(folder / "steps" / step / "model")
        assert bundle.vocabulary_map is not None
        assert bundle.vocabulary_map.vocabulary == 352
        assert len(bundle.tokenizer) <= bundle.anatomy.vocab == prune.details["vocabulary"][1]


def test_evaluate_gives_the_numbers_again(line: tuple[Path, Report], place: Path) -> None:
    folder, report = line
    reference = str(place / "teacher")
    for step, name in zip(report.steps, ("01-prune", "02-distill", "03-quantize"), strict=True):
        again = evaluate(folder / "steps" / name / "model", place / "valid.txt", reference=reference)
        assert again.to_json() == step.after.to_json()
    artifact = evaluate(folder / "export" / "onnx", place / "valid.txt", reference=reference)
    assert artifact.kl_nats_per_token == pytest.approx(report.steps[2].after.kl_nats_per_token, abs=1e-4)
    assert artifact.bits_per_byte == pytest.approx(report.steps[2].after.bits_per_byte, abs=1e-4)


def test_a_second_run_takes_all_over_and_a_change_redoes_it(
    line: tuple[Path, Report], place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(line[0], folder)
    told_before, said = json.loads((folder / "report.json").read_text()), list[str]()
    run(recipe_of(place), folder, notify=said.append)
    assert json.loads((folder / "report.json").read_text())["steps"] == told_before["steps"]
    assert not [told for told in said if told.endswith("running") or "again" in told]
    shorter = recipe_of(place, evaluation_tokens=200)
    run(shorter, folder, notify=said.append)
    assert [told for told in said if told.startswith("data: tokenising and packing again")]
    before, after = (json.loads((folder / "report.json").read_text())["steps"][0][key] for key in ("before", "after"))
    assert before["bits_per_byte"] is not None
    again = evaluate(folder / "steps" / "01-prune" / "model", place / "valid.txt", reference=str(place / "teacher"),
                     max_tokens=200)  # fmt: skip
    assert again.to_json() == after


def test_the_roles_keep_their_documents(place: Path, worded: Callable[..., Any]) -> None:
    """A tokenizer that needs more tokens for the same text draws the same calibration documents."""
    from dwindle.prune import VocabularyOptions, cut_vocabulary, plan_vocabulary

    (place / "many.jsonl").write_text(
        "".join(json.dumps({"text": text(1, seed, WORDS + RARE)}) + "\n" for seed in range(40))
    )
    full = worded()
    pruned = cut_vocabulary(full, plan_vocabulary(full, "the cat", VocabularyOptions(multiple=1)))
    options = DataOptions(train=(str(place / "many.jsonl"),), calibration_windows=8, evaluation_tokens=50)
    whole = build_token_sets(options, full.tokenizer, 32)
    same = build_token_sets(options, pruned.tokenizer, 32, counted_by=full.tokenizer)
    other = build_token_sets(options, pruned.tokenizer, 32)
    for role in ("train", "calibration", "evaluation"):
        assert getattr(same, role).document_sha256 == getattr(whole, role).document_sha256
    assert other.calibration.document_sha256 != whole.calibration.document_sha256
    assert same.evaluation.text_bytes == whole.evaluation.text_bytes > other.evaluation.text_bytes
    assert same.evaluation.tokens > whole.evaluation.tokens == 50


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


def test_the_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    """prune with a plan, distill from the full teacher, evaluate against it."""
    teacher, train = place / "teacher", place / "train.txt"
    words = ["prune", "-m", teacher, "-d", train, "--keep", "vocabulary=0.9", "--keep", "ffn=0.5"]
    code, out, err = invoke(capsys, *words, "-o", tmp_path / "none", "--dry-run")
    assert code == 0
    assert "vocabulary 352 -> " in err
    (tmp_path / "plan.json").write_text(out)
    assert invoke(capsys, *words, "-o", tmp_path / "a")[0] == 0
    planned = ["prune", "-m", teacher, "-d", train, "--plan", tmp_path / "plan.json", "-o", tmp_path / "b"]
    assert invoke(capsys, *planned)[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "vocabulary_map.json").exists()
    code, out, _ = invoke(capsys, "prune", "-m", teacher, "-d", train, "--vocabulary-size", "300", "-o", tmp_path / "c",
                          "--json")  # fmt: skip
    assert json.loads(out)["details"]["vocabulary"] == [352, 320]
    code, out, _ = invoke(capsys, "distill", "-t", teacher, "-m", tmp_path / "a", "-d", train, "-o", tmp_path / "d",
                          "--tokens", "2k", "--batch-size", "4")  # fmt: skip
    assert code == 0
    kl = []
    for model in ("a", "d"):
        code, out, _ = invoke(capsys, "evaluate", "-m", tmp_path / model, "--text", place / "valid.txt", "--reference",
                              teacher, "--json")  # fmt: skip
        assert code == 0
        kl.append(json.loads(out)["kl_nats_per_token"])
    assert kl[1] < kl[0]
    monkeypatch.setattr("dwindle.weight_source.STREAMED_PARAMETERS", 0)
    for command, options in (("quantize", ("--scheme", "integer")), ("prune", ("--keep", "heads=0.5"))):  # on the disk
        made = invoke(capsys, command, "-m", tmp_path / "d", "-o", tmp_path / command, *options, "-d", train)
        assert made[0] == 0
        assert ModelBundle.load(tmp_path / command).vocabulary_map == ModelBundle.load(tmp_path / "d").vocabulary_map
    code, _, err = invoke(capsys, *planned, "--vocabulary-size", "300")
    assert code == 2
    assert "either --keep" in err
    code, _, err = invoke(capsys, "prune", "-m", teacher, "--keep", "vocabulary=0.5", "-o", tmp_path / "e")
    assert code == 2
    assert "calibration or training data" in err
    code, _, err = invoke(capsys, *words[:5], "--keep", "vocabulary=0.5", "-o", tmp_path / "e")
    assert code == 2
    assert "smallest reachable size is 288" in err
    (tmp_path / "d" / "vocabulary_map.json").unlink()
    code, _, err = invoke(capsys, "evaluate", "-m", tmp_path / "d", "--text", train, "--reference", teacher)
    assert code == 2
    assert "nothing says which token" in err
