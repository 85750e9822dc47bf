"""The demo's adapters: recovery and two tasks on each variant, swapped in one ONNX session and one Core AI asset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NAMES = {"recovery", "past", "negation"}


@pytest.mark.demo
@pytest.mark.timeout(1800)  # the demo itself runs first
@pytest.mark.parametrize("kind", ["onnx", "coreai"])
def test_the_demos_adapters_are_swapped_in_one_artifact(demo_run: Path, kind: str) -> None:
    from dwindle.adapters import Adapter
    from dwindle.bundle import ModelBundle
    from dwindle.export import open_artifact

    variant = {"onnx": "onnx", "coreai": "apple"}[kind]
    base = ModelBundle.load(demo_run / "steps" / f"03-quantize-{variant}" / "model")
    folders = {
        card.parent.name: card.parent for card in (demo_run / "steps").glob(f"0[45]-*-{variant}*/*/adapter_card.json")
    }
    assert set(folders) == NAMES
    runner = open_artifact(demo_run / "export" / kind)
    for name in NAMES:
        runner.load_adapter(demo_run / "export" / kind / "adapters" / name)
    ids = torch.tensor([base.tokenizer("Question: Say that it is not true: Mia found the kite.\nAnswer:").input_ids])
    seen = []
    for name in ("past", None, "negation", "recovery", "past"):
        model = base if name is None else Adapter.load(folders[name]).on(base)
        runner.activate(name)
        runner.reset()
        with torch.no_grad():
            wanted = model.model(input_ids=ids).logits[0, -1]
        found = runner.step(ids).reshape(-1, base.anatomy.vocab)[-1]
        assert (found - wanted).abs().max() < 1e-4, name
        seen.append(found)
    assert torch.equal(seen[0], seen[-1])
    assert (seen[0] - seen[2]).abs().max() > 1e-2


@pytest.mark.demo
@pytest.mark.timeout(1800)
def test_the_demos_tasks_are_learned(demo_run: Path) -> None:
    report = json.loads((demo_run / "report.json").read_text())
    tasks = [step for step in report["steps"] if step["name"] == "adapt"]
    assert len(tasks) == 4
    for step in tasks:
        before, after = (step["details"][f"metrics_{when}"] for when in ("before", "after"))
        assert before["label_accuracy"] <= 0.4, step["details"]["task"]
        assert before["exact_match"] <= 0.1, step["details"]["task"]
        assert after["label_accuracy"] >= 0.9, step["details"]["task"]
        assert after["exact_match"] >= 0.4, step["details"]["task"]
    for artifact in report["artifacts"]:
        if artifact["variant"] != "float":
            assert {one["name"] for one in artifact["details"]["adapters"]} == NAMES
            assert artifact["parity"]["passed"]
