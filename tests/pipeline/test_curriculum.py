"""Stages of a curriculum: distill steps with text, mix and length of their own; and the corpus steps that need a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.pipeline.cli import main
from dwindle.pipeline.plan import plan
from dwindle.pipeline.recipe import Recipe
from dwindle.pipeline.runner import run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def curriculum(tmp_path: Path, longest: int = 48) -> Recipe:
    """Return the curriculum recipe on four small texts, its last stage with windows of `longest` tokens."""
    for name, word in (("core", "cat "), ("code", "x = "), ("math", "1 + 1 "), ("long", "then ")):
        (tmp_path / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{word}{i} " * 8 for i in range(60)))
    text = (RECIPES / "curriculum.yaml").read_text().replace(": 256", ": 16").replace(": 512", f": {longest}")
    for size in ("4M", "1M", "500k"):
        text = text.replace(f"tokens: {size}", "steps: 4, batch_size: 4")
    for name in ("core", "code", "math", "long"):
        text = text.replace(f"{name}.txt", str(tmp_path / f"{name}.txt"))
    (tmp_path / "recipe.yaml").write_text(
        text.replace("learn_weights_every: 50", "learn_weights_every: 2").replace("32768", "200")
    )
    settings = [
        f"teacher.model={tmp_path / 'teacher'}",
        f"data.train=[{tmp_path / 'core.txt'}]",
        "data.calibration_windows=8",
    ]
    return Recipe.load(tmp_path / "recipe.yaml", settings)


def test_three_stages_each_with_its_mix_and_length(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    run(curriculum(tmp_path), tmp_path / "out", notify=lambda _: None)
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    core, continued, lengthened = (step["details"] for step in steps if step["name"] == "distill")
    assert (core["tokens"], continued["tokens"], lengthened["tokens"]) == (4 * 4 * 17, 4 * 4 * 17, 4 * 4 * 49)
    assert "mixture" not in core
    assert [Path(place).stem for place in continued["mixture"]["places"]] == ["core", "code", "math"]
    assert [entry["step"] for entry in continued["mixture"]["history"]] == [2]


def test_a_stage_that_cannot_be_done_is_refused_before_the_first(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    recipe = curriculum(tmp_path, longest=96)
    (tmp_path / "math.txt").unlink()
    for attempt in (lambda: plan(recipe), lambda: run(recipe, tmp_path / "out", notify=lambda _: None)):
        with pytest.raises(RecipeError, match=r"steps\[2\].distill.data: .*math.txt: no such file") as caught:
            attempt()
        assert "steps[3].distill.data: context=96 is longer than the teacher's 64" in str(caught.value)
    assert not list(tmp_path.glob("out/steps/*"))


def test_a_stretched_teacher_lengthens_the_last_stage(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    place = tmp_path / "teacher" / "config.json"
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config = json.loads(place.read_text()) | {"max_position_embeddings": 128, "rope_scaling": scaling}
    place.write_text(json.dumps({key: value for key, value in config.items() if key != "rope_parameters"}))
    run(curriculum(tmp_path, longest=96), tmp_path / "out", notify=lambda _: None)
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert steps[-1]["details"]["tokens"] == 4 * 4 * 97
    student = ModelBundle.load(max((tmp_path / "out" / "steps").glob("*distill")) / "model").anatomy
    assert student.context == 128
    assert {rope.kind for rope in student.traits.ropes if rope is not None} == {"yarn"}


def test_a_corpus_is_scored_rebalanced_and_written_on_by_a_model(
    tiny_bundle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    tiny_bundle("llama", seed=1).save(tmp_path / "student")
    (tmp_path / "text.txt").write_text(
        "\n<|endoftext|>\n".join(f"The cat {i} sat {'on ' * (i % 5)}it." for i in range(60))
    )
    (tmp_path / "corpus.yaml").write_text(f"""
version: 1
name: small
sources: [{{name: cats, place: {tmp_path}/text.txt, licence: MIT}}]
steps:
  - teacher_score: {{teacher: {tmp_path}/teacher, loss: 5%..95%, student: {tmp_path}/student, kl: ..95%}}
  - rebalance: {{most: 8}}
  - synthesize: {{teacher: {tmp_path}/teacher, kinds: [continue], pieces: 8, piece_tokens: 40, least_tokens: 2}}
""")
    outputs = []
    for out in ("a", "b"):
        with pytest.raises(SystemExit) as end:
            main(["data", "build", str(tmp_path / "corpus.yaml"), "-o", str(tmp_path / out)])
        assert not end.value.code, capsys.readouterr().err
        outputs.append({p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*.jsonl.zst")})
    assert outputs[0] == outputs[1]
    stages = {stage["stage"]: stage for stage in json.loads((tmp_path / "a" / "card.json").read_text())["stages"]}
    scored = stages["teacher_score"]
    assert scored["documents_in"] == 60
    assert 0 < scored["documents_in"] - scored["documents_out"] == sum(scored["dropped"].values()) < 12
    assert {"loss_quantiles", "kl_quantiles", "loss_kept", "kl_kept"} <= set(scored["details"])
    assert stages["synthesize"]["changed"]["pieces added"] > 0
