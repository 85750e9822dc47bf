"""Recovery: the KL falls, the folder comes back bit for bit, another base is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.adapters import Adapter, AdapterCard, RecoverOptions, recover
from dwindle.divergence import forward_kl
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

pytest.importorskip("peft")
Factory = Callable[..., Any]
OPTIONS = RecoverOptions(rank=8, steps=30, batch_size=8, learning_rate=1e-2)


def tokens(bundle: Any, role: str = "train", windows: int = 32) -> TokenSet:
    ids = torch.randint(3, bundle.anatomy.vocab, (windows, 17), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, role, "random", "0" * 64, 1, encoding_sha256(bundle.tokenizer), licence="MIT")  # type: ignore[arg-type]


def kl(bundle: Any, teacher: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return forward_kl(*(b.model(input_ids=ids).logits.flatten(0, 1) for b in (bundle, teacher))).item()


@pytest.fixture(scope="module")
def pair(tiny_bundle: Factory) -> tuple[Any, Any]:
    teacher = tiny_bundle("llama", initializer_range=0.2)
    return teacher, quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0]


@pytest.mark.parametrize("start", ["zero", "error", "outputs", "fisher"])
def test_an_adapter_recovers_and_comes_back_from_its_folder(pair: tuple[Any, Any], tmp_path: Path, start: str) -> None:
    teacher, base = pair
    held_out = tokens(base, windows=64).ids[32:]
    adapter, record = recover(base, replace(OPTIONS, start=start), teacher=teacher, train_tokens=tokens(base))
    lost, left = kl(base, teacher, held_out), kl(adapter.on(base), teacher, held_out)
    assert left < 0.8 * lost
    assert record.details["last_loss"] < record.details["first_loss"]
    assert record.after.bytes == base.size().bytes + adapter.bytes
    assert record.after.bits_per_weight > base.size().bits_per_weight
    adapter.save(tmp_path / "a")
    again = Adapter.load(tmp_path / "a")
    assert again.sha256 == adapter.sha256
    assert again.card == adapter.card
    assert again.card.licence == "MIT"
    with torch.no_grad():
        ours, theirs = (a.on(base).model(input_ids=held_out).logits for a in (adapter, again))
    assert torch.equal(ours, theirs)


def test_the_errors_largest_part_is_a_better_start_than_none(pair: tuple[Any, Any]) -> None:
    teacher, base = pair
    first = [recover(base, replace(OPTIONS, steps=1, start=start), teacher=teacher, train_tokens=tokens(base))[1]
             .details["first_loss"] for start in ("zero", "error")]  # fmt: skip
    assert first[1] < first[0]


def test_training_goes_on_where_it_was_cut_off(pair: tuple[Any, Any], tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(line: Any) -> None:
        if line.step == 7:
            raise Cut

    teacher, base = pair
    options = replace(OPTIONS, steps=10, checkpoint_every=3, dropout=0.1)
    whole = recover(base, options, teacher=teacher, train_tokens=tokens(base))[0]
    with pytest.raises(Cut):
        recover(base, options, teacher=teacher, train_tokens=tokens(base), folder=tmp_path, on_step=cut)
    resumed = recover(base, options, teacher=teacher, train_tokens=tokens(base), folder=tmp_path)[0]
    assert resumed.sha256 == whole.sha256


def test_another_base_is_refused(pair: tuple[Any, Any]) -> None:
    teacher, base = pair
    adapter = recover(base, replace(OPTIONS, steps=1), teacher=teacher, train_tokens=tokens(base))[0]
    other = quantized(teacher, QuantizeOptions(scheme="palettize", bits=3))[0]
    with pytest.raises(RecipeError, match=r"'recovery': trained on .* this base is"):
        adapter.on(other)


def test_what_does_not_go_together_is_named_at_once(pair: tuple[Any, Any], tiny_bundle: Factory) -> None:
    teacher, base = pair
    with pytest.raises(RecipeError, match=r"the model is not quantized.*the teacher is quantized"):
        recover(teacher, OPTIONS, teacher=base, train_tokens=tokens(base))
    with pytest.raises(RecipeError, match=r"number of layers is 2, the teacher's 3"):
        recover(base, OPTIONS, teacher=tiny_bundle("llama", num_hidden_layers=3), train_tokens=tokens(base))


def test_damaged_folders_are_refused_by_name(pair: tuple[Any, Any], tmp_path: Path) -> None:
    teacher, base = pair
    adapter = recover(base, replace(OPTIONS, steps=1), teacher=teacher, train_tokens=tokens(base))[0]
    with pytest.raises(UnsupportedModel, match=r"no adapter_card\.json"):
        Adapter.load(tmp_path)
    adapter.save(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UnsupportedModel, match="not what its card was written for"):
        Adapter.load(tmp_path / "a")
    weights.write_bytes(data[:20])
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        Adapter.load(tmp_path / "a")
    card = tmp_path / "a" / "adapter_card.json"
    card.write_text(json.dumps({"schema": 9}))
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        AdapterCard.read(tmp_path / "a")
