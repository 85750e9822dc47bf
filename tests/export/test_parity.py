"""The gate itself: it passes what is equal, catches each way to be wrong, and names what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.divergence import forward_kl
from dwindle.errors import DataError, GateFailed, RecipeError
from dwindle.export.parity import _TEXT, Comparison, ParityLimits, decode_parity, parity_prompts, require_parity
from dwindle.quantized_model import QuantizedLinear, apply_quantized_weights
from dwindle.report import Artifact, Parity
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode
from dwindle.weights import AffineWeight


class StockRunner:
    """The stock model with its own cache as a runner, with one thing wrong."""

    def __init__(self, bundle: Any, wrong: Callable[[Tensor], Tensor] = lambda logits: logits,
                 position_offset: int = 0) -> None:  # fmt: skip
        self.bundle, self.wrong, self.offset = bundle, wrong, position_offset
        self.calls: list[int] = []
        self.fed: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        self.cache, self.length = None, 0

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        self.calls.append(ids.shape[1])
        self.fed.append(ids)
        start = self.length + (self.offset if self.length else 0)
        out = self.bundle.model(input_ids=ids, past_key_values=self.cache, use_cache=True,
                                position_ids=torch.arange(start, start + ids.shape[1])[None])  # fmt: skip
        self.cache, self.length = out.past_key_values, self.length + ids.shape[1]
        return self.wrong(out.logits[0])


def evaluation(count: int, role: Any = "evaluation") -> TokenSet:
    return TokenSet(torch.arange(count)[None] % 250, role, "text.txt", "0" * 64, count, "1" * 64)


def test_an_equal_runner_passes_with_one_prefill_and_single_steps(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    runner = StockRunner(bundle)
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 2, 16), 32, executed_by="torch")
    assert parity.passed
    assert parity.tokens_checked == 96
    assert parity.executed_by == "torch"
    assert runner.calls == ([16] + [1] * 32) * 2
    assert parity.max_abs_logit_error <= 1e-5
    assert 0 <= parity.kl_nats_per_token <= 1e-10


def test_the_text_goes_on_with_what_the_artifact_finds_likeliest(tiny_bundle: Callable[..., Any]) -> None:
    runner = StockRunner(tiny_bundle("llama"), lambda logits: logits * -1)
    (prompt,) = parity_prompts(runner.bundle, 1, 8)
    decode_parity(runner.bundle, runner, [prompt], 3)
    with torch.no_grad():
        for count in (1, 2, 3):
            text = torch.cat(runner.fed[:count], dim=1)
            assert int(runner.fed[count]) == int(runner.bundle.model(text).logits[0, -1].argmin())


@pytest.mark.parametrize(("length", "pieces"), [(1, [1]), (3, [1, 1, 1]), (5, [1] * 5), (9, [5] + [1] * 4)])
def test_a_longest_text_is_fed_in_a_piece_and_its_last_tokens_one_by_one(
    length: int, pieces: list[int], tiny_bundle: Callable[..., Any]
) -> None:
    runner, ids = StockRunner(tiny_bundle("llama")), torch.arange(97, 97 + length)[None]
    parity = decode_parity(runner.bundle, runner, parity_prompts(runner.bundle, 1, 6), 2, longest=ids)
    assert runner.calls == [6, 1, 1, *pieces]
    assert torch.equal(torch.cat(runner.fed[3:], dim=1), ids)
    assert parity.passed
    assert (parity.tokens_checked, parity.longest_tokens) == (8 + length, length)
    assert decode_parity(runner.bundle, runner, parity_prompts(runner.bundle, 1, 6), 2).longest_tokens == 0


def test_a_longest_text_is_cut_at_256_tokens(tiny_bundle: Callable[..., Any]) -> None:
    runner = StockRunner(tiny_bundle("llama", max_position_embeddings=1024))
    ids = torch.arange(600)[None] % 250
    assert decode_parity(runner.bundle, runner, [ids[:, :4]], 0, longest=ids).tokens_checked == 604
    assert runner.calls == [4, 256, 256, 84, 1, 1, 1, 1]


def test_a_runner_that_is_wrong_at_the_last_position_alone_is_caught(tiny_bundle: Callable[..., Any]) -> None:
    runner, ids = StockRunner(tiny_bundle("llama")), torch.arange(97, 137)[None]
    runner.wrong = lambda logits: logits + (runner.length == 40) * torch.arange(logits.shape[1])
    assert decode_parity(runner.bundle, runner, [ids[:, :8]], 4).passed
    assert not decode_parity(runner.bundle, runner, [ids[:, :8]], 4, longest=ids).passed


LIMITS = ParityLimits(logit_error_share=0.1, kl_nats_per_token=0.5, top1_agreement=0.5)


@pytest.mark.parametrize(
    ("change", "limits", "passed"),
    [
        ({}, LIMITS, True),  # each number stands at its limit
        ({"largest_error": 1.01}, LIMITS, False),
        ({"kl_sum": 4.1}, LIMITS, False),
        ({"agreeing": 3}, LIMITS, False),
        ({"finite": False}, LIMITS, False),
        ({"largest_error": 1.9}, replace(LIMITS, logit_error_floor=1.9), True),
        ({"largest_error": 2.0}, replace(LIMITS, logit_error_floor=1.9), False),
        ({"largest_error": 0.99}, replace(LIMITS, logit_error_floor=0.5), True),
    ],
)
def test_every_limit_decides_alone(change: dict[str, Any], limits: ParityLimits, passed: bool) -> None:
    base = Comparison(tokens=8, agreeing=4, kl_sum=4.0, largest_error=1.0, largest_logit=10.0)
    verdict = replace(base, **change).verdict(limits, "torch", 0)
    assert verdict.passed is passed
    assert verdict.limits["max_abs_logit_error"] == max(0.1 * 10.0, limits.logit_error_floor)


def test_the_limits_are_those_of_the_docs() -> None:
    assert asdict(ParityLimits()) == {"logit_error_share": 5e-4, "kl_nats_per_token": 1e-8, "top1_agreement": 0.98,
                                      "logit_error_floor": 0.0}  # fmt: skip
    assert ParityLimits(0, 0, 1, 0).top1_agreement == 1


def test_pieces_of_both_sides_need_not_fall_together() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * 0.1
    found = logits + 0.25
    found[33, 2] += 3
    comparison = Comparison()
    comparison.add(iter(torch.split(logits, [17, 3, 20])), torch.split(found, [1, 30, 9]))
    assert comparison.tokens == 40
    assert comparison.largest_error == pytest.approx(3.25, abs=1e-5)
    assert comparison.largest_logit == pytest.approx(float(logits.abs().max()))
    assert comparison.largest_logit < 1
    assert comparison.kl_sum == pytest.approx(40 * forward_kl(found.double(), logits.double()).item(), rel=1e-6)
    assert comparison.agreeing == int((logits.argmax(-1) == found.argmax(-1)).sum())


@pytest.mark.parametrize(
    ("wrong", "offset"),
    [
        (lambda logits: logits.half().float() * 1.002, 0),
        (lambda logits: logits.bfloat16().float(), 0),
        (lambda logits: logits.roll(1, dims=-1), 0),
        (lambda logits: logits, 1),
    ],
    ids=["scaled", "bfloat16", "shifted vocabulary", "positions off by one"],
)
def test_each_wrong_runner_is_caught(
    wrong: Callable[[Tensor], Tensor], offset: int, tiny_bundle: Callable[..., Any]
) -> None:
    bundle = tiny_bundle("llama")
    parity = decode_parity(bundle, StockRunner(bundle, wrong, offset), parity_prompts(bundle, 1, 16), 8)
    assert not parity.passed


@torch.no_grad()
def test_numbers_are_those_of_the_definition(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    prompt = parity_prompts(bundle, 1, 4)

    def louder_first_token(logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[:, 0] += 0.5
        return changed

    parity = decode_parity(bundle, StockRunner(bundle, louder_first_token), prompt, 1)
    assert parity.max_abs_logit_error == pytest.approx(0.5, abs=1e-5)
    text = torch.cat([prompt[0], bundle.model(prompt[0]).logits[:, -1:].argmax(-1)], dim=1)
    log_p = bundle.model(text).logits[0].double().log_softmax(-1)
    log_q = louder_first_token(bundle.model(text).logits[0]).double().log_softmax(-1)
    assert parity.kl_nats_per_token == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)


def test_not_a_number_fails_and_stays_valid_json(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    runner = StockRunner(bundle, lambda logits: logits * float("nan"))
    parity = decode_parity(bundle, runner, parity_prompts(bundle, 1, 8), 2)
    assert not parity.passed
    json.dumps(asdict(parity), allow_nan=False)


def test_a_vocabulary_of_another_size_is_our_bug_not_a_number(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(ValueError, match="logits have the shapes"):
        decode_parity(bundle, StockRunner(bundle, lambda logits: logits[:, :-1]), parity_prompts(bundle, 1, 8), 2)


def test_dense_weights_are_dropped_again(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    name = "model.layers.0.mlp.up_proj"
    codes, scales = torch.full((64, 32), 9, dtype=torch.uint8), torch.full((64, 1), 0.01).half()
    apply_quantized_weights(bundle.model, {name: AffineWeight(codes, scales, None, 4, 32)})
    layer = bundle.model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    assert decode_parity(bundle, StockRunner(bundle), parity_prompts(bundle, 1, 8), 2).passed
    assert not layer.cache_dense


def test_prompts_come_from_the_evaluation_set_or_a_fixed_text(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    spread = parity_prompts(bundle, 3, 10, evaluation(100))
    assert [int(p[0, 0]) for p in spread] == [0, 45, 90]
    assert all(p.shape == (1, 10) for p in spread)
    fixed = parity_prompts(bundle, 2, 16)
    assert torch.equal(fixed[0], parity_prompts(bundle, 2, 16)[0])
    assert fixed[0][0, 0] == bundle.tokenizer.bos_token_id
    assert not torch.equal(fixed[0], fixed[1])
    assert parity_prompts(bundle, 1, 4000)[0].shape == (1, 4000)
    assert [int(p[0, 0]) for p in parity_prompts(bundle, 2, 10, evaluation(10))] == [0, 0]
    ids = torch.tensor(encode(bundle.tokenizer, _TEXT))
    assert torch.equal(fixed[1][0], ids.repeat(2)[len(ids) - 16 : len(ids)])  # no longer than it has to be
    with pytest.raises(DataError, match="has 9 tokens, a prompt needs 10"):
        parity_prompts(bundle, 1, 10, evaluation(9))
    with pytest.raises(DataError, match="has the role 'train'"):
        parity_prompts(bundle, 1, 10, evaluation(100, "train"))
    with pytest.raises(DataError, match="no prompt was given"):
        decode_parity(bundle, StockRunner(bundle), [])


def test_limits_are_validated() -> None:
    with pytest.raises(RecipeError, match=r"logit_error_share=-1 must .*; top1_agreement=2 is a share"):
        ParityLimits(logit_error_share=-1, top1_agreement=2)
    with pytest.raises(RecipeError, match="kl_nats_per_token=nan"):
        ParityLimits(kl_nats_per_token=float("nan"))


def test_require_parity_names_every_miss() -> None:
    good = Artifact("onnx", "out/onnx", 1, "0", Parity(1e-6, 1e-12, 1.0, 96, "onnxruntime"))
    bad = replace(good, format="coreml", path="out/coreml", parity=Parity(3.0, 0.2, 0.5, 96, "evaluator", passed=False))
    require_parity([good, replace(good, parity=None)])
    with pytest.raises(GateFailed, match=r"1 of 2 artifacts .* coreml out/coreml: max \|logit error\| 3 .* evaluator"):
        require_parity([good, bad])
    assert GateFailed("x").exit_code == 1
