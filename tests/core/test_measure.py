from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dwindle.data import evaluation_set
from dwindle.errors import DataError, GateFailed, RecipeError, UnsupportedModel
from dwindle.measure import Meter, logit_slices
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256


def token_set(bundle: Any, ids: list[int], text_bytes: int = 100, role: Any = "evaluation") -> TokenSet:
    return TokenSet(torch.tensor([ids]), role, "text", "0", text_bytes, encoding_sha256(bundle.tokenizer))


def random_ids(count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def by_hand(bundle: Any, teacher: Any, ids: list[int], context: int) -> tuple[float, float, float]:
    """Every window on its own, in float64, straight from the definition."""
    nats = kl = agreed = 0.0
    for start in range(0, len(ids) - 1, context):
        inputs = torch.tensor(ids[start : start + context][: len(ids) - 1 - start])
        targets = torch.tensor(ids[start + 1 : start + context + 1])
        with torch.no_grad():
            q = bundle.model(inputs[None]).logits[0].double().log_softmax(-1)
            p = teacher.model(inputs[None]).logits[0].double().log_softmax(-1)
        nats -= float(q[range(len(targets)), targets].sum())
        kl += float((p.exp() * (p - q)).sum())
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
    count = len(ids) - 1
    return nats / count, kl / count, agreed / count


@pytest.mark.parametrize("count", [64, 65, 66, 128, 129, 300])
def test_every_token_but_the_first_is_predicted_once(tiny_bundle: Any, count: int) -> None:
    student, teacher = tiny_bundle("llama", seed=1), tiny_bundle("llama", seed=2)
    ids = random_ids(count)
    found = Meter(token_set(student, ids), teacher, batch_tokens=130).measure(student)
    nats, kl, agreed = by_hand(student, teacher, ids, context=64)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert found.kl_nats_per_token == pytest.approx(kl, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreed)
    assert found.bits_per_byte == pytest.approx(nats * (count - 1) / math.log(2) / 100, rel=1e-5)
    assert found.parameters == student.size().parameters


def test_slices_of_one_position_and_one_window_give_the_same(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_bundle("gemma2", seed=1), tiny_bundle("gemma2", seed=2)
    tokens = token_set(student, random_ids(150))
    whole = Meter(tokens, teacher).measure(student)
    monkeypatch.setattr("dwindle.measure._SLICE_BYTES", 1)
    sliced = Meter(tokens, teacher, batch_tokens=1).measure(student)
    assert sliced.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-6)
    assert sliced.kl_nats_per_token == pytest.approx(whole.kl_nats_per_token, rel=1e-4)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
)
def test_slices_are_the_models_logits(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    ids = torch.tensor([random_ids(12), random_ids(12)[::-1]])
    with torch.no_grad():
        expected = bundle.model(ids).logits.flatten(0, 1)
        found = torch.cat(list(logit_slices(bundle)(ids, 5)))
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_teacher_runs_once_if_its_states_are_small(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny_bundle(seed=1), tiny_bundle(seed=2)
    calls: list[int] = []
    teacher.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    meter = Meter(token_set(student, random_ids(300)), teacher, batch_tokens=64)
    first = meter.measure(student)
    assert (meter.measure(student), len(calls)) == (first, 5)
    monkeypatch.setattr("dwindle.measure._REMEMBERED_BYTES", 0)
    assert (meter.measure(student), len(calls)) == (first, 10)


def test_the_teacher_measures_itself_as_perfect(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    found = Meter(token_set(bundle, random_ids(70)), bundle).measure(bundle)
    assert (found.kl_nats_per_token, found.top1_agreement) == (0.0, 1.0)


def test_without_teacher_and_with_a_prefix(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    ids = random_ids(200)
    found = Meter(token_set(bundle, ids), max_tokens=90, context=32).measure(bundle)
    nats, _, _ = by_hand(bundle, bundle, ids[:90], context=32)
    assert found.nats_per_token == pytest.approx(nats, rel=1e-5)
    assert (found.bits_per_byte, found.kl_nats_per_token, found.top1_agreement) == (None, None, None)


def test_training_mode_is_restored(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    bundle.model.train()
    Meter(token_set(bundle, random_ids(20))).measure(bundle)
    assert bundle.model.training


def test_another_vocabulary_size_is_refused(tiny_bundle: Any) -> None:
    bundle, teacher = tiny_bundle(), tiny_bundle(vocab_size=264)
    with pytest.raises(UnsupportedModel, match=r"264 entries, the student's 272.*Or measure without"):
        Meter(token_set(bundle, random_ids(20)), teacher).measure(bundle)


def test_rows_of_no_token_in_the_teacher_are_left_out(tiny_bundle: Any) -> None:
    bundle, teacher, ids = tiny_bundle(), tiny_bundle(vocab_size=300), random_ids(20)
    found = Meter(token_set(bundle, ids), teacher).measure(bundle)
    with torch.no_grad():
        p, q = (one.model(torch.tensor([ids[:-1]])).logits[..., :272].log_softmax(-1) for one in (teacher, bundle))
    assert found.kl_nats_per_token == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_another_tokenizer_is_refused(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    tokens = token_set(bundle, random_ids(20))
    bundle.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="another tokenizer"):
        Meter(tokens).measure(bundle)


def test_a_window_longer_than_a_context_is_refused(tiny_bundle: Any) -> None:
    bundle, teacher = tiny_bundle(), tiny_bundle(max_position_embeddings=32)
    with pytest.raises(RecipeError, match=r"teacher has 32.*data.context=32"):
        Meter(token_set(bundle, random_ids(20)), teacher).measure(bundle)


def test_bad_options_and_sets_are_refused(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    with pytest.raises(RecipeError, match="batch_tokens=0"):
        Meter(token_set(bundle, random_ids(20)), batch_tokens=0)
    with pytest.raises(DataError, match="role 'train'"):
        Meter(token_set(bundle, random_ids(20), role="train"))
    with pytest.raises(DataError, match="at least 2 tokens"):
        Meter(token_set(bundle, [1]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nats", "bits"), [("stories260K", 1.4801, 1.0402), ("babyllama-105", 0.7767, 1.1130)])
def test_reference_numbers_of_real_models(assets: Any, name: str, nats: float, bits: float) -> None:
    from dwindle.bundle import ModelBundle

    bundle = ModelBundle.load(assets / "models" / name)
    found = Meter(evaluation_set(assets / "data/text/tinystories_valid.txt", bundle.tokenizer)).measure(bundle)
    assert found.nats_per_token == pytest.approx(nats, abs=5e-5)
    assert found.bits_per_byte == pytest.approx(bits, abs=5e-5)


def test_logits_that_are_no_numbers_have_no_quality(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    tokens = token_set(bundle, random_ids(70))
    with torch.no_grad():
        bundle.model.model.norm.weight.fill_(3e38)
    for teacher in (None, tiny_bundle(seed=1)):
        with pytest.raises(GateFailed, match="no finite numbers"):
            Meter(tokens, teacher).measure(bundle)
