from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dwindle.prune.soft_top_k import soft_top_k

SCORES = st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=1, max_size=12)
TEMPERATURES = st.sampled_from([1e-3, 0.02, 0.1, 0.5, 1.0, 4.0])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_bisection(scores: Tensor, k: float, temperature: float) -> Tensor:
    """The same masks by looking for `a` alone: sum of min(1, exp((s + a) / t)) rises with it."""
    s = scores.tolist()
    low, high = -max(s) - 60 * temperature, -min(s) + temperature
    for _ in range(200):
        a = (low + high) / 2
        total = sum(min(1.0, math.exp(min(0.0, (x + a) / temperature))) for x in s)
        low, high = (a, high) if total < k else (low, a)
    return torch.tensor([min(1.0, math.exp(min(0.0, (x + high) / temperature))) for x in s], dtype=torch.float64)


def value(scores: Tensor, masks: Tensor, temperature: float) -> float:
    """What the masks maximise."""
    return float((scores * masks).sum() + temperature * torch.special.entr(masks).sum())


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("k", [1, 2.5, 33, 99, 100])
def test_the_masks_are_those_of_a_bisection(k: float, temperature: float) -> None:
    scores = normal(100)
    assert torch.allclose(soft_top_k(scores, k, temperature), by_bisection(scores, k, temperature), atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.floats(0.05, 1), TEMPERATURES)
def test_any_masks_are_those_of_a_bisection(values: list[float], share: float, temperature: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    k = share * len(values)
    assert torch.allclose(soft_top_k(scores, k, temperature), by_bisection(scores, k, temperature), atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.floats(0, 1), TEMPERATURES, st.integers(0, 99))
def test_masks_sum_to_k_and_follow_the_scores(values: list[float], share: float, temperature: float, seed: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    k = share * len(values)
    masks = soft_top_k(scores, k, temperature)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert masks.sum().item() == pytest.approx(k, abs=1e-12 * len(values))
    order = scores.argsort(stable=True)
    assert (masks[order].diff() >= -1e-15).all()
    for equal in scores.unique():
        assert len(masks[scores == equal].unique()) == 1
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(soft_top_k(scores[shuffled], k, temperature), masks[shuffled], atol=1e-14)
    assert torch.allclose(soft_top_k(scores + 3, k, temperature), masks, atol=1e-9)
    assert torch.allclose(soft_top_k(scores * 8, k, temperature * 8), masks, atol=1e-14)


def test_no_other_masks_are_better() -> None:
    scores = normal(30)
    masks = soft_top_k(scores, 11, 0.3)
    best = value(scores, masks, 0.3)
    for seed in range(50):
        step = normal(30, seed=seed + 1)
        # Units at the border 1 may only fall, and what falls must be risen elsewhere.
        other = (masks + 0.01 * (step - step.mean())).clamp(0, 1)
        other = other + (11 - other.sum()) / 30
        if other.min() >= 0 and other.max() <= 1:
            assert value(scores, other, 0.3) < best
    assert sum(bool(m == 1) for m in masks) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1000, 300), (8000, 2700)])
def test_the_sum_is_k_where_the_iteration_has_not_converged(n: int, k: int, dtype: torch.dtype) -> None:
    for temperature in (1e-6, 0.02, 0.1, 1.0):
        masks = soft_top_k(normal(n, dtype=dtype), k, temperature)
        assert masks.dtype == dtype
        assert masks.double().sum().item() == pytest.approx(k, rel=1e-7 if dtype == torch.float32 else 1e-13)


def test_a_low_temperature_chooses_the_highest_and_a_high_one_nothing() -> None:
    scores = normal(50, dtype=torch.float32)
    hard = torch.zeros(50).index_fill(0, scores.topk(17).indices, 1.0)
    assert torch.equal(soft_top_k(scores, 17, 1e-7), hard)
    assert torch.allclose(soft_top_k(scores, 17, 1e6), torch.full((50,), 17 / 50), atol=1e-5)


def test_ties_share_the_last_places() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    assert soft_top_k(scores, 3, 1e-4).tolist() == pytest.approx([2 / 3, 1, 2 / 3, 0, 2 / 3])
    assert soft_top_k(torch.ones(4), 3, 0.5).tolist() == [0.75] * 4


@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_none_and_all(temperature: float) -> None:
    scores = normal(3, 7).requires_grad_()
    assert torch.equal(soft_top_k(scores, 0, temperature), torch.zeros(3, 7))
    masks = soft_top_k(scores, 7, temperature)
    assert torch.equal(masks, torch.ones(3, 7))
    (gradient,) = torch.autograd.grad((masks * normal(3, 7, seed=1)).sum(), scores)
    assert gradient.abs().max() < 1e-10
    assert soft_top_k(torch.zeros(2, 0), 0, 1.0).shape == (2, 0)


def test_a_batch_is_its_rows() -> None:
    scores = normal(2, 3, 20)
    masks = soft_top_k(scores, 6.5, 0.2)
    for i in range(2):
        for j in range(3):
            assert torch.equal(masks[i, j], soft_top_k(scores[i, j], 6.5, 0.2))


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("k", [1, 4, 4.7, 8])
def test_the_gradient_is_that_of_finite_differences(k: float, temperature: float) -> None:
    scores = normal(2, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, k, temperature), scores, eps=1e-7, atol=1e-5)
    direction, outer = normal(2, 9, seed=1), normal(2, 9, seed=2)
    (gradient,) = torch.autograd.grad((soft_top_k(scores, k, temperature) * outer).sum(), scores)
    with torch.no_grad():
        ahead, behind = (soft_top_k(scores + h * direction, k, temperature) for h in (1e-6, -1e-6))
    slope = ((ahead - behind) * outer).sum() / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


def test_the_gradient_is_that_of_the_softmax_form() -> None:
    """With m saturated units known, autograd through (k - m) softmax(s / t) of the others gives the same gradient."""
    scores, k, temperature = normal(40), 15, 0.25
    outer = normal(40, seed=3)
    one = scores.clone().requires_grad_()
    masks = soft_top_k(one, k, temperature)
    masks.mul(outer).sum().backward()
    free = masks.detach() < 1
    two = scores.clone().requires_grad_()
    composed = torch.softmax(two[free] / temperature, 0) * (k - int((~free).sum()))
    (composed * outer[free]).sum().backward()
    assert 0 < int(free.sum()) < 40
    assert one.grad is not None
    assert two.grad is not None
    assert torch.allclose(one.grad, two.grad, atol=1e-14)
    assert not one.grad[~free].any()
    assert float(one.grad.sum()) == pytest.approx(0, abs=1e-13)


def test_gradients_have_the_type_of_the_scores() -> None:
    scores = normal(5, 30, dtype=torch.float32).requires_grad_()
    soft_top_k(scores, 10, 0.1).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == torch.float32
    wide = scores.detach().double().requires_grad_()
    soft_top_k(wide, 10, 0.1).square().sum().backward()
    assert wide.grad is not None
    assert torch.allclose(scores.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "k", "temperature"),
    [
        (torch.zeros(3), 4, 1.0),
        (torch.zeros(3), -1, 1.0),
        (torch.zeros(3), 1, 0.0),
        (torch.zeros(3), 1, math.nan),
        (torch.zeros(3, dtype=torch.int64), 1, 1.0),
        (torch.tensor(1.0), 1, 1.0),
    ],
)
def test_what_cannot_be_meant_is_refused(scores: Tensor, k: float, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"needed are floats"):
        soft_top_k(scores, k, temperature)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_masks_and_gradients() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scores, outer = normal(4, 500, dtype=torch.float32), normal(4, 500, seed=1, dtype=torch.float32)
    found = []
    for device in ("cpu", "cuda"):
        there = scores.to(device).requires_grad_()
        masks = soft_top_k(there, 170, 0.1)
        (gradient,) = torch.autograd.grad((masks * outer.to(device)).sum(), there)
        found.append((masks.detach().cpu(), gradient.cpu()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
