from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dwindle.distill.fused_loss import fused_loss
from dwindle.distill.head import Head, HeadStates
from dwindle.distill.loss_mix import LossMix, Term
from dwindle.distill.row_losses import (
    forward_kl_rows,
    jsd_rows,
    reverse_kl_rows,
    skew_kl_rows,
    skew_reverse_kl_rows,
    taid_rows,
    top1_blend_rows,
    top_k_rows,
)
from dwindle.distill.sparse_targets import SparseTargets
from dwindle.distill.teacher_signal import TeacherTargets

sys.path.insert(0, str(Path(__file__).parent))
from naive_losses import naive_rows

N, D, WIDE, V = 13, 6, 9, 37


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


HIDDEN, WEIGHT, BIAS = numbers(N, D, seed=0), numbers(V, D, seed=1), numbers(V, seed=2)
TEACHER = HeadStates(numbers(N, WIDE, seed=3), Head(numbers(V, WIDE, seed=4), numbers(V, seed=5)))
LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(6))
MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1])

FORMULAS: dict[str, tuple[Term, dict[str, float]]] = {
    "forward_kl": (Term("forward_kl", forward_kl_rows, 0.7, 2.0), {"temperature": 2.0}),
    "reverse_kl": (Term("reverse_kl", reverse_kl_rows, 0.5), {}),
    "jsd": (Term("jsd", jsd_rows(0.3), 1.5), {"beta": 0.3}),
    "skew_kl": (Term("skew_kl", skew_kl_rows(0.1), 1.0, 2.0), {"alpha": 0.1, "temperature": 2.0}),
    "skew_reverse_kl": (Term("skew_reverse_kl", skew_reverse_kl_rows(0.2), 0.3), {"alpha": 0.2}),
    "top_k": (Term("top_k", top_k_rows(5), 1.0, 0.5), {"k": 5, "temperature": 0.5}),
    "taid": (Term("taid", taid_rows(0.4), 0.8), {"t": 0.4}),
    "top1_blend": (
        Term("top1_blend", top1_blend_rows(0.9), reads_teacher=False, reads_top1=True), {"share": 0.9},
    ),
    "label_cross_entropy": (Term("label_cross_entropy", top1_blend_rows(0.0), 0.1, reads_teacher=False), {}),
}  # fmt: skip
MIXES = [*((name,) for name in FORMULAS), ("jsd", "label_cross_entropy"), tuple(FORMULAS)]


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def reference(
    names: tuple[str, ...], cap: float | None, mask: Tensor | None, teacher: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and the gradients by hidden states, weight and bias of naive torch in float64."""
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()]
    student = capped(torch.nn.functional.linear(*leaves), cap)
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        term, given = FORMULAS[name]
        rows = naive_rows(name, student, teacher, LABELS, **given)
        total = total + term.weight * (rows.mean() if mask is None else rows[mask != 0].mean())
    total.backward()
    return total, [leaf.grad for leaf in leaves if leaf.grad is not None]


def fused(
    names: tuple[str, ...], cap: float | None = None, mask: Tensor | None = None, *, chunk_bytes: int | None = None,
    dtype: torch.dtype = torch.float64, targets: TeacherTargets | None = None, scale: float = 1.0,
) -> tuple[Tensor, dict[str, float], list[Tensor]]:  # fmt: skip
    leaves = [part.to(dtype).requires_grad_() for part in (HIDDEN.clone(), WEIGHT.clone(), BIAS.clone())]
    mix = LossMix(tuple(FORMULAS[name][0] for name in names))
    head = TEACHER.head
    assert head.bias is not None
    states = HeadStates(TEACHER.hidden.to(dtype), Head(head.weight.to(dtype), head.bias.to(dtype), cap))
    loss, parts = fused_loss(
        leaves[0], Head(leaves[1], leaves[2], cap), mix, targets=targets or TeacherTargets(states=(states,)),
        labels=LABELS, mask=mask, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    (scale * loss).backward()
    return loss, parts, [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_values_and_gradients_are_naive_torchs(
    names: tuple[str, ...], cap: float | None, mask: Tensor | None, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.distill.fused_loss.SLICE_ELEMENTS", {"cpu": 2 * V})
    teacher = capped(HeadStates.logits(TEACHER), cap)
    expected, gradients = reference(names, cap, mask, teacher)
    loss, parts, found = fused(names, cap, mask, chunk_bytes=chunk_rows * V * 8, scale=3.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    assert sum(parts.values()) == pytest.approx(expected.item(), rel=1e-11)
    assert list(parts) == list(names)
    for own, naive in zip(found, gradients, strict=True):
        assert torch.allclose(own, 3 * naive, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_float32_is_within_a_hundred_thousandth(names: tuple[str, ...]) -> None:
    expected, gradients = reference(names, None, None, TEACHER.logits())
    loss, _, found = fused(names, chunk_bytes=4 * V * 4, dtype=torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for own, naive in zip(found, gradients, strict=True):
        assert float((own - naive).norm() / naive.norm()) < 1e-5


def test_gradients_are_finite_differences() -> None:
    mix = LossMix(tuple(term for name, (term, _) in FORMULAS.items() if name != "taid"))
    along = [numbers(N, D, seed=10), numbers(V, D, seed=11)]

    def loss(step: float) -> tuple[Tensor, Tensor]:
        hidden, weight = (part + step * way for part, way in zip((HIDDEN, WEIGHT), along, strict=True))
        hidden.requires_grad_(), weight.requires_grad_()
        states = TeacherTargets(states=(TEACHER,))
        value, _ = fused_loss(hidden, Head(weight), mix, targets=states, labels=LABELS, chunk_bytes=5 * V * 8)
        slopes = torch.autograd.grad(value, (hidden, weight))
        return value.detach(), sum((slope * way).sum() for slope, way in zip(slopes, along, strict=True))

    step = 1e-5
    difference = (loss(step)[0] - loss(-step)[0]) / (2 * step)
    assert loss(0.0)[1].item() == pytest.approx(difference.item(), rel=1e-7)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_products_come_close_and_add_up_wide(autocast: bool) -> None:
    expected, gradients = reference(("jsd", "label_cross_entropy"), None, None, TEACHER.logits())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _, found = fused(("jsd", "label_cross_entropy"), chunk_bytes=4 * V * 2,
                               dtype=torch.float32 if autocast else torch.bfloat16)  # fmt: skip
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for own, naive in zip(found, gradients, strict=True):
        assert own.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert float((own - naive).norm() / naive.norm()) < 2e-2


def test_logits_states_and_known_top1_are_one_teacher() -> None:
    logits = TEACHER.logits()
    forms = [TeacherTargets(states=(TEACHER,)), TeacherTargets(logits=logits),
             TeacherTargets(logits.argmax(-1), states=(TEACHER,))]  # fmt: skip
    names = ("forward_kl", "top1_blend")
    losses = [fused(names, targets=form, chunk_bytes=4 * V * 8)[0].item() for form in forms]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_a_teacher_that_no_loss_reads_is_not_computed() -> None:
    broken = TeacherTargets(states=(HeadStates(torch.zeros(N, 1), Head(torch.zeros(V, 5))),))
    expected, _ = reference(("label_cross_entropy",), None, None, TEACHER.logits())
    assert fused(("label_cross_entropy",), targets=broken)[0].item() == pytest.approx(expected.item())


def test_several_teachers_are_the_mean_of_their_probabilities() -> None:
    other = HeadStates(numbers(N, D, seed=8), Head(numbers(V, D, seed=9)))
    mean = 0.75 * TEACHER.logits().softmax(-1) + 0.25 * other.logits().softmax(-1)
    both = TeacherTargets(states=(TEACHER, other), shares=(0.75, 0.25))
    names = ("reverse_kl", "top1_blend")
    expected, gradients = reference(names, None, MASK, mean.log())
    loss, _, found = fused(names, None, MASK, targets=both, chunk_bytes=4 * V * 8)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(found[0], gradients[0], rtol=1e-5, atol=1e-8)


def test_weighted_tokens_stand_for_the_teacher() -> None:
    """Every token with its probability as weight is the whole distribution."""
    p = TEACHER.logits().div(2.0).softmax(-1)
    ids = p.argsort(-1, descending=True)
    entropy = -(p * p.log()).sum(-1)
    sparse = SparseTargets(ids, p.gather(1, ids), entropy, 2.0)
    names = ("forward_kl", "top1_blend")
    expected, gradients = reference(names, None, MASK, TEACHER.logits())
    targets = TeacherTargets(sparse.top1, None, sparse)
    loss, _, found = fused(names, None, MASK, targets=targets, chunk_bytes=4 * V * 8)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(found[1], gradients[1], rtol=1e-5, atol=1e-8)


def test_nothing_counts() -> None:
    loss, parts, found = fused(("forward_kl",), mask=torch.zeros(N))
    assert loss.item() == 0
    assert parts == {"forward_kl": 0.0}
    assert not any(gradient.any() for gradient in found)


def test_a_frozen_head_gets_no_gradient_and_no_gradient_means_no_graph() -> None:
    mix, states = LossMix((FORMULAS["forward_kl"][0],)), TeacherTargets(states=(TEACHER,))
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone()
    loss, _ = fused_loss(hidden, Head(weight), mix, targets=states)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not fused_loss(hidden, Head(weight), mix, targets=states)[0].requires_grad


def test_gradients_can_be_had_once() -> None:
    mix = LossMix((FORMULAS["forward_kl"][0],))
    loss, _ = fused_loss(HIDDEN.clone().requires_grad_(), Head(WEIGHT), mix, targets=TeacherTargets(states=(TEACHER,)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_a_tied_head_adds_to_the_embeddings_gradient() -> None:
    table = WEIGHT.clone().requires_grad_()
    ids = torch.arange(N) * 2
    mix = LossMix((FORMULAS["forward_kl"][0],))
    loss, _ = fused_loss(table[ids], Head(table), mix, targets=TeacherTargets(states=(TEACHER,)))
    loss.backward()
    other = WEIGHT.clone().requires_grad_()
    rows = naive_rows("forward_kl", other[ids] @ other.t(), TEACHER.logits(), LABELS, temperature=2.0)
    (0.7 * rows.mean()).backward()
    assert table.grad is not None
    assert other.grad is not None
    assert torch.allclose(table.grad, other.grad, rtol=1e-9, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation gives, and how often one of that size was made."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return result


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    positions, vocabulary, width, chunk_rows = 64, 1000, 8, 4
    hidden, weight = torch.randn(positions, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    teacher = HeadStates(torch.randn(positions, width), Head(torch.randn(vocabulary, width)))
    labels = torch.randint(0, vocabulary, (positions,))
    mix = LossMix(tuple(term for term, _ in FORMULAS.values()))
    with LargestTensor() as seen:
        loss, _ = fused_loss(
            hidden, Head(weight), mix, targets=TeacherTargets(states=(teacher,)), labels=labels,
            chunk_bytes=chunk_rows * vocabulary * 4,
        )  # fmt: skip
        loss.backward()
    gradient = vocabulary * width * 4
    logits = chunk_rows * vocabulary * 4
    assert max(seen.storages.values()) == max(gradient, logits)
    assert max(seen.storages.values()) < positions * vocabulary * 4 / 7
