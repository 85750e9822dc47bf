"""What a model writes: as transformers' own generation does, drawn from its own distribution, repeatably."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dwindle.continuation import continued


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=2, vocab_size=8, max_position_embeddings=64, eos_token_id=None,
                         initializer_range=0.5)  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_the_most_probable_tokens_are_those_of_generate() -> None:
    writer = model()
    found = continued(writer, PROMPTS, 20, temperature=0)
    expected = writer.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_length=20, do_sample=False,
                               pad_token_id=0)  # fmt: skip
    assert torch.equal(found, expected)


def test_draws_follow_the_distribution_at_the_temperature() -> None:
    writer, prompts = model(), PROMPTS[:1].expand(20_000, 3)
    with torch.no_grad():
        logits = writer(PROMPTS[:1]).logits[0, -1]
    for temperature in (1.0, 2.0):
        drawn = continued(writer, prompts, 4, torch.Generator().manual_seed(1), temperature)[:, 3]
        share = drawn.bincount(minlength=8) / len(drawn)
        assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.015  # 4 standard deviations of 20,000 draws


def test_the_same_seed_writes_the_same_text() -> None:
    writer = model()
    texts = [continued(writer, PROMPTS, 30, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[2][:, :3], PROMPTS)
