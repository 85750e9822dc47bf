"""Adapters in a Core ML package: functions over one copy of the base's codes, executed and swapped in any order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwindle import export
from dwindle.errors import RecipeError
from dwindle.export import ExportOptions
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("coremltools")
pytestmark = pytest.mark.timeout(900)  # conversions share the machine with whatever else runs there
Factory = Callable[..., Any]
IDS = torch.arange(40, 60)[None]
FAST = {"decode_steps": 4, "prompts": 1, "longest_tokens": 8}


def peft_logits(bundle: Any, folder: Path | None) -> torch.Tensor:
    from dwindle.adapters import Adapter

    with torch.no_grad():
        found: torch.Tensor = (bundle if folder is None else Adapter.load(folder).on(bundle)).model(IDS).logits[0]
    return found


def logits_as_stored(bundle: Any, folder: Path | None) -> torch.Tensor:
    """The torch model's logits with exactly those numbers rounded to float16 that a package keeps so: cos and sin, the
    attention's scale, the norms' epsilon, and of an adapter A, B and the rows' scales."""
    from dwindle.export.adapter_package import adapter_factors
    from dwindle.export.carried_adapters import carried_adapters

    def rounded(value: float) -> float:
        return float(np.float16(value))

    model: Any = copy.deepcopy(bundle.model)
    turn = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *given, **named: tuple(t.half().float() for t in turn(*given, **named))
    for module in model.modules():
        for name in ("scaling", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, rounded(getattr(module, name)))
    (carried,) = carried_adapters(bundle, [folder]) if folder else (None,)
    for name, change in (adapter_factors(carried, bundle) if carried else {}).items():
        a, b = change.a.half().float(), change.b.half().float()
        rows = torch.ones(len(b)) if change.row_scale is None else change.row_scale.half().float()

        def changed(layer: Any, given: Any, out: Any, a: Any = a, b: Any = b, rows: Any = rows) -> torch.Tensor:
            bias = torch.zeros(len(b)) if layer.bias is None else layer.bias
            found: torch.Tensor = rows * (out - bias) + bias + given[0] @ a.T @ b.T
            return found

        model.get_submodule(name).register_forward_hook(changed)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("shapes", "family"), [("dynamic", "qwen2"), ("static", "llama")])
def test_functions_share_the_base_and_equal_peft(
    shapes: Any, family: str, tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    from dwindle.export.coreml_files import PACKAGE, WEIGHTS_FILE
    from dwindle.export.mil_evaluator import MilProgram

    bundle = quantized(tiny_bundle(family, storage_dtype=torch.float16), QuantizeOptions(scheme="palettize", bits=4))[0]
    options = ExportOptions(formats=("coreml",), shapes=shapes, prefill_tokens=8, **FAST)
    folders = {"a": write_adapter(bundle, tmp_path / "a"),
               "b-2": write_adapter(bundle, tmp_path / "b-2", rank=2, kind="dora", targets=("q", "down"), seed=2)}  # fmt: skip
    export.run(bundle, options, tmp_path / "alone")
    (artifact,) = export.run(bundle, options, tmp_path / "out", adapters=list(folders.values()))
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert [row["parity"]["passed"] for row in artifact.details["adapters"]] == [True, True]
    place = tmp_path / "out" / "coreml"

    alone, together = ((tmp_path / run / "coreml" / PACKAGE / WEIGHTS_FILE).stat().st_size for run in ("alone", "out"))
    added = 2 * (4 * sum(sum(bundle.anatomy.linear_shape(layer, part)) for layer in range(2)
                         for part in bundle.anatomy.parts(0))
                 + 2 * sum(sum(bundle.anatomy.linear_shape(layer, part)) for layer in range(2)
                           for part in ("q", "down")))  # fmt: skip
    assert alone < together < alone + added + 192 * 2 * (14 + 4) + 4096, "the base is stored once"
    programs = MilProgram.load_all(place / PACKAGE)
    functions = {"dynamic": {"main", "a", "b_2"},
                 "static": {"prefill", "decode", "a_prefill", "a_decode", "b_2_prefill", "b_2_decode"}}[shapes]  # fmt: skip
    assert set(programs) == functions
    weights = [one for one in bundle.quantized_weights().values() if hasattr(one, "indices")]
    assert len(weights) == 14
    for program in programs.values():
        carried = [one["indices"] for one in program.constants.values() if "indices" in one]
        assert len(carried) == len(weights)
        for weight in weights:
            assert any(np.array_equal(found, weight.indices.numpy()) for found in carried)

    runner: Any = export.open_artifact(place)
    wanted: dict[Any, torch.Tensor] = {name: peft_logits(bundle, folder) for name, folder in folders.items()}
    wanted[None] = peft_logits(bundle, None)
    stored: dict[Any, torch.Tensor] = {name: logits_as_stored(bundle, folders.get(name)) for name in (*folders, None)}
    for name in folders:
        runner.load_adapter(place / "adapters" / name)
    seen: dict[Any, torch.Tensor] = {}
    for name in ("a", "b-2", None, "a", "b-2"):
        runner.activate(name)
        found = torch.cat([runner.step(IDS[:, :12]), *(runner.step(IDS[:, i : i + 1]) for i in range(12, 20))])
        assert (found - stored[name]).abs().max() < 1e-4, name  # nothing but those numbers' rounding is between them
        assert (found - wanted[name]).abs().max() < 5e-3 * wanted[name].abs().max(), name
        assert torch.equal(seen.setdefault(name, found), found)
    assert (wanted["a"] - wanted[None]).abs().max() > 0.5
    with pytest.raises(RecipeError, match=r"is no function of .*which has a, b-2"):
        runner.load_adapter(write_adapter(bundle, tmp_path / "c"))
    with pytest.raises(RecipeError, match="not ready for adapters"):
        export.open_artifact(tmp_path / "alone" / "coreml").load_adapter(folders["a"])
    with pytest.raises(RecipeError, match="cannot be added later"):
        export.package_adapter(folders["a"], [place], tmp_path / "late")
    told = (place / "README.md").read_text()
    assert "`b_2`" in told if shapes == "dynamic" else "`b_2_prefill`, `b_2_decode`" in told
