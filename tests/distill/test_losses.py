from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dwindle.distill.losses import (
    forward_kl,
    jsd,
    label_cross_entropy,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
    top1_blend,
    top_k,
)

sys.path.insert(0, str(Path(__file__).parent))
from naive_losses import naive_rows

N, V = 11, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).to(dtype)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))


TEACHER, TOP1, LABELS = logits(1), logits(1).argmax(-1), tokens(2)
MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1])

Loss = Callable[..., Tensor]
CASES: dict[str, tuple[Loss, dict[str, float], str]] = {
    "kl": (lambda s, m=None: forward_kl(s, TEACHER, mask=m), {}, "forward_kl"),
    "kl at 2": (lambda s, m=None: forward_kl(s, TEACHER, 2.0, m), {"temperature": 2.0}, "forward_kl"),
    "kl at 0.5": (lambda s, m=None: forward_kl(s, TEACHER, 0.5, m), {"temperature": 0.5}, "forward_kl"),
    "reverse": (lambda s, m=None: reverse_kl(s, TEACHER, 2.0, m), {"temperature": 2.0}, "reverse_kl"),
    "jsd": (lambda s, m=None: jsd(s, TEACHER, 0.3, 2.0, m), {"beta": 0.3, "temperature": 2.0}, "jsd"),
    "jsd 0": (lambda s, m=None: jsd(s, TEACHER, 0.0, mask=m), {}, "forward_kl"),
    "jsd 1": (lambda s, m=None: jsd(s, TEACHER, 1.0, mask=m), {}, "reverse_kl"),
    "skew": (lambda s, m=None: skew_kl(s, TEACHER, 0.1, 2.0, m), {"alpha": 0.1, "temperature": 2.0}, "skew_kl"),
    "skew 0": (lambda s, m=None: skew_kl(s, TEACHER, 0.0, mask=m), {}, "forward_kl"),
    "skew reverse": (lambda s, m=None: skew_reverse_kl(s, TEACHER, 0.2, mask=m), {"alpha": 0.2}, "skew_reverse_kl"),
    "skew reverse 0": (lambda s, m=None: skew_reverse_kl(s, TEACHER, 0.0, mask=m), {}, "reverse_kl"),
    "top 3": (lambda s, m=None: top_k(s, TEACHER, 3, 2.0, m), {"k": 3, "temperature": 2.0}, "top_k"),
    "taid": (lambda s, m=None: taid(s, TEACHER, 0.4, 2.0, m), {"t": 0.4, "temperature": 2.0}, "taid"),
    "blend": (lambda s, m=None: top1_blend(s, TOP1, LABELS, 0.9, m), {"share": 0.9}, "top1_blend"),
    "label": (lambda s, m=None: label_cross_entropy(s, LABELS, m), {}, "label_cross_entropy"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 20])
@pytest.mark.parametrize("mask", [None, MASK])
def test_value_and_gradient_are_naive_torchs(
    name: str, elements: int, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.divergence._SLICE_ELEMENTS", {"cpu": elements})
    loss, given, formula = CASES[name]
    ours, theirs = logits(0).requires_grad_(), logits(0).requires_grad_()
    value, rows = loss(ours, mask), naive_rows(formula, theirs, TEACHER, LABELS, **given)
    expected = rows.mean() if mask is None else rows[mask != 0].mean()
    (3 * value).backward()
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name != "taid"])
def test_gradients_are_finite_differences(name: str) -> None:
    loss, _, _ = CASES[name]
    assert torch.autograd.gradcheck(loss, logits(5).requires_grad_())


def test_the_target_between_student_and_teacher_moves() -> None:
    student = logits(0)
    assert taid(student, TEACHER, 0.0).item() == pytest.approx(0.0, abs=1e-14)
    assert taid(student, TEACHER, 1.0).item() == pytest.approx(forward_kl(student, TEACHER).item())
    assert 0 < taid(student, TEACHER, 0.5).item() < forward_kl(student, TEACHER).item()


def test_the_jsd_has_both_divergences_as_limits() -> None:
    small, student, teacher = 1e-6, logits(0) / 3, TEACHER / 3
    assert jsd(student, teacher, small).item() / small == pytest.approx(forward_kl(student, teacher).item(), rel=1e-4)
    near_one = jsd(student, teacher, 1 - small).item() / small
    assert near_one == pytest.approx(reverse_kl(student, teacher).item(), rel=1e-4)


def test_more_tokens_of_the_teacher_come_closer_to_the_whole_divergence() -> None:
    student, whole = logits(0), forward_kl(logits(0), TEACHER).item()
    found = [top_k(student, TEACHER, k).item() for k in range(1, V + 1)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole)
    assert found[-2] == pytest.approx(whole)  # the bucket of one token is that token
    assert top_k(student, TEACHER, 10 * V).item() == pytest.approx(whole)


def test_a_mask_of_zeros_is_a_loss_of_zero() -> None:
    student = logits(0).requires_grad_()
    value = forward_kl(student, TEACHER, mask=torch.zeros(N))
    value.backward()
    assert value.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


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


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("blend", "label")])
def test_equal_models_have_no_divergence_and_next_to_no_gradient(name: str) -> None:
    student = TEACHER.float().requires_grad_()
    value = CASES[name][0](student)
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-7)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-7


EXTREME: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "forward": (forward_kl, 2e4),
    "reverse": (reverse_kl, 2e4),
    "jsd": (jsd, math.log(2)),
    "skew": (skew_kl, math.log(10)),
    "skew reverse": (skew_reverse_kl, math.log(10)),
    "top 1": (lambda s, t: top_k(s, t, 1), 2e4),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_stay_finite(name: str) -> None:
    loss, expected = EXTREME[name]
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    value = loss(student, torch.tensor([[1e4, -1e4, 0.0]]))
    value.backward()
    assert value.item() == pytest.approx(expected)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    if name == "forward":
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
        jsd(logits(0, torch.float32).requires_grad_(), logits(1, torch.float32))
    assert sum(kept) == N * V * 4
