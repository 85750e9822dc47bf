"""lineage.json: what went in, and nothing of the machine."""

from __future__ import annotations

import json

import pytest

import dwindle
from dwindle.errors import UnsupportedModel
from dwindle.lineage import LINEAGE_FILE, Lineage


def test_entries_survive_the_file(tmp_path):
    lineage = Lineage.origin("stories", {"config.json": "ab"}, revision="main")
    lineage = lineage.adding("prune", {"ffn_keep": 0.5}, {"calibration": "cd"})
    lineage.write(tmp_path)
    assert Lineage.read(tmp_path) == lineage
    assert lineage.steps == ("origin", "prune")
    stored = json.loads((tmp_path / LINEAGE_FILE).read_text())["entries"]
    assert stored[0]["options"] == {"model": "stories", "revision": "main"}
    assert stored[1]["inputs"] == {"calibration": "cd"}
    assert stored[1]["dwindle"] == dwindle.__version__
    assert set(stored[1]["versions"]) == {"torch", "transformers", "safetensors"}


def test_options_must_be_json():
    with pytest.raises(TypeError):
        Lineage.origin("m", {}).adding("prune", {"where": object()}, {})


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9, "entries": []}', '{"schema": 1, "entries": [{"what": 1}]}'])
def test_a_damaged_file_is_explained(tmp_path, text):
    (tmp_path / LINEAGE_FILE).write_text(text)
    with pytest.raises(UnsupportedModel, match="delete it to load the model as a new origin"):
        Lineage.read(tmp_path)
