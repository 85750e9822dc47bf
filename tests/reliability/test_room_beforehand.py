"""Before a long step: what it needs at least is held against what is there, and refused with the sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwindle import export, prune, quantize, resources
from dwindle.data import DataOptions, calibration_set
from dwindle.data.curation.build import build_corpus
from dwindle.errors import DoesNotFit, OutputError
from dwindle.pipeline.corpus_recipe import load_corpus_recipe


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Any]) -> Any:
    return tiny_bundle()


@pytest.fixture(scope="module")
def calibration(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    text = tmp_path_factory.mktemp("text") / "a.txt"
    text.write_text("the small red fox ran over a green hill and saw one blue bird " * 200)
    return calibration_set(DataOptions(train=(str(text),), calibration_windows=8), bundle.tokenizer, 64)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 1000)


@pytest.mark.usefixtures("no_memory")
def test_pruning_needs_room_for_the_smaller_model(bundle: Any) -> None:
    options = prune.PruneOptions(ffn_keep=0.5, method="magnitude")
    with pytest.raises(
        DoesNotFit, match=r"prune: [\d,]+ parameters stay: about .* \(the smaller model beside the whole"
    ):
        prune.run(bundle, options)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantizing_needs_room_for_codes_and_what_the_text_does(
    calibrated: bool, bundle: Any, calibration: Any
) -> None:
    parts = r"\(codes [\d.]+ GB" + (r" \+ hidden states .* \+ the widest second moments .*\)" if calibrated else r"\)")
    with pytest.raises(DoesNotFit, match=rf"quantize: 15 layers: about .* {parts}.* 0.00 GB are left"):
        quantize.run(
            bundle, quantize.QuantizeOptions(scheme="integer", group_size=16), calibration if calibrated else None
        )


@pytest.mark.usefixtures("no_memory")
def test_exporting_needs_room_for_the_artifact_and_its_check(bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"export: .* \(the artifact .* \+ the runtime that executes it"):
        export.run(bundle, export.ExportOptions(formats=("onnx",), prompts=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_needs_room_for_its_text_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one two three four five\n\n" * 40)
    recipe = tmp_path / "corpus.yaml"
    recipe.write_text(f"version: 1\nname: c\nsources: [{{name: a, place: {tmp_path / 'a.txt'}}}]\n")
    options = load_corpus_recipe(str(recipe), ())
    monkeypatch.setattr("dwindle.storage.shutil.disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=2999))
    with pytest.raises(OutputError, match=r"about 3,000 bytes are needed, 2,999 are free"):
        build_corpus(options, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "corpus.yaml"]
