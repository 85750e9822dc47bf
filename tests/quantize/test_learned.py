from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.divergence import forward_kl
from dwindle.errors import DataError
from dwindle.quantize.calibration import forward_walk
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.learned import Descent, learn_block, learn_blocks, learn_jointly
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.weights import QuantizedWeight

SCHEMES = ("integers", "palettes")
SHORT = Descent(steps=40, batch_size=4, rate=0.03)


def windows(count: int = 48, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def starts(bundle: Any, scheme: str, bits: int = 2) -> dict[str, QuantizedWeight]:
    found: dict[str, QuantizedWeight] = {}
    for name in bundle.anatomy.linear_names():
        dense = bundle.model.get_submodule(name).weight
        found[name] = round_to_nearest(dense, bits, 16) if scheme == "integers" else palettize(dense, bits, 8)
    return found


def logits(blocks: InMemoryBlocks, ids: torch.Tensor, weights: dict[str, QuantizedWeight]) -> torch.Tensor:
    hidden = blocks.embed(ids)
    for layer in range(blocks.anatomy.layers):
        names = [name for name in blocks.anatomy.parts(layer).values() if name in weights]
        hidden = blocks.forward(layer, hidden, {name: weights[name].dequantize() for name in names})
    return blocks.logits(hidden).flatten(0, 1)


@torch.no_grad()
def kl(blocks: InMemoryBlocks, weights: dict[str, QuantizedWeight], seed: int = 9) -> float:
    ids = windows(16, seed=seed)
    return float(forward_kl(logits(blocks, ids, weights), logits(blocks, ids, {})))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Any]) -> Any:
    return tiny_bundle("llama")


@pytest.fixture(scope="module")
def blocks(bundle: Any) -> InMemoryBlocks:
    return InMemoryBlocks(bundle)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_errs_less_on_windows_it_never_saw(bundle: Any, blocks: InMemoryBlocks, scheme: str) -> None:
    start = {n: w for n, w in starts(bundle, scheme).items() if n.startswith("model.layers.0.")}
    states = [blocks.embed(windows())]
    learned = learn_block(blocks, 0, start, states, states, SHORT)
    assert learned.last_loss < 0.9 * learned.first_loss
    hidden = blocks.embed(windows(seed=5))
    with torch.no_grad():
        exact = blocks.forward(0, hidden)
        before, after = (
            (blocks.forward(0, hidden, {n: w.dequantize() for n, w in weights.items()}) - exact).square().mean()
            for weights in (start, learned.weights)
        )
    assert after < 0.95 * before
    assert {n: w.spec() for n, w in learned.weights.items()} == {n: w.spec() for n, w in start.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_block_by_block_then_jointly_lowers_the_kl(bundle: Any, blocks: InMemoryBlocks, scheme: str) -> None:
    start = starts(bundle, scheme)
    by_block = learn_blocks(blocks, start, windows(), SHORT)
    jointly = learn_jointly(blocks, by_block, windows(), SHORT)
    assert kl(blocks, by_block) < 0.9 * kl(blocks, start)
    assert jointly.last_loss < jointly.first_loss
    assert kl(blocks, jointly.weights) < 0.9 * kl(blocks, start)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2"])
def test_families_with_other_blocks(tiny_bundle: Callable[..., Any], family: str) -> None:
    bundle = tiny_bundle(family)
    blocks = InMemoryBlocks(bundle)
    start = starts(bundle, "integers", 3)
    learned = learn_blocks(blocks, start, windows(), SHORT)
    assert {n: w.spec() for n, w in learned.items()} == {n: w.spec() for n, w in start.items()}
    assert kl(blocks, learned) < kl(blocks, start)


def test_adamw_learns_too(bundle: Any, blocks: InMemoryBlocks) -> None:
    learned = learn_jointly(blocks, starts(bundle, "integers"), windows(), Descent(40, 4, "adamw", 0.04))
    assert learned.last_loss < 0.95 * learned.first_loss


@pytest.mark.parametrize("optimizer", ["sign", "adamw"])
def test_it_is_never_worse_than_its_start(bundle: Any, blocks: InMemoryBlocks, optimizer: Any) -> None:
    start = starts(bundle, "integers", 8)
    wild = Descent(steps=5, batch_size=4, optimizer=optimizer, rate=0.5)
    learned = learn_jointly(blocks, start, windows(16), wild)
    assert learned.last_loss == learned.first_loss
    for name, weight in learned.weights.items():
        assert torch.equal(weight.dequantize(), start[name].dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_seed_gives_the_same_bits(bundle: Any, blocks: InMemoryBlocks, scheme: str) -> None:
    start = starts(bundle, scheme)
    first, again, other = (
        learn_jointly(blocks, start, windows(16), Descent(steps=4, batch_size=4, seed=seed)) for seed in (0, 0, 1)
    )
    assert first.last_loss == again.last_loss
    for name, weight in first.weights.items():
        assert torch.equal(weight.dequantize(), again.weights[name].dequantize())
    assert any(not torch.equal(w.dequantize(), other.weights[n].dequantize()) for n, w in first.weights.items())


def test_the_model_is_left_as_it_was(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama", seed=3)
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    blocks = InMemoryBlocks(bundle)
    learn_jointly(blocks, learn_blocks(blocks, starts(bundle, "integers"), windows(8), Descent(2, 4)), windows(8),
                  Descent(2, 4))  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_only_what_has_codes_is_learned(bundle: Any, blocks: InMemoryBlocks) -> None:
    start = {n: w for n, w in starts(bundle, "integers").items() if "mlp" in n}
    assert set(learn_blocks(blocks, start, windows(8), Descent(2, 4))) == set(start)
    assert set(learn_jointly(blocks, start, windows(8), Descent(2, 4)).weights) == set(start)


def test_tokens_of_no_weight_do_not_count(bundle: Any, blocks: InMemoryBlocks) -> None:
    start = {n: w for n, w in starts(bundle, "integers").items() if n.startswith("model.layers.0.")}
    states = [blocks.embed(windows(16))]
    none = learn_block(blocks, 0, start, states, states, Descent(2, 4), token_weights=torch.zeros(16, 16))
    assert none.first_loss == 0.0


def test_behind_coded_blocks_the_target_is_the_float_model(bundle: Any, blocks: InMemoryBlocks) -> None:
    start = starts(bundle, "integers")
    walk = forward_walk(blocks, windows(), hessian=False, keep_float=True)
    next(walk).continue_with({n: w.dequantize() for n, w in start.items() if n.startswith("model.layers.0.")})
    second = next(walk)
    own = {n: w for n, w in start.items() if n.startswith("model.layers.1.")}
    learned = learn_block(blocks, 1, own, second.inputs, second.float_inputs, SHORT)
    assert learned.last_loss < learned.first_loss


def test_one_window_is_too_few(bundle: Any, blocks: InMemoryBlocks) -> None:
    start = starts(bundle, "integers")
    with pytest.raises(DataError, match="found 1, needed 2 or more"):
        learn_jointly(blocks, start, windows(1))
    states = [blocks.embed(windows(1))]
    with pytest.raises(DataError, match="found 1"):
        learn_block(blocks, 0, {n: w for n, w in start.items() if ".0." in n}, states, states)


def test_the_recipe_sets_the_descent() -> None:
    options = QuantizeOptions(scheme="integer", method="learned", iterations=50, batch_size=4, seed=7)
    assert Descent.of(options) == Descent(50, 4, seed=7)
    assert Descent.of(options).rates() == (0.02, 0.02)
    assert Descent.of(options, "adamw").optimizer == "adamw"
    offsets, tables = Descent(optimizer="adamw").rates()
    assert 0 < tables < offsets
