"""A model with low-rank changes computes what PEFT's own layers compute, and is itself again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.low_rank import LowRank, changed, factors
from dwindle.peft_folder import read_adapter
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

Factory = Callable[..., Any]
IDS = torch.arange(5, 25)[None]


def logits(bundle: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = bundle.model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize(("family", "bits"), [("llama", None), ("qwen2", None), ("phi3", None), ("llama", 4)])
def test_changes_equal_pefts_layers(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path, kind: str, family: str, bits: int | None
) -> None:
    from dwindle.adapters import Adapter

    bundle = tiny_bundle(family)
    if bits is not None:
        bundle = quantized(bundle, QuantizeOptions(scheme="integer", bits=bits))[0]
    folder = write_adapter(bundle, tmp_path / "a", kind=kind, rank=3)
    before, wanted = logits(bundle), logits(Adapter.load(folder).on(bundle))
    with changed(bundle, read_adapter(folder)):
        found = logits(bundle)
    assert (found - wanted).abs().max() < 2e-5
    assert (wanted - before).abs().max() > 0.1
    assert torch.equal(logits(bundle), before)


def test_the_base_comes_back_after_an_error(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    before = logits(bundle)
    one = {"model.layers.0.mlp.up_proj": LowRank(torch.ones(1, 32), torch.ones(64, 1), 1.0)}
    with pytest.raises(AttributeError, match="nowhere"), changed(bundle, {**one, "nowhere": next(iter(one.values()))}):
        pass
    assert torch.equal(logits(bundle), before)


def test_dora_needs_the_weight() -> None:
    with pytest.raises(ValueError, match="base's weight"):
        factors(LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, torch.ones(2)))
