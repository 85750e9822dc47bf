from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dwindle.bundle import ModelBundle
from dwindle.distill import DistillObjective, DistillOptions, LiveTeacher, LossSpec, run
from dwindle.distill.layer_match import (
    PROJECTIONS,
    LayerOutputs,
    attach_projections,
    hidden_cosine,
    hidden_mse,
    layer_pairs,
)
from dwindle.distill.teacher_signal import SeveralTeachers
from dwindle.errors import RecipeError
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

PAIRS = ((1, 2), (2, 4))


def windows(bundle: Any, count: int = 12, tokens: int = 9) -> TokenSet:
    ids = torch.randint(0, 250, (count, tokens), generator=torch.Generator().manual_seed(3))
    return TokenSet(ids, "train", "random", str(count), 1, encoding_sha256(bundle.tokenizer))


def test_masked_positions_do_not_count() -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0])
    kept = mask.bool()
    assert hidden_mse(student, teacher, mask).item() == pytest.approx(hidden_mse(student[kept], teacher[kept]).item())
    assert hidden_cosine(student, teacher, mask).item() == pytest.approx(
        hidden_cosine(student[kept], teacher[kept]).item()
    )
    assert hidden_mse(student, teacher, torch.zeros(5)).item() == 0


def test_layers_meet_at_the_same_share_of_the_depth() -> None:
    assert layer_pairs(2, 2) == ((1, 1), (2, 2))
    assert layer_pairs(4, 2) == ((1, 1), (2, 1), (3, 2), (4, 2))
    assert layer_pairs(1, 7) == ((1, 7),)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_layers_are_heard_as_transformers_counts_them(tiny_bundle: Any, family: str) -> None:
    model, ids = tiny_bundle(family, num_hidden_layers=2).model, torch.arange(14).view(2, 7)
    with torch.no_grad(), LayerOutputs(model, [1]) as outputs:
        model(ids)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(outputs.flat()[1], states[1].flatten(0, 1))


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize("width", [32, 16])
def test_the_objective_matches_the_layers(tiny_bundle: Any, measure: Any, width: int) -> None:
    teacher = tiny_bundle(seed=1, num_hidden_layers=4)
    student = tiny_bundle(seed=2, hidden_size=width, head_dim=8)
    model, batch = student.model, windows(student).ids
    attach_projections(model, PAIRS, width, 32)
    assert hasattr(model, PROJECTIONS) == (width != 32)
    spec = LossSpec("hidden_states", 0.5, measure=measure)
    objective = DistillObjective((spec,), LiveTeacher(teacher, layers=[2, 4]), PAIRS)
    loss, parts = objective.loss(model, batch)
    loss.backward()
    with torch.no_grad(), LayerOutputs(model, [1, 2]) as own, LayerOutputs(teacher.model, [2, 4]) as other:
        model(batch[:, :-1])
        teacher.model(batch[:, :-1])
    projections = getattr(model, PROJECTIONS, None)
    distance = {"mse": hidden_mse, "cosine": hidden_cosine}[measure]
    expected = 0.0
    for mine, theirs in PAIRS:
        states = own.flat()[mine] if projections is None else projections[str(mine)](own.flat()[mine])
        expected += 0.25 * distance(states, other.flat()[theirs]).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert parts == {"hidden_states": pytest.approx(expected, rel=1e-5)}
    if projections is not None:
        assert all(p.grad is not None and p.grad.any() for p in projections.parameters())


def test_projections_start_alike_and_leave_the_random_state() -> None:
    models = [nn.Linear(4, 4), nn.Linear(4, 4)]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for model in models:
        attach_projections(model, PAIRS, 4, 6)
    assert torch.equal(torch.rand(3), wanted)
    first, second = (getattr(model, PROJECTIONS)["1"].weight for model in models)
    assert torch.equal(first, second)
    assert torch.allclose(first.t() @ first, torch.eye(4), atol=1e-5)


def test_a_run_learns_projections_and_stores_none(tiny_bundle: Any, tmp_path: Any) -> None:
    teacher = tiny_bundle(seed=1, num_hidden_layers=4)
    student = tiny_bundle(seed=2, hidden_size=16, head_dim=8)
    mix: Any = ["forward_kl", {"name": "hidden_states", "weight": 0.5, "layers": {1: 1, 2: 4}}]
    options = DistillOptions(losses=mix, steps=12, batch_size=6, learning_rate=5e-3)
    distilled, record = run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run")
    history = record.details["history"]
    assert history[-1]["hidden_states"] < history[0]["hidden_states"]
    assert not hasattr(distilled.model, PROJECTIONS)
    distilled.save(tmp_path / "model")
    assert ModelBundle.load(tmp_path / "model").content_sha256 == distilled.content_sha256
    again, _ = run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run")
    assert again.content_sha256 == distilled.content_sha256


def test_layers_that_are_not_there_are_named(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    mix: Any = [{"name": "hidden_states", "layers": [[1, 3], [5, 1]]}]
    with pytest.raises(RecipeError, match=r"student's layers \[5\], it has 2; .* teacher's layers \[3\], it has 2"):
        run(bundle, DistillOptions(losses=mix, steps=1), teacher=bundle, train=windows(bundle))


def test_several_teachers_need_a_share_each(tiny_bundle: Any) -> None:
    teachers = [LiveTeacher(tiny_bundle(seed=seed)) for seed in (1, 2)]
    student, batch = tiny_bundle(seed=3), windows(tiny_bundle()).ids[:2]
    mean = DistillObjective((LossSpec("forward_kl"),), SeveralTeachers(teachers, [1.0, 3.0])).loss(student.model, batch)
    with torch.no_grad():
        p = [tiny_bundle(seed=seed).model(batch[:, :-1]).logits.softmax(-1) for seed in (1, 2)]
        q = student.model(batch[:, :-1]).logits.softmax(-1)
    blended = 0.25 * p[0] + 0.75 * p[1]
    assert mean[0].item() == pytest.approx((blended * (blended / q).log()).sum(-1).mean().item(), rel=1e-4)
    with pytest.raises(RecipeError, match="2 teachers with the shares"):
        SeveralTeachers(teachers, [1.0])
    with pytest.raises(RecipeError, match="above 0"):
        SeveralTeachers(teachers, [1.0, 0.0])
