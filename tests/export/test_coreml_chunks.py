"""Models that are cut into several packages: where, how large, the same logits, and what cannot be cut."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.errors import OutputError, RecipeError
from dwindle.export.coreml_chunks import chunk_problems, part_bytes, planned_parts
from dwindle.export.coreml_decoder import Part
from dwindle.export.coreml_package import CoreMLInfo, export_coreml
from dwindle.export.coreml_runner import CoreMLEvaluatorRunner, open_package
from dwindle.export.options import ExportOptions
from dwindle.quantized_model import apply_quantized_weights
from dwindle.weights import PalettizedWeight

LIMITS = {"dynamic": 50_000, "static": 72_000}


def test_parts_go_from_the_embedding_to_the_head(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama", num_hidden_layers=5)
    whole = planned_parts(bundle, 64, 2_000_000)
    assert whole == (Part(0, 5, True, True),)
    limit = part_bytes(bundle, Part(0, 2, True, False), 64)
    parts = planned_parts(bundle, 64, limit)
    assert (parts[0], parts[-1].end, parts[-1].head) == (Part(0, 2, True, False), 5, True)
    assert [part.first for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert all(part_bytes(bundle, part, 64) <= limit for part in parts)
    assert not chunk_problems(bundle, 64, limit)


def test_a_part_that_cannot_be_cut_is_named(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    options = ExportOptions(decode_steps=8, largest_file_bytes=30_000)
    with pytest.raises(RecipeError) as refusal:
        export_coreml(tiny_bundle("llama", num_hidden_layers=2), tmp_path, options)
    message = str(refusal.value)
    assert "4 parts that cannot be cut pass largest_file_bytes=30,000: the embedding (" in message
    assert "layer 0 (" in message
    assert "layer 1 (" in message
    assert "the head (" in message
    assert "at least" in message
    assert not list(tmp_path.iterdir())


Cut = tuple[Any, Path, CoreMLInfo, torch.Tensor]


def _mixed(bundle: Any) -> None:
    """Give half of a bundle's matrices random palettes, in place."""
    made, weights = torch.Generator().manual_seed(0), {}
    for name in bundle.anatomy.linear_names()[::2]:
        shape = tuple(bundle.model.get_submodule(name).weight.shape)
        indices = torch.randint(0, 16, shape, dtype=torch.uint8, generator=made)
        table = (torch.randn((shape[0] // 16, 16), generator=made) * 0.15).half().sort(dim=1).values
        weights[name] = PalettizedWeight(indices, table, 4, 16, None)
    apply_quantized_weights(bundle.model, weights, {})


@pytest.fixture(scope="module")
def whole(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor]:
    """A tied Qwen3, half of it palettes, and the logits of its uncut package."""
    bundle, folder = tiny_bundle("qwen3", storage_dtype=torch.float16), tmp_path_factory.mktemp("whole")
    _mixed(bundle)
    export_coreml(bundle, folder, ExportOptions(decode_steps=8))
    return bundle, _logits(CoreMLEvaluatorRunner(folder))


@pytest.fixture(scope="module", params=["dynamic", "static"])
def cut(
    request: pytest.FixtureRequest, whole: tuple[Any, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Cut:
    """The same model, cut: (bundle, folder, info, logits of the uncut package)."""
    folder = tmp_path_factory.mktemp("cut")
    options = ExportOptions(decode_steps=8, shapes=request.param, prefill_tokens=5,
                            largest_file_bytes=LIMITS[request.param])  # fmt: skip
    return whole[0], folder, export_coreml(whole[0], folder, options), whole[1]


def _logits(runner: Any) -> torch.Tensor:
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(5))
    return torch.cat([runner.step(part) for part in ids.split([12, 1, 1, 6], dim=1)])


def test_cut_packages_compute_what_the_whole_one_does(cut: Cut) -> None:
    _, folder, info, logits = cut
    count = len(info.packages)
    assert count == (2 if info.functions else 4)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"model_{number + 1:02}_of_{count:02}.mlpackage" for number in range(count)
    ]
    runner = open_package(folder)
    assert torch.allclose(_logits(runner), logits, atol=1e-5)
    assert runner.context == 64
    assert runner.vocabulary == 272
    runner.reset()
    assert torch.allclose(_logits(runner), logits, atol=1e-5)


def test_every_file_is_within_the_limit_and_counted(cut: Cut) -> None:
    bundle, _, info, _ = cut
    assert max(info.weights_bytes) <= LIMITS["static" if info.functions else "dynamic"]
    for part, size in zip(info.parts, info.weights_bytes, strict=True):
        assert size <= part_bytes(bundle, part, 64)
    facts = info.facts()
    assert [row["package"] for row in facts["packages"]] == [package.name for package in info.packages]
    assert [row["layers"] for row in facts["packages"]] == [[part.first, part.end] for part in info.parts]
    assert facts["weight_bytes"] == info.weight_bytes == sum(info.weights_bytes)
    assert info.package == info.packages[0]


def test_one_package_of_a_cut_model_finds_the_others(cut: Cut, tmp_path: Path) -> None:
    _, folder, info, logits = cut
    assert torch.allclose(_logits(open_package(info.packages[1])), logits, atol=1e-5)
    shutil.copytree(folder, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / info.packages[-1].name)
    with pytest.raises(OutputError, match=r"1 parts are not beside it: model_0"):
        open_package(tmp_path / "some")
