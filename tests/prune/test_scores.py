from __future__ import annotations

from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.errors import DataError
from dwindle.prune import PruneOptions, plan
from dwindle.prune.depth_scores import block_influence, leave_one_out
from dwindle.prune.gradient_scores import gradient_axis_scores
from dwindle.prune.scores import (
    activation_axis_scores,
    activation_scores,
    magnitude_axis_scores,
    magnitude_scores,
)
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256


def calibration_of(bundle: Any, windows: int = 5, tokens: int = 12, role: Any = "calibration") -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, role, "random", "0", 1, encoding_sha256(bundle.tokenizer))


def seen_by(bundle: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """The input of a module in float64."""
    found: list[torch.Tensor] = []
    hook = module(bundle.model, name).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].double()))
    with torch.no_grad():
        bundle.model(ids)
    hook.remove()
    return found[0]


def window_losses(bundle: Any, ids: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy of each window."""
    with torch.no_grad():
        log_q = torch.log_softmax(bundle.model(ids).logits.double(), -1)
    return -log_q[:, :-1].gather(2, ids[:, 1:, None])[..., 0].sum(1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_activation_scores_are_the_formula(tiny_bundle: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    parts = bundle.anatomy.parts(1)
    units = seen_by(bundle, parts["down"], calibration.ids)
    groups = seen_by(bundle, parts["o"], calibration.ids).unflatten(-1, (2, -1)).norm(dim=-1)
    monkeypatch.setattr("dwindle.prune.calibration_pass._BATCH_TOKENS", 24)
    found = activation_axis_scores(bundle, calibration)
    assert len(found.ffn) == len(found.groups) == 2
    assert torch.allclose(found.ffn[1], units.abs().mean(dim=1).norm(p=2, dim=0), rtol=1e-5)
    assert torch.allclose(found.groups[1], groups.mean(dim=1).norm(p=2, dim=0), rtol=1e-5)
    assert torch.equal(activation_scores(bundle, calibration)[1], found.ffn[1])


def test_activation_scores_of_channels_add_up_what_reads_them(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    calibration = calibration_of(bundle)
    names = [bundle.anatomy.parts(layer)[part] for layer in (0, 1) for part in ("q", "gate")] + ["lm_head"]
    read = [seen_by(bundle, name, calibration.ids).abs().mean(dim=1).norm(p=2, dim=0) for name in names]
    found = activation_axis_scores(bundle, calibration).channels
    assert found is not None
    assert torch.allclose(found, torch.stack(read).sum(0), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_magnitude_scores_are_the_norm_of_a_units_weights(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    parts = bundle.anatomy.parts(0)
    weights = {part: module(bundle.model, name).weight.double() for part, name in parts.items()}
    if family == "phi3":
        gate, up = weights["gate_up"].chunk(2)
        q, k, v = weights["qkv"].split([32, 16, 16])
    else:
        gate, up, q, k, v = (weights[part] for part in ("gate", "up", "q", "k", "v"))
    units = torch.stack([torch.cat([gate[j], up[j], weights["down"][:, j]]).norm() for j in range(64)])
    groups = [
        torch.cat([q[16 * g : 16 * g + 16].flatten(), k[8 * g : 8 * g + 8].flatten(), v[8 * g : 8 * g + 8].flatten(),
                   weights["o"][:, 16 * g : 16 * g + 16].flatten()]).norm()
        for g in range(2)
    ]  # fmt: skip
    found = magnitude_axis_scores(bundle)
    assert torch.allclose(magnitude_scores(bundle)[0], units)
    assert torch.allclose(found.ffn[0], units)
    assert torch.allclose(found.groups[0], torch.stack(groups))


def test_magnitude_scores_of_channels(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("qwen2", tie_word_embeddings=False)
    total = torch.zeros(32).double()
    for name, weight in bundle.model.named_parameters():
        if weight.dim() == 2:
            total += weight.double().square().sum(1 if "o_proj" in name or "down_proj" in name else 0)
    found = magnitude_axis_scores(bundle).channels
    assert found is not None
    assert torch.allclose(found, total.sqrt())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "olmo2"])
def test_taylor_and_fisher_are_the_slope_of_the_loss(tiny_bundle: Any, family: str) -> None:
    """The derivative by a mask is held to a central difference of the masked model's loss."""
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    taylor = gradient_axis_scores(bundle, calibration, "taylor")
    fisher = gradient_axis_scores(bundle, calibration, "fisher")
    parts, step = bundle.anatomy.parts(1), 1e-2
    cases = [(parts["down"], slice(5, 6), taylor.ffn[1][5], fisher.ffn[1][5])]
    size = bundle.anatomy.heads * bundle.anatomy.head_dim // 2
    cases.append((parts["o"], slice(size, 2 * size), taylor.groups[1][1], fisher.groups[1][1]))
    for name, where, by_taylor, by_fisher in cases:
        losses = []
        for factor in (1 + step, 1 - step):

            def scale(_: Any, given: Any, factor: float = factor, where: slice = where) -> Any:
                changed = given[0].clone()
                changed[..., where] *= factor
                return (changed,)

            hook = module(bundle.model, name).register_forward_pre_hook(scale)
            losses.append(window_losses(bundle, calibration.ids))
            hook.remove()
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(by_taylor) == pytest.approx(float(slope.abs().sum()), rel=0.02)
        assert float(by_fisher) == pytest.approx(float(slope.square().sum() / 2), rel=0.02)


def test_a_score_by_gradient_stores_no_gradient(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    found = gradient_axis_scores(bundle, calibration_of(bundle), "taylor")
    assert found.channels is not None
    assert len(found.channels) == 32
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_block_influence_is_one_minus_the_cosine(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    first = seen_by(bundle, bundle.anatomy.layer_path(0), calibration.ids)
    second = seen_by(bundle, bundle.anatomy.layer_path(1), calibration.ids)
    expected = 1 - torch.cosine_similarity(first, second, dim=-1).mean()
    assert float(block_influence(bundle, calibration)[0]) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_leave_one_out_is_the_loss_of_the_model_without_the_layer(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    whole = window_losses(bundle, calibration.ids).sum()
    found = leave_one_out(bundle, calibration)
    parts = bundle.anatomy.parts(1)
    with torch.no_grad():  # a layer whose two writes are zero hands its input on
        for name in (parts["o"], parts["down"]):
            module(bundle.model, name).weight.zero_()
    without = window_losses(bundle, calibration.ids).sum()
    assert float(found[1]) == pytest.approx(float((without - whole) / (5 * 11)), abs=1e-4)


def test_calibration_data_that_does_not_fit_the_model(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    options = PruneOptions(ffn_keep=0.5)
    with pytest.raises(DataError, match="role 'train'"):
        plan(bundle, options, calibration_of(bundle, role="train"))
    with pytest.raises(DataError, match="context is 64"):
        plan(bundle, options, calibration_of(bundle, tokens=65))
    tokens = calibration_of(bundle)
    bundle.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="another tokenizer"):
        plan(bundle, options, tokens)
