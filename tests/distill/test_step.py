from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.distill import DistillObjective, DistillOptions, LiveTeacher, LossSpec, run
from dwindle.distill.losses import forward_kl, top1_blend
from dwindle.errors import DataError, RecipeError
from dwindle.measure import Meter
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

MIX = (LossSpec("top1_blend", 0.9), LossSpec("forward_kl", 0.5, temperature=2.0))


def windows(bundle: Any, count: int = 24, tokens: int = 17, role: Any = "train") -> TokenSet:
    """Windows of a small counting language, so that there is something to learn."""
    start = torch.randint(0, 40, (count, 1), generator=torch.Generator().manual_seed(3))
    ids = (start + torch.arange(tokens)) % 40
    return TokenSet(ids, role, "counting", str(count), 1, encoding_sha256(bundle.tokenizer))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_objective_is_the_sum_of_its_losses(tiny_bundle: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.distill.fused_loss.CHUNK_BYTES", {"cpu": 20 * 272 * 4})
    teacher, student = tiny_bundle(family, seed=1), tiny_bundle(family, seed=2, intermediate_size=32)
    batch = windows(student).ids[:3]
    total, parts = DistillObjective(MIX, LiveTeacher(teacher)).loss(student.model, batch)
    with torch.no_grad():
        p, q = (b.model(batch[:, :-1]).logits.flatten(0, 1) for b in (teacher, student))
    blend = top1_blend(q, p.argmax(-1), batch[:, 1:].flatten(), 0.9).item()
    kl = 0.5 * forward_kl(q, p, 2.0).item()
    assert parts == pytest.approx({"top1_blend": blend, "forward_kl": kl}, rel=1e-5)
    assert total.item() == pytest.approx(blend + kl, rel=1e-5)
    total.backward()
    assert all(parameter.grad is not None for parameter in student.model.parameters())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_live_teacher_gives_hidden_states_and_never_logits(tiny_bundle: Any) -> None:
    teacher = tiny_bundle("gemma2")
    ids = windows(teacher).ids
    targets = LiveTeacher(teacher).targets(ids)
    assert targets.logits is None
    assert targets.states[0].hidden.shape == (24 * 17, 32)
    with torch.no_grad():
        assert torch.allclose(targets.states[0].logits(), teacher.model(ids).logits.flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize("losses", [("forward_kl",), ("top1_blend=0.9",), ("label_cross_entropy",)])
def test_distillation_brings_the_student_closer(tiny_bundle: Any, losses: Any) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2, intermediate_size=32)
    weights = {name: p.clone() for name, p in student.model.named_parameters()}
    options = DistillOptions(losses=losses, steps=30, batch_size=8, learning_rate=5e-3)
    distilled, record = run(student, options, teacher=teacher, train=windows(student))
    assert record.details["last_loss"] < record.details["first_loss"]
    assert record.details["steps"] == 30
    assert record.skipped == ()
    assert "warning" not in record.details
    assert all(torch.equal(weights[name], p) for name, p in student.model.named_parameters())
    text = TokenSet(windows(student).ids[:4].reshape(1, -1), "evaluation", "t", "0", 9, student_hash(student))
    before, after = (Meter(text, teacher).measure(bundle) for bundle in (student, distilled))
    if losses == ("forward_kl",):
        assert after.kl_nats_per_token < before.kl_nats_per_token
    elif losses == ("top1_blend=0.9",):
        assert after.top1_agreement > before.top1_agreement
    else:
        assert after.nats_per_token < before.nats_per_token


def student_hash(bundle: Any) -> str:
    return encoding_sha256(bundle.tokenizer)


def test_what_was_trained_is_what_is_stored(tiny_bundle: Any, tmp_path: Path) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2, storage_dtype=torch.float16)
    distilled, _ = run(student, DistillOptions(steps=3, batch_size=4), teacher=teacher, train=windows(student))
    distilled.save(tmp_path / "model")
    ids = windows(student).ids[:2]
    with torch.no_grad():
        assert torch.equal(ModelBundle.load(tmp_path / "model").model(ids).logits, distilled.model(ids).logits)
    assert distilled.lineage.steps[-1] == "distill"


def test_a_loss_that_got_worse_is_said_aloud(tiny_bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny_bundle(seed=1)
    options = DistillOptions(steps=5, batch_size=4, learning_rate=0.5, warmup_share=0, log_every=1,
                             divergence_margin=None)  # fmt: skip
    _, record = run(teacher, options, teacher=teacher, train=windows(teacher))
    assert record.details["last_loss"] > record.details["first_loss"]
    assert "no better than" in record.details["warning"]
    assert record.skipped[0].what == "distill: improvement"
    assert "no better than" in caplog.text


def test_a_stopped_run_goes_on_and_another_mix_is_refused(tiny_bundle: Any, tmp_path: Path) -> None:
    teacher, student = tiny_bundle(seed=1), tiny_bundle(seed=2)
    options = DistillOptions(steps=6, batch_size=4, checkpoint_every=2)
    whole, _ = run(student, options, teacher=teacher, train=windows(student))

    def stop(line: Any) -> None:
        if line.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run", on_step=stop)
    resumed, _ = run(student, options, teacher=teacher, train=windows(student), folder=tmp_path / "run")
    assert resumed.content_sha256 == whole.content_sha256
    other = DistillOptions(steps=6, batch_size=4, checkpoint_every=2, losses=(LossSpec("top1_blend", 0.9),))
    with pytest.raises(RecipeError, match="losses"):
        run(student, other, teacher=teacher, train=windows(student), folder=tmp_path / "run")


def test_everything_that_does_not_go_together_is_named_at_once(
    tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny_bundle(max_position_embeddings=16), tiny_bundle(vocab_size=300)
    teacher.tokenizer.add_tokens(["<new>"])
    monkeypatch.setattr(ModelBundle, "quantized", property(lambda bundle: bundle is student))
    with pytest.raises(RecipeError) as caught:
        run(student, DistillOptions(steps=1), teacher=teacher, train=windows(student, tokens=18))
    message = str(caught.value)
    for reason in ("student is quantized", "teacher's vocabulary has 300 entries, the student's 272", "tokenizers differ",
                   "windows predict 17 tokens, the student's context is 16"):  # fmt: skip
        assert reason in message
    assert student_hash(student)[:12] in message
    assert student_hash(teacher)[:12] in message


def test_data_of_another_role_is_refused(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with pytest.raises(DataError, match="role 'calibration'"):
        run(bundle, DistillOptions(steps=1), teacher=bundle, train=windows(bundle, role="calibration"))
