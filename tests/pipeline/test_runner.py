"""The whole line on a tiny model: what it writes, what it takes over, what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.errors import OutputError, RecipeError, UnsupportedModel
from dwindle.pipeline.evaluate import evaluate
from dwindle.pipeline.plan import plan
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run
from dwindle.pipeline.write_reports import read_report
from dwindle.storage import hash_folder


def report_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return data


def test_the_run_folder_is_complete(small_run: Path) -> None:
    names = {p.name for p in small_run.iterdir() if not p.name.startswith(".")}
    written = {"recipe.yaml", "report.json", "report.html", "run.jsonl", "README.md", "steps", "export"}
    assert names == written | {"measurements"}  # of this host, which the recipe validates on
    assert {p.name for p in (small_run / "steps").iterdir() if (p / "model").exists()} == {
        "01-prune", "02-distill", "03-quantize-apple", "03-quantize-onnx",
    }  # fmt: skip
    assert sorted(p.relative_to(small_run).as_posix() for p in small_run.glob("export/*")) == [
        "export/coreml", "export/float", "export/onnx",
    ]  # fmt: skip
    assert not list(small_run.rglob("*.partial"))
    events = [json.loads(line)["event"] for line in (small_run / "run.jsonl").read_text().splitlines()]
    assert events[0] == "start"
    assert events[-1] == "end"


def test_the_report_tells_the_line(small_run: Path) -> None:
    report = report_of(small_run)
    assert report["exit_code"] == 0
    assert [(s["name"], s["variant"]) for s in report["steps"]] == [
        ("prune", None), ("distill", None), ("quantize", "apple"), ("quantize", "onnx"),
    ]  # fmt: skip
    prune, distill, apple, onnx = report["steps"]
    assert prune["before"]["kl_nats_per_token"] == 0
    assert prune["before"]["top1_agreement"] == 1
    assert prune["after"]["parameters"] < prune["before"]["parameters"]
    assert distill["after"]["kl_nats_per_token"] < prune["after"]["kl_nats_per_token"]
    assert apple["before"] == onnx["before"] == distill["after"]
    assert 4 < apple["after"]["bits_per_weight_linear"] < onnx["after"]["bits_per_weight_linear"] < 5
    assert {(a["format"], a["variant"]) for a in report["artifacts"]} == {
        ("onnx", "onnx"), ("coreml", "apple"), ("onnx", "float"),
    }  # fmt: skip
    assert all(a["parity"]["passed"] and a["parity"]["tokens_checked"] >= 32 for a in report["artifacts"])
    bases = {
        (t["profile"], m["basis"]) for t in report["targets"] for m in t["metrics"] if m["name"] == "tokens_per_second"
    }
    assert ("host", "measured") in bases
    assert ("iphone-15-pro", "estimated") in bases


def test_evaluate_gives_the_reports_numbers_again(small_run: Path, workshop: Path) -> None:
    for step, place in ((1, "02-distill"), (2, "03-quantize-apple"), (3, "03-quantize-onnx")):
        told = report_of(small_run)["steps"][step]["after"]
        again = evaluate(
            small_run / "steps" / place / "model", workshop / "valid.txt", reference=str(workshop / "teacher")
        )
        assert again.to_json() == told


def test_an_artifact_can_be_evaluated(small_run: Path, workshop: Path) -> None:
    told = report_of(small_run)["steps"][3]["after"]
    found = evaluate(small_run / "export" / "onnx", workshop / "valid.txt", reference=str(workshop / "teacher"))
    assert found.nats_per_token == pytest.approx(told["nats_per_token"], abs=1e-4)
    assert found.kl_nats_per_token == pytest.approx(told["kl_nats_per_token"], abs=1e-4)
    assert found.parameters == told["parameters"]


def test_a_second_run_takes_everything_over(small_run: Path, recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    before = report_of(folder)
    said: list[str] = []
    run(recipe_of(), folder, notify=said.append)
    assert report_of(folder)["steps"] == before["steps"]
    assert report_of(folder)["artifacts"] == before["artifacts"]
    assert not [line for line in said if line.endswith("running")]


def test_a_changed_option_redoes_only_what_follows(
    small_run: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    said: list[str] = []
    run(recipe_of("quantize.onnx.symmetric=false"), folder, notify=said.append)
    assert [line for line in said if line.endswith("running")] == ["quantize (onnx): running", "export onnx: running"]


def test_what_an_earlier_recipe_left_is_gone_and_other_files_stay(
    small_run: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    (folder / "steps" / ".DS_Store").touch()
    whole = recipe_of().raw["steps"]
    said: list[str] = []
    run(recipe_of(steps=[*whole[:2], {"quantize": {"onnx": {"scheme": "integer"}}}]), folder, notify=said.append)
    assert [line for line in said if line.endswith("running")] == []
    assert {path.name for path in (folder / "steps").iterdir()} == {
        ".DS_Store", "00-teacher", "00-samples", "01-prune", "02-distill", "03-quantize-onnx"}  # fmt: skip


def test_a_killed_run_goes_on_and_ends_equal(small_run: Path, workshop: Path, tmp_path: Path) -> None:
    """SIGKILL while training; the next run ends with the same bytes as an undisturbed one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((small_run / "recipe.yaml").read_text())
    folder = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "dwindle.pipeline.cli", "run", str(recipe), "-o", str(folder)]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob(".work/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(folder.glob(".work/*")), "training never started"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (folder / "report.json").exists()
    run(Recipe.load(recipe), folder)
    for place in ("01-prune", "02-distill", "03-quantize-apple", "03-quantize-onnx"):
        assert hash_folder(folder / "steps" / place / "model") == hash_folder(small_run / "steps" / place / "model")
    assert read_report(folder).steps[1].after == read_report(small_run).steps[1].after


def test_a_missed_budget_fails_the_run_and_says_which(
    small_run: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_run, folder)
    report = run(recipe_of("validate.budgets=[tokens_per_second >= 1e9]", "validate.targets=[iphone-15-pro]"), folder)
    assert report.exit_code == 1
    assert "iphone-15-pro tokens_per_second" in report.failures[0]
    assert report_of(folder)["exit_code"] == 1


def test_a_format_that_no_variant_fits_is_refused_before_any_work(
    recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    steps = [{"quantize": {"scheme": "palettize"}}, {"export": {"formats": ["onnx"]}}]
    with pytest.raises(RecipeError, match="no variant fits onnx"):
        run(recipe_of(steps=steps), tmp_path / "out")
    assert not list((tmp_path / "out").glob("steps/*"))


def test_a_teacher_with_experts_is_refused_before_any_work_or_distilled(
    recipe_of: Callable[..., Recipe], tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_bundle("mixtral").save(tmp_path / "mixture")
    given = f"teacher.model={tmp_path / 'mixture'}"
    for act in (plan, lambda recipe: run(recipe, tmp_path / "out")):
        with pytest.raises(UnsupportedModel, match="quantize: mixtral has mixtures of 6 experts"):
            act(recipe_of(given))
    assert not list((tmp_path / "out").glob("steps/*"))
    distill = {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 512, "batch_size": 4}}
    recipe = recipe_of(given, steps=[{"prune": {"experts_keep": 0.5}}, distill])
    assert "6 experts of 64 units" in plan(recipe)["lines"][0]
    steps = run(recipe, tmp_path / "small").steps
    assert [step.name for step in steps] == ["prune", "distill"]
    assert steps[0].after.parameters < steps[0].before.parameters


def test_an_output_of_another_teacher_is_refused(small_run: Path, recipe_of: Callable[..., Recipe]) -> None:
    before = hash_folder(small_run)
    with pytest.raises(OutputError, match="holds another run"):
        run(recipe_of("teacher.model=elsewhere"), small_run)
    assert hash_folder(small_run) == before


def test_a_distillation_that_makes_it_worse_is_told(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    ruined = {"distill": {"losses": ["label_cross_entropy"], "tokens": 2048, "batch_size": 4, "learning_rate": 0.3}}
    report = run(recipe_of(steps=[{"prune": {"ffn_keep": 0.75}}, ruined]), tmp_path / "out")
    assert report.steps[1].after.kl_nats_per_token > report.steps[0].after.kl_nats_per_token
    assert any("an improvement by distill" in line.what and "KL" in line.why for line in report.skipped)


def test_a_line_learns_from_two_teachers(
    recipe_of: Callable[..., Recipe], workshop: Path, tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    """A change in the second teacher's weights, too, makes the step anew."""
    second = tmp_path / "second"
    steps = [{"distill": {"steps": 2, "batch_size": 4, "other_teachers": [{"model": str(second), "share": 0.3}]}}]
    said: list[str] = []
    for seed in (1, 1, 2):
        tiny_bundle("llama", seed=seed).save(second)
        run(recipe_of(steps=steps), tmp_path / "out", notify=said.append)
    began = [line for line in said if line.startswith("distill: ") and line.endswith(("running", "taken over"))]
    assert began == ["distill: running", "distill: unchanged, taken over", "distill: running"]
    assert (tmp_path / "out" / "steps" / "01-distill" / "model").is_dir()


def test_a_measurement_of_another_machine_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwindle.devices import kept
    from dwindle.pipeline.step_keys import profile_sha256

    here, phone = profile_sha256("host"), profile_sha256("pixel-9")
    assert here == profile_sha256("host")
    other = {**kept.machine(), "cpu": "another processor"}
    monkeypatch.setattr(kept, "machine", lambda: other)
    assert profile_sha256("host") != here
    assert profile_sha256("pixel-9") == phone
