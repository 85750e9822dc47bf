from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dwindle.distill.bit_fields import MAX_FIELD_BITS, field_bytes, pack_fields, unpack_fields
from dwindle.distill.cache_options import CacheOptions
from dwindle.distill.losses import forward_kl
from dwindle.distill.sparse_targets import SparseTargets, sampled_kl, sampled_kl_rows
from dwindle.distill.token_sampling import SampledTokens, sample_tokens
from dwindle.distill.window_codec import WindowCodec, WindowTokens
from dwindle.errors import DataError, RecipeError

N, V, DRAWS = 6, 300, 16
SEEDS = 2000
RARE = 3 / (DRAWS * SEEDS)
"""What tokens may be off that are drawn so seldom that their standard error cannot be seen."""


def logits(seed: int, n: int = N, v: int = V) -> Tensor:
    spread = torch.linspace(0.3, 4.0, n)[:, None]
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


def dense(found: SampledTokens, draws: int, always: tuple[int, ...] = (), v: int = V) -> Tensor:
    """The weights as [n, V]: named and certain tokens their own, drawn ones 1 / draws, the rest the top-1's."""
    weights = torch.zeros(len(found.top1), v, dtype=torch.float64)
    weights[:, list(always)] = found.always.double()
    weights[found.certain_rows, found.certain_ids] = found.certain_probabilities.double()
    weights.index_put_((found.drawn_rows, found.drawn_ids), torch.tensor(1 / draws).double(), accumulate=True)
    return weights.scatter_add(1, found.top1[:, None], 1 - weights.sum(1, keepdim=True))


def mean_over_seeds(of: Callable[[Tensor], Tensor], teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error, per element, of `of` of the weights over many draws."""
    total = square = torch.zeros(())
    generator = torch.Generator().manual_seed(0)
    at_once = 100
    for _ in range(SEEDS // at_once):
        uniform = torch.rand(at_once * N, generator=generator, dtype=torch.float64)
        weights = dense(sample_tokens(teacher.repeat(at_once, 1), uniform, draws=DRAWS), DRAWS)
        for value in map(of, weights.split(N)):
            total, square = total + value, square + value**2
    mean = total / SEEDS
    return mean, ((square / SEEDS - mean**2).clamp_min(0) / SEEDS).sqrt()


def top_k(teacher: Tensor, k: int) -> Tensor:
    p = torch.softmax(teacher.double(), -1)
    kept = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1.0) * p
    return kept / kept.sum(1, keepdim=True)


def test_the_weights_have_the_probabilities_as_their_mean_and_a_top_k_has_not() -> None:
    teacher = logits(1)
    p = torch.softmax(teacher.double(), -1)
    mean, error = mean_over_seeds(lambda weights: weights, teacher)
    bound = 5.5 * error + RARE  # 1,800 numbers: one beyond 5.5 standard errors in 15,000 such tests
    assert ((mean - p).abs() <= bound).all()
    assert ((mean - p).abs().sum(1) < 0.1).all()
    for k in (DRAWS, 2 * DRAWS):
        off = (top_k(teacher, k) - p).abs()
        assert (off.sum(1)[:3] > 0.2).all(), "a flat teacher: most of it lies outside of the top k"


def test_value_and_gradient_have_those_of_the_kl_as_their_mean_and_a_top_k_has_not() -> None:
    teacher, student = logits(1), logits(2).double()
    exact = student.clone().requires_grad_()
    kl = forward_kl(exact, teacher.double())
    kl.backward()
    assert exact.grad is not None
    p = torch.softmax(teacher.double(), -1)
    entropy = -(p * p.log()).sum(-1)

    def value_and_gradient(weights: Tensor) -> Tensor:
        ids = torch.arange(V).expand(N, V)
        own = student.clone().requires_grad_()
        value = sampled_kl(own, SparseTargets(ids, weights, entropy, 1.0))
        value.backward()
        assert own.grad is not None
        return torch.cat([value.detach()[None], own.grad.flatten()])

    expected = torch.cat([kl.detach()[None], exact.grad.flatten()])
    mean, error = mean_over_seeds(value_and_gradient, teacher)
    assert ((mean - expected).abs() <= 5.5 * error + RARE).all()
    assert (mean - expected)[1:].norm() < 0.02 * expected[1:].norm()
    biased = value_and_gradient(top_k(teacher, DRAWS))
    assert (biased - expected)[1:].norm() > 0.2 * expected[1:].norm()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_of_all_tokens_the_loss_is_the_kl(temperature: float) -> None:
    teacher, ours = logits(1).double(), logits(2).double().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    p = torch.softmax(teacher / temperature, -1)
    targets = SparseTargets(torch.arange(V).expand(N, V), p, -(p * p.log()).sum(-1), temperature)
    value, expected = sampled_kl(ours, targets), forward_kl(theirs, teacher, temperature)
    (3 * value).backward()
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13)


def test_the_loss_has_its_finite_differences() -> None:
    uniform = torch.full((N,), 0.3)
    weights = dense(sample_tokens(logits(1), uniform, draws=DRAWS), DRAWS)
    kept, ids = weights.topk(40, dim=1)
    targets = SparseTargets(ids, kept, torch.ones(N), 2.0)
    assert torch.autograd.gradcheck(lambda s: sampled_kl(s, targets), logits(2).double()[:, :].requires_grad_())
    values, c = sampled_kl_rows(targets, torch.log_softmax(logits(2), -1), torch.zeros(N, V), 0.5)
    assert values.shape == (N,)
    assert torch.allclose(c, torch.full((N, 1), 0.5), atol=1e-6)


def test_what_is_kept_is_what_the_method_says() -> None:
    teacher, always = logits(1), (7, 299)
    found = sample_tokens(teacher, torch.full((N,), 0.25), draws=DRAWS, always=always)
    p = torch.softmax(teacher.double(), -1)
    assert torch.equal(found.top1, p.argmax(-1))
    assert torch.allclose(found.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)
    assert torch.allclose(found.always.double(), p[:, list(always)].where(found.top1[:, None] != torch.tensor(always), 0), atol=1e-7)  # fmt: skip
    certain = (p >= 1 / DRAWS) & (torch.arange(V) != found.top1[:, None])
    certain[:, list(always)] = False
    assert torch.equal(certain.nonzero(), torch.stack([found.certain_rows, found.certain_ids], 1))
    assert torch.allclose(found.certain_probabilities.double(), p[certain], atol=1e-6)
    rest = p.scatter(1, found.top1[:, None], 0.0).masked_fill(certain, 0.0)
    rest[:, list(always)] = 0.0
    counts = torch.bincount(found.drawn_rows, minlength=N)
    assert ((counts - DRAWS * rest.sum(1)).abs() < 1).all()
    assert (rest[found.drawn_rows, found.drawn_ids] > 0).all()
    assert len({*zip(found.drawn_rows.tolist(), found.drawn_ids.tolist(), strict=True)}) == len(found.drawn_ids)


def test_logits_of_minus_infinity_are_zeros_and_others_must_be_numbers() -> None:
    teacher = logits(1)
    teacher[:, 5] = -torch.inf
    found = sample_tokens(teacher, torch.rand(N), draws=DRAWS)
    p = torch.softmax(teacher.double(), -1)
    assert torch.allclose(found.entropy.double(), torch.special.entr(p).sum(-1), atol=1e-5)
    assert not (found.drawn_ids == 5).any()
    teacher[2, 3] = torch.nan
    with pytest.raises(DataError, match="no finite numbers"):
        sample_tokens(teacher, torch.rand(N), draws=DRAWS)


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 17, 18, MAX_FIELD_BITS])
def test_fields_come_back(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, 1001)
    values[:2] = 0, (1 << bits) - 1
    packed = pack_fields(values, bits)
    assert packed.nbytes == field_bytes(1001, bits)
    assert np.array_equal(unpack_fields(packed, bits, 1001), values)
    assert np.array_equal(unpack_fields(packed, bits, 3), values[:3])
    assert unpack_fields(pack_fields(values[:0], bits), bits, 0).size == 0


def test_fields_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 does not fit into 3 bits"):
        pack_fields(np.array([8]), 3)
    with pytest.raises(ValueError, match="1 to 25"):
        pack_fields(np.array([8]), 26)
    with pytest.raises(ValueError, match="need 7 bytes, found 2"):
        unpack_fields(np.zeros(2, np.uint8), 18, 3)


def window(positions: int = 9, named: int = 2, seed: int = 0) -> WindowTokens:
    random = np.random.default_rng(seed)
    certain, drawn = random.integers(0, 5, positions), random.integers(0, DRAWS, positions)
    certain[3] = drawn[3] = 0
    return WindowTokens(
        random.uniform(0, 8, positions), random.integers(0, 1000, positions), random.uniform(0, 1, (positions, named)),
        certain, random.integers(0, 1000, certain.sum()), random.uniform(1 / DRAWS, 1, certain.sum()),
        drawn, random.integers(0, 1000, drawn.sum()),
    )  # fmt: skip


def test_a_window_comes_back_and_rounding_has_no_bias() -> None:
    codec, given = WindowCodec(1000, DRAWS, 2), window()
    given.named[0] = 0.0, 1e-12
    given.certain_probabilities[0] = 1 / DRAWS
    total, rounds = np.zeros(0), 1000
    random = np.random.default_rng(1)
    numbers = np.concatenate([given.entropy, given.named.ravel(), given.certain_probabilities])
    for _ in range(rounds):
        found = codec.decode(np.frombuffer(codec.encode(given, random.uniform(size=9)), np.uint8), 9)
        for name in ("top1", "certain_counts", "certain_ids", "drawn_counts", "drawn_ids"):
            assert np.array_equal(getattr(found, name), getattr(given, name))
        got = np.concatenate([found.entropy, found.named.ravel(), found.certain_probabilities])
        assert np.abs(found.entropy - given.entropy).max() <= 1 / 128
        assert np.allclose(found.named, given.named, rtol=4e-4, atol=2**-32)
        assert np.allclose(found.certain_probabilities, given.certain_probabilities, rtol=0.012)
        total = total + got if total.size else got
    step = np.concatenate(
        [np.full(9, 1 / 128), 4e-4 * given.named.ravel() + 2**-32, 0.012 * given.certain_probabilities]
    )
    assert (np.abs(total / rounds - numbers) <= 5 * step / 2 / math.sqrt(rounds)).all()
    assert found.named[0, 0] == 0
    assert (
        codec.decode(np.frombuffer(codec.encode(given, random.uniform(size=9)), np.uint8), 9).certain_probabilities[0]
        == 1 / DRAWS
    )


def test_a_position_of_a_vocabulary_of_152k_takes_at_most_60_bytes() -> None:
    """Logits whose entropy, 3 nats, is that of a small language model's predictions; larger ones are surer."""
    vocabulary, n = 152_064, 24
    rank = torch.arange(1, vocabulary + 1).float().log()
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(n, 1, generator=generator) * 1.6 + 1.2  # Zipf's exponents: entropies of 0.8 to 6.5 nats
    order = torch.rand(n, vocabulary, generator=generator).argsort(1)
    teacher = torch.zeros(n, vocabulary).scatter(1, order, -shapes * rank)
    draws = CacheOptions("x").draws
    found = sample_tokens(teacher, torch.rand(n, generator=generator), draws=draws)
    assert 2 < found.entropy.mean() < 4
    counts = [np.bincount(rows.numpy(), minlength=n) for rows in (found.certain_rows, found.drawn_rows)]
    tokens = WindowTokens(found.entropy.double().numpy(), found.top1.numpy(), found.always.numpy(), counts[0],
                          found.certain_ids.numpy(), found.certain_probabilities.double().numpy(), counts[1],
                          found.drawn_ids.numpy())  # fmt: skip
    assert len(WindowCodec(vocabulary, draws, 0).encode(tokens, np.full(n, 0.5))) / n < 60


def test_all_wrong_options_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        CacheOptions("", draws=1, temperature=0.0, always=(3, 3), shard_tokens=0, batch_tokens=0)
    for name in ("folder", "draws=1", "temperature=0", "always=[3, 3]", "shard_tokens=0", "batch_tokens=0"):
        assert name in str(caught.value)
