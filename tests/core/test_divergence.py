from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dwindle.divergence import forward_kl, mean_over_slices

N, V = 11, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).to(dtype)


@pytest.mark.parametrize("elements", [1, 3 * V, 1 << 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_value_and_gradient_are_those_of_torchs_kl_div(
    temperature: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.divergence._SLICE_ELEMENTS", {"cpu": elements})
    ours, theirs, teacher = logits(0).requires_grad_(), logits(0).requires_grad_(), logits(1)
    value = forward_kl(ours, teacher, temperature)
    expected = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(theirs / temperature, -1), torch.log_softmax(teacher / temperature, -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    (3 * value).backward()
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_the_value_is_the_divergence_and_not_a_cross_entropy() -> None:
    same = logits(0)
    assert forward_kl(same, same + 5.0).item() == pytest.approx(0.0, abs=1e-14)
    uniform = forward_kl(torch.zeros(1, 4), torch.tensor([[100.0, 0.0, 0.0, 0.0]]))
    assert uniform.item() == pytest.approx(math.log(4))


def test_the_sum_over_slices_is_wide_and_the_gradient_is_in_the_logits_type() -> None:
    student = logits(0, torch.bfloat16).requires_grad_()
    value = forward_kl(student, logits(1, torch.bfloat16))
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_other_losses_of_the_form_can_be_built_on_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.divergence._SLICE_ELEMENTS", {"cpu": 2 * V})
    seen: list[int] = []

    def half_square(rows: slice, part: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(part))
        return 0.5 * part.square().sum(dtype=torch.float64), part.clone()

    student = logits(0).requires_grad_()
    value = mean_over_slices(student, half_square)
    value.backward()
    assert seen == [2, 2, 2, 2, 2, 1]
    assert value.item() == pytest.approx(0.5 * student.detach().square().sum().item() / N)
    assert student.grad is not None
    assert torch.allclose(student.grad, student.detach() / N)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    forward_kl(student, teacher).backward()
    assert teacher.grad is None
