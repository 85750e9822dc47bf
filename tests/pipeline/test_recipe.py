"""Recipes: parsing, overrides, order, and every mistake named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.pipeline.recipe import Recipe, parse_overrides

ROOT = Path(__file__).resolve().parents[2]


def raw(**changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "version": 1,
        "teacher": {"model": "teacher"},
        "data": {"train": ["a.txt"]},
        "steps": [
            {"prune": {"ffn_keep": 0.5}},
            {"distill": {"losses": [{"name": "forward_kl"}], "tokens": "20M"}},
            {"quantize": {"apple": {"scheme": "palettize"}, "onnx": {"scheme": "integer"}}},
            {"export": {"formats": ["onnx", "coreml"]}},
            {"validate": {"targets": ["iphone-15-pro"]}},
        ],
    }
    return recipe | changes


def _adapt(*tasks: str) -> dict[str, Any]:
    return {"adapt": {"tasks": [{"name": name, "data": "a.json"} for name in tasks]}}


_QUANTIZE = {"quantize": {"a": {"scheme": "integer"}, "a-b": {"scheme": "palettize"}}}


def test_a_recipe_becomes_options() -> None:
    recipe = Recipe.parse(raw())
    assert [s.name for s in recipe.steps] == ["prune", "distill", "quantize", "export", "validate"]
    assert recipe.options[0, None].ffn_keep == 0.5
    assert recipe.options[1, None].tokens == 20_000_000
    assert recipe.options[2, "apple"].scheme == "palettize"
    assert recipe.options[2, "onnx"].scheme == "integer"
    assert recipe.data.train == ("a.txt",)


def test_overrides_reach_every_section() -> None:
    recipe = Recipe.parse(
        raw(),
        ["teacher.model=other", "data.train=[b.txt, c.txt]", "prune.ffn_keep=0.25", "quantize.apple.bits=2", "seed=7"],
    )
    assert recipe.teacher == "other"
    assert recipe.data.train == ("b.txt", "c.txt")
    assert recipe.options[0, None].ffn_keep == 0.25
    assert recipe.options[2, "apple"].bits == 2
    assert recipe.seed == recipe.data.seed == recipe.options[1, None].seed == 7


def test_overrides_fill_what_stands_there_without_options() -> None:
    recipe = Recipe.parse(
        raw(teacher=None, data=None, steps=["prune", {"quantize": None}]),
        ["teacher.model=other", "data.train=[b.txt]", "prune.ffn_keep=0.25", "quantize.bits=8"],
    )
    assert (recipe.teacher, recipe.data.train) == ("other", ("b.txt",))
    assert (recipe.options[0, None].ffn_keep, recipe.options[1, None].bits) == (0.25, 8)


def test_overrides_do_not_change_the_source() -> None:
    source = raw()
    Recipe.parse(source, ["prune.ffn_keep=0.25"])
    assert source == raw()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "version: found 2, needed 1"),
        ({"stages": []}, "stages is unknown (did you mean 'steps'?)."),
        ({"teacher": {}}, "teacher.model is missing"),
        ({"teacher": {"model": "x", "modle": "y"}}, "teacher.modle is unknown (did you mean 'model'?)."),
        ({"steps": []}, "needed a list of steps"),
        ({"steps": [{"prun": {}}]}, "steps[0].prun is unknown (did you mean 'prune'?)."),
        ({"steps": [{"prune": {"ffn_kep": 1}}]}, "steps[0].prune.ffn_kep is unknown (did you mean 'ffn_keep'?)."),
        ({"steps": [{"prune": 3}]}, "steps[0].prune: found 3"),
        ({"steps": [{"prune": {}, "distill": {}}]}, "needed one step name"),
        ({"steps": [{"quantize": {"scheme": "integer"}}, {"prune": {}}]}, "prune after quantize makes no sense"),
        ({"steps": [{"export": {"formats": ["onnx"]}}, {"distill": {}}]}, "distill after export makes no sense"),
        ({"steps": [{"prune": {}}, {"validate": {}}]}, "validate needs an export before it"),
        ({"steps": [{"quantize": {"scheme": "integer"}}] * 2}, "quantize stands more than once"),
        ({"steps": [{"quantize": {"a/b": {"scheme": "integer"}}}]}, "variant names"),
        ({"steps": [{"quantize": {1: {"scheme": "integer"}, "a b": {}}}]}, "found 1, a b."),
        ({"steps": [{"quantize": {"float": {"scheme": "integer"}}}]}, "float means another model"),
        ({"teacher": {"model": "a", "trust_remote_code": "no"}}, "trust_remote_code: 'no' is not true or false"),
        ({"steps": [_QUANTIZE, "recover", _adapt("recovery")]}, "a task is called recovery"),
        ({"steps": [_QUANTIZE, _adapt("b-c", "c")]}, "one folder twice (a-b-c)"),
        ({"data": {"train": ["a"], "trian": 1}}, "data.trian is unknown (did you mean 'train'?)."),
        ({"seed": "x"}, "seed: 'x' is no whole number"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(raw(**changes))
    assert told in str(caught.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(RecipeError, match="4 mistakes") as caught:
        Recipe.parse(raw(version=3, extra=1, steps=[{"prune": {"ffn_keep": "x"}}, {"distil": {}}]))
    assert all(word in str(caught.value) for word in ("version", "extra", "ffn_keep", "distill"))


def test_rounds_become_plain_steps() -> None:
    entry = {"rounds": 3, "prune": {"ffn_keep": 0.34, "vocabulary_keep": 0.5}, "distill": {"tokens": "2M"}}
    recipe = Recipe.parse(raw(steps=[{"prune_and_distill": entry}, {"quantize": {"scheme": "integer"}}]))
    assert [step.name for step in recipe.steps] == ["prune", "distill"] * 3 + ["quantize"]
    shares = [recipe.options[index, None].ffn_keep for index in (0, 2, 4)]
    assert shares[0] * shares[1] * shares[2] == pytest.approx(0.34)
    removed = [1 - shares[0], shares[0] * (1 - shares[1]), shares[0] * shares[1] * (1 - shares[2])]
    assert removed == sorted(removed, reverse=True)  # the largest cut first
    assert [recipe.options[index, None].vocabulary_keep for index in (0, 2, 4)] == [0.5, 1.0, 1.0]
    assert [recipe.options[index, None].tokens for index in (1, 3, 5)] == [2_000_000] * 3
    assert recipe.raw["steps"][0] == {"prune_and_distill": entry}  # written as it was given


def test_overrides_reach_into_rounds() -> None:
    entry = {"rounds": 3, "prune": {"ffn_keep": 0.34}, "distill": {"tokens": "2M"}}
    settings = ["prune_and_distill.rounds=2", "prune_and_distill.distill.tokens=1M", "seed=5",
                "prune_and_distill.prune.method=soft_top_k", "prune_and_distill.prune.masks.tokens=1M"]  # fmt: skip
    recipe = Recipe.parse(raw(steps=[{"prune_and_distill": entry}]), settings)
    assert len(recipe.steps) == 4
    assert recipe.options[3, None].tokens == 1_000_000
    assert recipe.options[2, None].masks.tokens == 1_000_000
    assert recipe.options[2, None].masks.seed == recipe.options[3, None].seed == 5


def test_an_override_of_a_step_inside_rounds_is_told_its_name() -> None:
    entry = {"rounds": 3, "prune": {"ffn_keep": 0.34}, "distill": {"tokens": "2M"}}
    with pytest.raises(RecipeError, match=r"0 steps named distill.*set as prune_and_distill\.distill\.tokens\."):
        Recipe.parse(raw(steps=[{"prune_and_distill": entry}]), ["distill.tokens=1M"])


def test_masks_are_options_inside_the_step() -> None:
    steps = [{"prune": {"ffn_keep": 0.34, "method": "soft_top_k", "masks": {"tokens": "2M", "weight_rate": "3e-4"}}}]
    masks = Recipe.parse(raw(steps=steps, seed=7)).options[0, None].masks
    assert (masks.tokens, masks.weight_rate, masks.seed) == (2_000_000, 3e-4, 7)
    assert Recipe.parse(raw(seed=7)).options[0, None].method is None


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (3, "steps[0].prune_and_distill: found 3, needed rounds, prune and distill."),
        ({"round": 3}, "steps[0].prune_and_distill.round is unknown (did you mean 'rounds'?)."),
        ({"rounds": 0}, "steps[0].prune_and_distill.rounds: found 0"),
        ({"rounds": 2, "prune": {"method": "magnitude"}}, "needed a share to keep"),
        ({"rounds": 2, "prune": {"ffn_keep": 0.5, "bytes": "1GB"}}, "prune.bytes: a budget is for one cut"),
        ({"rounds": 2, "prune": {"ffn_keep": 1.5}}, "steps[0].prune_and_distill.prune: prune: ffn_keep=1.5"),
        ({"rounds": 2, "prune": {"ffn_keep": "x"}}, "steps[0].prune_and_distill.prune.ffn_keep: 'x' is no number"),
        ({"rounds": 2, "prune": {"ffn_keep": 0.5}, "distill": 3}, "steps[0].prune_and_distill.distill: found 3"),
        (
            {"rounds": 2, "prune": {"ffn_keep": 0.5}, "distill": {"tokns": 3}},
            "1 mistake:\n  steps[0].prune_and_distill.distill.tokns is unknown (did you mean 'tokens'?).",
        ),
    ],
)
def test_mistakes_in_rounds_are_named_once(entry: Any, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(raw(steps=[{"prune_and_distill": entry}]))
    assert told in str(caught.value)


@pytest.mark.parametrize("setting", ["novalue", "=3", "a..b=3"])
def test_overrides_need_key_and_value(setting: str) -> None:
    with pytest.raises(RecipeError, match="found no key=value"):
        parse_overrides([setting])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("prune=3", "name an option too"),
        ("version.x=3", "cannot be set below a plain value"),
        ("version.x.y=3", "has no keys below it"),
    ],
)
def test_overrides_that_fit_nowhere(setting: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse(raw(), [setting])


def test_an_override_of_a_step_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="has 0 steps named prune"):
        Recipe.parse(raw(steps=[{"export": {"formats": ["onnx"]}}]), ["prune.ffn_keep=0.5"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("version: 1\nversion: 1\n", "key 'version' stands twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("{[1, 2]: 3}", "plain word"),
        ("a: [", "no valid YAML"),
        ("- just\n- a list\n", "needed a mapping"),
        ("[" * 5000, "no valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, told: str) -> None:
    place = tmp_path / "r.yaml"
    place.write_text(text)
    with pytest.raises(RecipeError, match=told):
        Recipe.load(place)


def test_missing_and_binary_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        Recipe.load(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "recipes").glob("*.yaml")) - set((ROOT / "recipes").glob("corpus*")))
    + [ROOT / "starter" / "demo.yaml"],
    ids=lambda p: p.name,
)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = Recipe.load(path, ["teacher.model=x", "data.train=[a.txt]"])
    assert Recipe.parse(__import__("yaml").safe_load(recipe.to_yaml())).options == recipe.options


def test_shipped_recipes_say_what_is_missing() -> None:
    with pytest.raises(RecipeError, match=r"teacher.model is missing.*--set"):
        Recipe.load(ROOT / "recipes" / "stories260k.yaml")
