from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.boundary_states import BoundaryStates
from dwindle.bundle import ModelBundle
from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.errors import DataError, OutputError
from dwindle.families import FAMILIES
from dwindle.quantize.calibration import LayerStatistics, backward_walk, forward_walk

Factory = Callable[..., ModelBundle]


def text(windows: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(seed))


def traced(bundle: ModelBundle, ids: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor], Tensor]:
    """Run the whole model once: per linear its input and output, the states entering each block, and the logits."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    entering: list[Tensor] = []

    def noting(name: str) -> Any:
        def note(_: Any, inputs: Any, output: Any) -> None:
            seen[name] = inputs[0], output

        return note

    handles = [bundle.model.get_submodule(n).register_forward_hook(noting(n)) for n in bundle.anatomy.linear_names()]
    for layer in range(bundle.anatomy.layers):
        block = bundle.model.get_submodule(bundle.anatomy.layer_path(layer))
        handles.append(block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0])))
    logits = bundle.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, entering, logits


def oracle(bundle: ModelBundle, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return per linear x [N, I] and dL/dz [N, O] of the summed cross-entropy on the text, by autograd on the whole."""
    seen, _, logits = traced(bundle, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    slopes = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {
        name: (x.detach().flatten(0, -2), slope.flatten(0, -2))
        for (name, (x, _)), slope in zip(seen.items(), slopes, strict=True)
    }


@pytest.mark.parametrize("family", tuple(FAMILIES))
def test_the_forward_walk_gives_the_whole_models_states_and_plain_hessians(family: str, tiny_bundle: Factory) -> None:
    bundle, ids = tiny_bundle(family), text()
    with torch.no_grad():
        seen, entering, _ = traced(bundle, ids)
    for block in forward_walk(InMemoryBlocks(bundle), ids):
        torch.testing.assert_close(torch.cat(block.inputs), entering[block.layer], rtol=1e-5, atol=1e-5)
        assert set(block.statistics) == set(bundle.anatomy.parts(block.layer).values())
        for name, found in block.statistics.items():
            x = seen[name][0].flatten(0, -2)
            assert (found.tokens, found.fisher, found.curvature) == (ids.numel(), None, 1.0)
            assert found.hessian is not None
            torch.testing.assert_close(found.hessian, (x.T @ x / len(x))[None], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.second_moment, found.hessian[0].diagonal(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", tuple(FAMILIES))
def test_the_backward_walk_gives_autograds_gradients(family: str, tiny_bundle: Factory) -> None:
    bundle, ids = tiny_bundle(family), text()
    expected = oracle(bundle, ids)
    layers = []
    for layer, statistics in backward_walk(InMemoryBlocks(bundle), ids, row_groups=2, fisher=True, labels="text"):
        layers.append(layer)
        for name, found in statistics.items():
            x, slope = expected[name]
            fisher = torch.stack([torch.outer(g, i).square() for g, i in zip(slope, x, strict=True)]).mean(0)
            scale = float(fisher.max())
            assert found.fisher is not None
            assert found.hessian is not None
            torch.testing.assert_close(found.fisher / scale, fisher / scale, rtol=1e-3, atol=1e-5)
            assert found.curvature == pytest.approx(float(slope.square().mean()), rel=1e-4)
            weights = slope.square().view(len(x), 2, -1).mean(2) / slope.square().mean()
            guided = torch.stack([(x * weights[:, g, None]).T @ x / len(x) for g in range(2)])
            torch.testing.assert_close(found.hessian, guided, rtol=1e-3, atol=1e-4)
    assert layers == [1, 0]
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_sampled_labels_give_the_curvature_of_kl(tiny_bundle: Factory) -> None:
    """Against the expectation over every label of the vocabulary, for the last linear of the last block."""
    bundle, ids = tiny_bundle("llama"), text(1, 32)
    seen, _, logits = traced(bundle, ids)
    x, output = (tensor[0] for tensor in seen["model.layers.1.mlp.down_proj"])
    shares = torch.softmax(logits[0].detach(), -1)
    expected = torch.zeros(output.shape[1], x.shape[1])
    for token in range(len(x)):
        logs = torch.log_softmax(logits[0, token], -1)
        slopes = torch.autograd.grad(logs, seen["model.layers.1.mlp.down_proj"][1], torch.eye(len(logs)),
                                     retain_graph=True, is_grads_batched=True)[0][:, 0, token]  # fmt: skip
        expected += torch.outer((shares[token][:, None] * slopes.square()).sum(0), x[token].detach().square())
    expected /= len(x)
    _, statistics = next(backward_walk(InMemoryBlocks(bundle), ids.repeat(100, 1), hessian=False, fisher=True))
    found = statistics["model.layers.1.mlp.down_proj"].fisher
    assert found is not None
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_the_same_seed_draws_the_same_labels(tiny_bundle: Factory) -> None:
    blocks, ids = InMemoryBlocks(tiny_bundle("qwen3")), text()

    def fisher(seed: int) -> Tensor:
        _, statistics = next(backward_walk(blocks, ids, hessian=False, fisher=True, seed=seed))
        found = statistics["model.layers.1.self_attn.o_proj"].fisher
        assert found is not None
        return found

    assert torch.equal(fisher(3), fisher(3))
    assert not torch.equal(fisher(3), fisher(4))


def test_a_walk_goes_on_behind_quantized_weights(tiny_bundle: Factory) -> None:
    bundle, ids = tiny_bundle("gemma2"), text()
    with torch.no_grad():
        _, floats, _ = traced(bundle, ids)
    changed = {name: bundle.model.get_submodule(name).weight.detach() * 1.25 for name in bundle.anatomy.linear_names()}
    met = {}
    for block in forward_walk(InMemoryBlocks(bundle), ids, keep_float=True):
        torch.testing.assert_close(torch.cat(block.float_inputs), floats[block.layer], rtol=1e-5, atol=1e-5)
        met[block.layer] = torch.cat(block.inputs)
        block.continue_with({name: changed[name] for name in block.statistics})
    for name, weight in changed.items():
        bundle.model.get_submodule(name).weight.data = weight
    with torch.no_grad():
        _, entering, _ = traced(bundle, ids)
    assert torch.equal(met[0], floats[0])
    torch.testing.assert_close(met[1], entering[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(met[1], floats[1], rtol=1e-3)


def test_states_on_disk_change_nothing(tiny_bundle: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, ids = InMemoryBlocks(tiny_bundle("llama")), text()
    in_memory = dict(backward_walk(blocks, ids))
    monkeypatch.setattr("dwindle.quantize.calibration.BoundaryStates", lambda total: BoundaryStates(total, 0))
    for layer, statistics in backward_walk(blocks, ids):
        for name, found in statistics.items():
            assert found.hessian is not None
            assert torch.equal(found.hessian, in_memory[layer][name].hessian)
    with BoundaryStates(100, 100) as held, BoundaryStates(101, 100) as stored:
        assert (held.on_disk, stored.on_disk) == (False, True)
        for block, batches in enumerate((torch.rand(2, 2, 3, 4), torch.rand(2, 2, 3, 4))):
            for batch, states in enumerate(batches):  # the places of one block's states serve the next block's
                if block:
                    stored.take(block - 1, batch, torch.device("cpu"))
                stored.put(block, batch, states)
        assert all(torch.equal(stored.take(1, i, torch.device("cpu")), batches[i]) for i in (1, 0))
        assert stored._end == 2 * 2 * 3 * 4 * 4


def test_states_that_no_disk_can_hold_are_refused() -> None:
    with pytest.raises(OutputError, match="bytes are needed"):
        BoundaryStates(10**16)


def test_rows_find_the_hessian_of_their_group() -> None:
    hessian = torch.arange(3.0).view(3, 1, 1)
    found = LayerStatistics(1, torch.ones(1), hessian)
    starts = [float(found.hessian_of_rows(slice(start, start + 4), 12)) for start in (0, 3, 4, 8, 11)]
    assert starts == [0, 0, 1, 2, 2]


def test_a_linear_without_influence_gets_its_second_moment(tiny_bundle: Factory) -> None:
    bundle, ids = tiny_bundle("mistral"), text()
    with torch.no_grad():
        bundle.model.lm_head.weight.zero_()
    _, statistics = next(backward_walk(InMemoryBlocks(bundle), ids))
    for found in statistics.values():
        assert found.hessian is not None
        assert torch.equal(found.hessian[-1], torch.diag(found.second_moment))
        assert found.curvature == 0


def test_too_short_a_text_is_refused_or_warned_of(tiny_bundle: Factory, caplog: pytest.LogCaptureFixture) -> None:
    blocks = InMemoryBlocks(tiny_bundle("llama"))
    for walk in (forward_walk, backward_walk):
        with pytest.raises(DataError, match=r"31 tokens found .* at least 32 needed because .*down_proj has 64 inputs"):
            next(iter(walk(blocks, text(1, 31))))
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        next(forward_walk(blocks, text(1, 63)))
        assert "63 tokens are fewer than the 64 inputs" in caplog.text
        caplog.clear()
        next(forward_walk(blocks, text(1, 63), hessian=False))
        next(forward_walk(blocks, text(1, 64)))
    assert not caplog.records


def test_activations_that_overflow_are_named(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("llama")
    with torch.no_grad():
        bundle.model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(torch.inf)
    with pytest.raises(DataError, match=r"1 linears are NaN or infinite on this text: model.layers.1.mlp.down_proj"):
        list(forward_walk(InMemoryBlocks(bundle), text()))
