from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.quality import Quality
from dwindle.data.synthesis.stage import Synthesize
from dwindle.errors import RecipeError
from dwindle.pipeline.cli import main
from dwindle.pipeline.corpus_recipe import STAGES, load_corpus_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "corpus.yaml"
SMALL = """
version: 1
folders: {texts: nowhere}
sources:
  - {name: tales, place: "{texts}/tales.jsonl", licence: MIT, text: story}
  - {name: code, place: "{stdlib}/json", licence: PSF-2.0}
steps:
  - normalization
  - quality: {least_words: 5, least_common_words: null}
  - near_duplicates: {edited: 0.9}
splits: {calibration: 0.1, evaluation: 0.2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tales.jsonl").write_text(
        "\n".join(
            json.dumps({"story": f"Tale {i}. " + f"Once there was a fox named {i}, and it ran {i} miles. " * 3})
            for i in range(30)
        )
    )
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path / "small.yaml"


def test_the_recipe_that_comes_along() -> None:
    options = load_corpus_recipe(
        RECIPE,
        ["folders.assets=/texts", "sources.wikitext.weight=2", "decontamination.common=7"]
        + [
            f"sources.{n}.weight=1" for n in ("tinystories", "shakespeare", "gsm8k", "instructions", "standard-library")
        ],
    )
    assert options.sources[0].place == "/texts/text/tinystories_train.txt"
    assert options.sources[-1].place == sysconfig.get_paths()["stdlib"]
    assert options.sources[3].text == "{question}\n{answer}"
    assert options.weights is not None
    assert options.weights["wikitext"] == 2
    assert [stage.name for stage in options.stages][-3:] == ["near_duplicates", "decontamination", "personal_data"]
    assert next(s for s in options.stages if s.name == "decontamination").common == 7  # type: ignore[union-attr]
    assert {stage.name for stage in options.stages} <= STAGES.keys()


def test_settings(recipe: Path) -> None:
    options = load_corpus_recipe(recipe, ["folders.texts=/t", "near_duplicates.ngram=4", "normalization.mojibake=drop", "seed=3",
                                          "licences.allowed=[MIT, PSF-*]", "format=parquet", "splits.evaluation=0.3"])  # fmt: skip
    assert options.sources[0].place == "/t/tales.jsonl"
    assert (options.seed, options.format, options.splits.evaluation) == (3, "parquet", 0.3)
    quality, near = options.stages[1:]
    assert isinstance(quality, Quality)
    assert quality.least_common_words is None
    assert isinstance(near, NearDuplicates)
    assert (near.options.ngram, near.options.edited) == (4, 0.9)


def test_the_models_of_a_synthesis_may_lie_in_a_folder(recipe: Path) -> None:
    step = '{synthesize: {teacher: "{texts}/a", kinds: [free], verifier: {model: "{texts}/b"}}}'
    (stage,) = load_corpus_recipe(recipe, ["folders.texts=/t", f"steps=[{step}]"]).stages
    assert isinstance(stage, Synthesize)
    assert stage.verifier is not None
    assert (stage.teacher, stage.verifier.model) == ("/t/a", "/t/b")


def test_all_mistakes_come_at_once(recipe: Path) -> None:
    recipe.write_text(SMALL.replace("version: 1", "version: 2\nsauces: []\nlicences: {forbiden: [x]}").replace("{texts}/", "{text}/")
                      .replace("least_words", "least_wurds").replace("- normalization", "- normalisation").replace("name: code", "name: c ode"))  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load_corpus_recipe(recipe)
    for part in ("version: found 2", "sauces is unknown (did you mean 'sources'?)", "licences.forbiden is unknown", "{text} names no folder (did you mean 'texts'?)",
                 "steps[1].quality.least_wurds is unknown (did you mean 'least_words'?)", "steps[0].normalisation is unknown (did you mean 'normalization'?)",
                 "name='c ode'"):  # fmt: skip
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("[1]", [], "found list"),
        ("a: *b", [], "aliases"),
        ("version: 1\nsources: []\nsteps: 3", [], "steps: found 3"),
        ("version: 1\nsources: []\nlicences: 3\nfolders: 4\nsteps: [{a: 1, b: 2}]", [], "licences: found 3"),
        (SMALL, ["quality=1"], "needed one, and OPTION=VALUE"),
        (SMALL, ["language.keep=[de]"], "has 0 steps named language"),
        (SMALL, ["sources.tails.weight=1"], "no source .did you mean 'tales'"),
        (SMALL, ["version.x=1"], "version has no keys below it"),
        (SMALL, ["licences.forbidden=[PSF-*]"], "source code has the licence PSF-2.0, which the recipe forbids"),
    ],
)
def test_recipes_that_cannot_be_meant(recipe: Path, text: str, settings: list[str], message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_corpus_recipe(recipe, settings)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_corpus_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load_corpus_recipe(tmp_path / "b.yaml")
    with pytest.raises(RecipeError, match="a folder, needed a recipe: a YAML file that names this folder"):
        load_corpus_recipe(tmp_path)
    (tmp_path / "story.txt").write_text("Once upon a time")
    with pytest.raises(RecipeError, match=r"found str, needed a mapping.*Text is named in a recipe"):
        load_corpus_recipe(tmp_path / "story.txt")


def test_the_recipe_in_the_help_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not run("data", "build", "--help")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "version: 1")
    text = "\n".join(line[2:] for line in lines[start : lines.index("", start)])
    (tmp_path / "recipe.yaml").write_text(text)
    options = load_corpus_recipe(tmp_path / "recipe.yaml")
    assert [source.name for source in options.sources] == ["mine", "rows"]
    assert options.stages[-1].name == "personal_data"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_tokens_are_counted_without_the_weights(
    recipe: Path, workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workshop / "teacher", model, ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--set", f"folders.texts={tmp_path}", "-m", str(model), "--json"]
    assert run("data", "build", str(recipe), "-o", str(tmp_path / "C"), *words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["train"]["tokens"] > 0


def test_build_and_show(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"folders.texts={tmp_path}"
    assert run("data", "build", str(recipe), "-o", str(tmp_path / "C"), "--set", place, "--dry-run") == 0
    assert "would write" in capsys.readouterr().out
    assert not (tmp_path / "C").exists()
    assert run("data", "build", str(recipe), "-o", str(tmp_path), "--set", place) == 2
    assert "something else than a corpus" in capsys.readouterr().err
    assert recipe.exists()
    assert run("data", "build", str(recipe), "-o", str(tmp_path / "C"), "--set", place, "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert card == json.loads((tmp_path / "C" / "card.json").read_text())
    assert run("data", "show", str(tmp_path / "C"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == card
    assert run("data", "show", str(tmp_path / "C")) == 0
    assert "near_duplicates" in capsys.readouterr().out
    (tmp_path / "C" / "card.json").write_text("{")
    assert run("data", "show", str(tmp_path / "C")) == 2
    assert "card.json: the card cannot be read" in capsys.readouterr().err
    assert run("data", "show", str(tmp_path)) == 2
    assert "no corpus" in capsys.readouterr().err
    assert (
        run(
            "data",
            "build",
            str(recipe),
            "-o",
            str(tmp_path / "D"),
            "--set",
            place,
            "--set",
            "quality.least_words=9999",
            "--set",
            "sources.code.kind=prose",
        )
        == 2
    )
    assert "nothing is left after filtering: quality took" in capsys.readouterr().err
    assert not (tmp_path / "D").exists()
