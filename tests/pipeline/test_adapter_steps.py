"""Recovery and task adapters as steps of a recipe: per variant, cached, reported, handed to the export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.errors import DataError, RecipeError
from dwindle.pipeline.plan import plan
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    made = []
    for name, sounds in (("animals", {"cat": "meow", "dog": "woof"}), ("things", {"bell": "ding", "door": "creak"})):
        rows = [{"prompt": f"{n} {what}", "sound": s} for n in range(16) for what, s in sounds.items()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append({"name": name, "data": [str(folder / f"{name}.jsonl")], "label": "sound"})
    return made


@pytest.fixture(scope="module")
def steps(tasks: list[dict[str, Any]]) -> list[Any]:
    return [
        {"quantize": {"two": {"scheme": "integer", "bits": 2, "group_size": 16}, "four": {"scheme": "integer"}}},
        {"recover": {"rank": 4, "steps": 6, "batch_size": 2, "learning_rate": 5e-3}},
        {"adapt": {"tasks": tasks, "epochs": 1, "batch_size": 8, "learning_rate": 1e-2}},
        {"export": {"formats": ["onnx"], "prompts": 1, "float_formats": ["onnx"]}},
    ]


@pytest.fixture(scope="module")
def adapter_run(recipe_of: Callable[..., Recipe], steps: list[Any], tmp_path_factory: pytest.TempPathFactory
                ) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("run") / "out"
    report = run(recipe_of(steps=steps), folder)
    assert report.exit_code == 0, report.failures
    return folder


def test_every_variant_has_its_own_adapters(adapter_run: Path) -> None:
    cards = {p.parent.relative_to(adapter_run / "steps").as_posix(): json.loads(p.read_text())
             for p in (adapter_run / "steps").rglob("adapter_card.json")}  # fmt: skip
    assert set(cards) == {
        "02-recover-two/recovery", "02-recover-four/recovery", "03-adapt-two-animals/animals",
        "03-adapt-two-things/things", "03-adapt-four-animals/animals", "03-adapt-four-things/things",
    }  # fmt: skip
    assert cards["03-adapt-two-animals/animals"]["started_from"] == cards["02-recover-two/recovery"]["sha256"]
    assert cards["03-adapt-two-animals/animals"]["base_sha256"] == cards["02-recover-two/recovery"]["base_sha256"]
    assert cards["02-recover-two/recovery"]["base_sha256"] != cards["02-recover-four/recovery"]["base_sha256"]


def test_the_report_tells_before_after_and_unquantized(adapter_run: Path) -> None:
    report = json.loads((adapter_run / "report.json").read_text())
    quantized, other, recovered, *_ = report["steps"]
    assert [(s["name"], s["variant"]) for s in report["steps"]] == [
        ("quantize", "two"), ("quantize", "four"), ("recover", "two"), ("recover", "four"),
        ("adapt", "two"), ("adapt", "two"), ("adapt", "four"), ("adapt", "four"),
    ]  # fmt: skip
    assert recovered["before"] == quantized["after"] != other["after"]
    assert recovered["after"]["kl_nats_per_token"] < recovered["before"]["kl_nats_per_token"]
    assert recovered["after"]["bits_per_weight"] > recovered["before"]["bits_per_weight"]
    assert recovered["details"]["unquantized"]["kl_nats_per_token"] == 0
    assert 0 < recovered["details"]["gap"]["kl_closed"] <= 1
    task = report["steps"][4]
    assert task["details"]["task"] == "animals"
    assert task["before"] == recovered["after"]
    assert task["details"]["metrics_after"]["general_kl"] > 0
    assert "label_accuracy" in task["details"]["metrics_before"]


def test_an_artifact_carries_the_adapters_of_its_variant(adapter_run: Path) -> None:
    report = json.loads((adapter_run / "report.json").read_text())
    artifact, plain = report["artifacts"]
    assert {one["name"] for one in artifact["details"]["adapters"]} == {"recovery", "animals", "things"}
    assert artifact["parity"]["passed"]
    assert "adapters" not in plain["details"]
    assert len(list((adapter_run / "export" / "onnx" / "adapters").glob("*/*.onnx_adapter"))) == 3


def test_a_second_run_trains_nothing_and_a_changed_task_only_itself(
    adapter_run: Path, recipe_of: Callable[..., Recipe], steps: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(adapter_run, folder)
    said: list[str] = []
    run(recipe_of(steps=steps), folder, notify=said.append)
    assert not [line for line in said if line.endswith("running")]
    changed = json.loads(json.dumps(steps))
    changed[2]["adapt"]["tasks"] = [changed[2]["adapt"]["tasks"][0], {**changed[2]["adapt"]["tasks"][1], "name": "new"}]
    said.clear()
    run(recipe_of(steps=changed), folder, notify=said.append)
    assert [line for line in said if line.endswith("running")] == [
        "adapt new (two): running", "adapt new (four): running", "export onnx: running",
    ]  # fmt: skip
    names = {p.name for p in (folder / "steps").iterdir()}
    assert "03-adapt-two-new" in names
    assert "03-adapt-two-things" not in names


def test_recipes_that_make_no_sense_are_refused(
    recipe_of: Callable[..., Recipe], steps: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="recover needs a quantize before it"):
        recipe_of(steps=[{"recover": {}}])
    with pytest.raises(RecipeError, match="recover after adapt makes no sense"):
        recipe_of(steps=[steps[0], steps[2], steps[1]])
    with pytest.raises(RecipeError, match=r"adapt\.tasks\[0\]\.promt is unknown \(did you mean 'prompt'\?\)"):
        recipe_of(steps=[{"adapt": {"tasks": [{"name": "a", "data": ["a.jsonl"], "promt": "p"}]}}])
    with pytest.raises(RecipeError, match="no tasks"):
        recipe_of(steps=[{"adapt": {}}])
    with pytest.raises(RecipeError, match="rank=0"):
        recipe_of("recover.rank=0", steps=steps)
    assert "   animals: 28 records, 4 held out" in plan(recipe_of(steps=steps))["lines"]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "", "completion": "x"}\n' * 3)
    wrong = [{"adapt": {"tasks": [{"name": "a", "data": [str(tmp_path / "bad.jsonl")]}]}}]
    said: list[str] = []
    with pytest.raises(DataError, match="3 with empty prompt"):
        plan(recipe_of(steps=wrong))
    with pytest.raises(DataError, match="3 with empty prompt"):
        run(recipe_of(steps=[steps[0], *wrong]), tmp_path / "out", notify=said.append)
    with pytest.raises(RecipeError, match=r"1 targets are no linears of this model: kv"):
        run(recipe_of("recover.targets=[kv]", steps=steps), tmp_path / "out", notify=said.append)
    assert not [line for line in said if line.endswith("running")]
