"""The catalogue: every adapter below a folder by its card, and which of them fit a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.adapters import Adapter, AdapterCard
from dwindle.adapters.catalogue import catalogue, catalogue_table, comparison, described
from dwindle.errors import DataError, OutputError, UnsupportedModel

peft = pytest.importorskip("peft")


def write(folder: Path, base: str, **config: Any) -> None:
    made = peft.LoraConfig(r=4, target_modules=["a", "b"], **config)
    card = AdapterCard("base", base, "recovery", metrics={"kl_closed": 0.61})
    Adapter(made, {"base_model.model.a.lora_A.weight": torch.ones(4, 3)}, card).save(folder)


def test_adapters_are_found_described_and_matched(tmp_path: Path) -> None:
    write(tmp_path / "two" / "deep", "b" * 64, use_dora=True)
    write(tmp_path / "one", "a" * 64)
    found = catalogue(tmp_path, "a" * 64)
    assert [one["name"] for one in found] == ["one", "two/deep"]
    assert [one["fits"] for one in found] == [True, False]
    assert [one["kind"] for one in found] == ["lora", "dora"]
    assert found[0]["rank"] == 4
    assert found[0]["linears"] == 2
    assert found[0]["bytes"] == (tmp_path / "one" / "adapter_model.safetensors").stat().st_size
    table = catalogue_table(found)
    assert "fits  kl_closed 0.61" in table
    assert "another base" in table
    assert "fits" not in catalogue_table(catalogue(tmp_path))


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"something else than an adapter \(letter\.txt\)"):
        write(tmp_path / "mine", "a" * 64)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    write(tmp_path / "one", "a" * 64)
    write(tmp_path / "one", "b" * 64)
    assert [one["base_sha256"] for one in catalogue(tmp_path)] == ["b" * 64]


def test_adapters_of_one_name_are_told_apart_when_compared(tmp_path: Path) -> None:
    write(tmp_path / "a" / "mood", "a" * 64)
    write(tmp_path / "b" / "mood", "a" * 64)
    places = [tmp_path / name / "mood" for name in ("a", "b")]
    assert [one["name"] for one in comparison(places)] == [str(place) for place in places]
    assert comparison(places)[0]["same_base"] == [str(places[1])]
    assert [one["name"] for one in comparison([tmp_path])] == ["a/mood", "b/mood"]


def test_folders_without_adapters_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no adapters in it"):
        catalogue(tmp_path)
    write(tmp_path / "one", "a" * 64)
    (tmp_path / "one" / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        described(tmp_path / "one")
    (tmp_path / "one" / "adapter_config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        described(tmp_path / "one")
