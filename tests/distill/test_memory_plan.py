"""The arithmetic of a distillation: against what real layers save, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo2Config, PretrainedConfig, Qwen3Config

from dwindle.anatomy import anatomy_of
from dwindle.distill.memory_plan import MemoryPlan, ModelSize, layer_numbers, memory_plan
from dwindle.distill.options import DistillOptions
from dwindle.errors import RecipeError
from dwindle.model_source import attention_of, skeleton_of

SHAPE = {"hidden_size": 96, "intermediate_size": 264, "num_attention_heads": 6, "num_key_value_heads": 2,
         "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 128}  # fmt: skip
LLAMA_3B = LlamaConfig(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, num_key_value_heads=8,
                       num_hidden_layers=28, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
LLAMA_6B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8,
                       num_hidden_layers=34, vocab_size=128256)  # fmt: skip


def saved_bytes(config: PretrainedConfig, *, bf16: bool) -> float:
    """Return the bytes per token that a layer of `config` keeps for its backward pass, weights apart."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config)).train()
    hidden = torch.randn(1, 60, config.hidden_size, requires_grad=True)
    positions = torch.arange(60)[None]
    rope = model.model.rotary_emb(hidden, positions)
    weights = {p.numel() for p in model.parameters() if p.ndim == 2}
    outside = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *rope]}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside and not (tensor.dtype == torch.bfloat16 and tensor.numel() in weights):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.model.layers[0](hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    return sum(size for size, _ in kept.values()) / 60


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (LlamaConfig(**SHAPE), 0.001),
        (Qwen3Config(**SHAPE), 0.05),
        (Olmo2Config(**{**SHAPE, "num_key_value_heads": 6}), 0.1),
    ],
    ids=["llama", "qwen3", "olmo2"],
)
def test_a_layer_keeps_what_the_formula_says(config: PretrainedConfig, tolerance: float, bf16: bool) -> None:
    wide, narrow = layer_numbers(anatomy_of(config))
    readers = (5 if bf16 else 2) * config.hidden_size
    expected = 4 * wide + (2 if bf16 else 4) * (narrow + readers)
    assert saved_bytes(config, bf16=bf16) == pytest.approx(expected, rel=tolerance)


def plan(processes: int = 8, teacher: PretrainedConfig = LLAMA_6B, **options: object) -> MemoryPlan:
    sizes = [ModelSize.of(skeleton_of(config), config) for config in (LLAMA_3B, teacher)]
    chosen = DistillOptions(**{"batch_size": 64, "precision": "bf16", "tokens": 1_000_000, **options})  # type: ignore[arg-type]
    return memory_plan(sizes[0], anatomy_of(LLAMA_3B), sizes[1], chosen, context=4096, processes=processes)


def test_weights_are_those_of_the_models_and_shared_out() -> None:
    exact = sum(p.numel() for p in skeleton_of(LLAMA_3B).parameters())
    one, eight = plan(1), plan(8)
    assert one.bytes_per_process["student weights"] == 4 * exact
    assert "gathered layers" not in one.bytes_per_process
    for name in ("student weights", "gradients", "AdamW moments", "teacher weights"):
        assert eight.bytes_per_process[name] == pytest.approx(one.bytes_per_process[name] / 8, abs=8)


def test_checkpointing_and_smaller_pieces_make_a_run_fit() -> None:
    plain = plan()
    assert not plain.fits
    assert any("activation_checkpointing" in line for line in plain.advice)
    small = plan(activation_checkpointing=True, gradient_accumulation=8)
    assert small.fits
    assert not small.advice
    assert small.bytes_per_process["activations"] < plain.bytes_per_process["activations"] / 8
    assert small.tokens_per_second[1] < plain.tokens_per_second[1]
    assert plan(64).tokens_per_second[1] == pytest.approx(8 * plain.tokens_per_second[1])


def test_the_answer_as_json_and_as_a_table() -> None:
    made = plan(activation_checkpointing=True, gradient_accumulation=8)
    told = made.to_json()
    assert told["total_bytes"] == sum(told["bytes_per_process"].values())
    low, high = told["tokens_per_second"]["range"]
    assert low < told["tokens_per_second"]["value"] < high
    assert told["hours"]["range"][0] < told["hours"]["value"] < told["hours"]["range"][1]
    assert told["cache_bytes"] == 60_000_000
    assert "8 processes on h100-80gb" in made.table()
    assert "fits 92% of 80 GB" in made.table()


def test_a_mixture_of_experts_costs_the_time_of_what_it_uses() -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
                           num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=128)  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = ModelSize.of(model, config)
    experts = 2 * 8 * 3 * 64 * 96
    assert size.parameters - size.active_parameters == experts * 6 // 8


def test_a_batch_that_cannot_be_cut_and_an_unknown_gpu_are_named_together() -> None:
    sizes = ModelSize.of(skeleton_of(LLAMA_3B), LLAMA_3B)
    with pytest.raises(RecipeError, match=r"h100' is unknown.*h100-80gb.*batch_size=32 cannot be cut into 24 pieces"):
        memory_plan(sizes, anatomy_of(LLAMA_3B), sizes, DistillOptions(), context=512, processes=24, gpu="h100")
