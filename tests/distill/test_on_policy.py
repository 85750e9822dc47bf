"""Written windows: how many, by whom, which predictions and losses count; the loss against the naive computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.continuation import continued
from dwindle.distill.loss_spec import LossSpec
from dwindle.distill.losses import forward_kl
from dwindle.distill.objective import DistillObjective
from dwindle.distill.on_policy import OnPolicyObjective
from dwindle.distill.on_policy_options import OnPolicyOptions
from dwindle.distill.options import DistillOptions
from dwindle.distill.teacher_signal import LiveTeacher
from dwindle.errors import RecipeError

Factory = Callable[..., Any]
MIX = (LossSpec("forward_kl"), LossSpec("label_cross_entropy", 0.5))


def objective(teacher: Any, mix: tuple[LossSpec, ...] = MIX, **options: Any) -> OnPolicyObjective:
    inner = DistillObjective(mix, LiveTeacher(teacher))
    return OnPolicyObjective(inner, OnPolicyOptions(**options), teacher.model)


def batch(bundle: Any, rows: int = 4, length: int = 13) -> torch.Tensor:
    return torch.randint(3, bundle.anatomy.vocab, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_over_the_steps_the_share_is_exact(share: float, size: int) -> None:
    counts = [OnPolicyOptions(share=share).rows(size, step) for step in range(40)]
    assert sum(counts) == pytest.approx(40 * size * share, abs=1)
    assert max(counts) - min(counts) <= 1


def test_the_students_own_words_are_judged_by_divergence_alone(tiny_bundle: Factory) -> None:
    teacher, student = tiny_bundle("llama", seed=1), tiny_bundle("llama", seed=2)
    ids = batch(student)
    torch.manual_seed(7)
    found, parts = objective(teacher, share=1.0, prompt_share=0.3).loss(student.model, ids)
    torch.manual_seed(7)
    text = continued(student.model, ids[:, :4], 13)
    with torch.no_grad():
        ours, theirs = (b.model(input_ids=text[:, :-1]).logits[:, 3:].flatten(0, 1) for b in (student, teacher))
    assert found.item() == pytest.approx(forward_kl(ours, theirs).item(), rel=1e-5)
    assert set(parts) == {"forward_kl_written"}


def test_the_teachers_words_are_labels(tiny_bundle: Factory) -> None:
    teacher, student = tiny_bundle("llama", seed=1), tiny_bundle("llama", seed=2)
    ids = batch(student)
    mix = (LossSpec("label_cross_entropy"),)
    found, _ = objective(teacher, mix, share=1.0, writer="teacher", temperature=0.0, prompt_share=0.3).loss(
        student.model, ids)  # fmt: skip
    text = continued(teacher.model, ids[:, :4], 13, temperature=0)
    with torch.no_grad():
        logits = student.model(input_ids=text[:, :-1]).logits[:, 3:].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, text[:, 4:].flatten())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_read_and_written_windows_weigh_by_their_predictions(tiny_bundle: Factory) -> None:
    teacher, student = tiny_bundle("llama", seed=1), tiny_bundle("llama", seed=2)
    ids = batch(student)
    mixed = objective(teacher, (LossSpec("forward_kl"),), share=0.25, prompt_share=0.3)
    torch.manual_seed(7)
    found, parts = mixed.loss(student.model, ids)
    read, _ = mixed.inner.loss(student.model, ids[1:])
    written, read_count = 12 - 3, 3 * 12
    expected = (parts["forward_kl_written"] * written + read.item() * read_count) / (written + read_count)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert parts["forward_kl"] == pytest.approx(read.item())


def test_gradients_flow_and_dropout_comes_back(tiny_bundle: Factory) -> None:
    teacher, student = tiny_bundle("llama", seed=1), tiny_bundle("llama", seed=2)
    student.model.train()
    try:
        loss, _ = objective(teacher, share=0.5).loss(student.model, batch(student))
        loss.backward()
        assert all(p.grad is not None for p in student.model.parameters())
        assert all(module.training for module in student.model.modules())
    finally:
        student.model.zero_grad()
        student.model.eval()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0, "writer": "both", "prompt_share": 1.0, "temperature": -1.0},
         r"share=0.0 .*writer='both' .*prompt_share=1.0 .*temperature=-1.0"),
        ({"share": 1.5}, "share=1.5"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OnPolicyOptions(**values)


def test_labels_alone_cannot_judge_the_students_words() -> None:
    with pytest.raises(RecipeError, match="label_cross_entropy, top1_blend read labels"):
        OnPolicyOptions().losses((LossSpec("label_cross_entropy"), LossSpec("top1_blend", 0.9)))


def test_a_recipe_says_it_in_full_or_by_the_share() -> None:
    assert DistillOptions(on_policy=OnPolicyOptions.of("0.3")).on_policy == OnPolicyOptions(share=0.3)
    with pytest.raises(RecipeError, match="on_policy='half' is no number"):
        OnPolicyOptions.of("half")
    with pytest.raises(RecipeError, match="read labels"):
        DistillOptions(losses=("label_cross_entropy",), on_policy=OnPolicyOptions())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="on_policy with a cache"):
        DistillOptions(on_policy=OnPolicyOptions(), cache="folder")  # type: ignore[arg-type]
