from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dwindle.distill.losses import forward_kl, label_cross_entropy, top1_blend

N, V = 11, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).to(dtype)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))


TEACHER, TOP1, LABELS = logits(1), logits(1).argmax(-1), tokens(2)


def naive_kl(student: Tensor, temperature: float) -> Tensor:
    p = torch.softmax(TEACHER / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda s: forward_kl(s, TEACHER), lambda s: naive_kl(s, 1.0)),
    "kl at 2": (lambda s: forward_kl(s, TEACHER, 2.0), lambda s: naive_kl(s, 2.0)),
    "kl at 0.5": (lambda s: forward_kl(s, TEACHER, 0.5), lambda s: naive_kl(s, 0.5)),
    "blend": (
        lambda s: top1_blend(s, TOP1, LABELS, 0.9),
        lambda s: 0.9 * F.cross_entropy(s, TOP1) + 0.1 * F.cross_entropy(s, LABELS),
    ),
    "label": (lambda s: label_cross_entropy(s, LABELS), lambda s: F.cross_entropy(s, LABELS)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 20])
def test_value_and_gradient_are_naive_torchs(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.divergence._SLICE_ELEMENTS", {"cpu": elements})
    loss, naive = CASES[name]
    ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
    value, expected = loss(ours), naive(theirs)
    (3 * value).backward()
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name: str) -> None:
    loss, _ = CASES[name]
    assert torch.autograd.gradcheck(loss, logits(5).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_summed_wide(dtype: torch.dtype) -> None:
    student = logits(0, dtype).requires_grad_()
    value = forward_kl(student, logits(1, dtype))
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == dtype
    p, q = (torch.softmax(logits(seed, dtype).double(), -1) for seed in (1, 0))
    assert value.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert torch.allclose(student.grad.double(), (q - p) / N, atol=1e-7 if dtype == torch.float32 else 1e-3)


def test_equal_models_have_no_kl_and_no_gradient() -> None:
    student = logits(0, torch.float32).requires_grad_()
    value = forward_kl(student, student.detach().clone())
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    value = forward_kl(student, torch.tensor([[1e4, -1e4, 0.0]]))
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_without_gradients_nothing_is_attached_or_changed() -> None:
    student, teacher = logits(0), logits(1)
    value = forward_kl(student, teacher)
    assert not value.requires_grad
    assert torch.equal(student, logits(0))
    assert torch.equal(teacher, logits(1))


def test_only_the_gradient_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_kl(logits(0, torch.float32).requires_grad_(), logits(1, torch.float32))
    assert sum(kept) == N * V * 4
