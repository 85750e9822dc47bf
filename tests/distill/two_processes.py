"""A distillation of a tiny student, run in one process or in two (started by torchrun)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dwindle.distill import DistillObjective, LiveTeacher, LossSpec, OnPolicyOptions, Teacher
from dwindle.distill.layer_match import attach_projections
from dwindle.distill.on_policy import OnPolicyObjective
from dwindle.distill.probe import Probe
from dwindle.token_set import TokenSet
from dwindle.train import TrainOptions, train

VOCAB, TEACHER_WIDTH, PAIRS = 272, 32, ((1, 1), (2, 3))
OPTIONS = TrainOptions(steps=6, batch_size=8, gradient_accumulation=2, learning_rate=1e-2, log_every=1,
                       evaluate_every=2)  # fmt: skip
LOSSES = (
    LossSpec("jsd", 0.7, temperature=2.0),
    LossSpec("top1_blend", 0.9),
    LossSpec("taid", 0.5),
    LossSpec("hidden_states", 0.1),
)


def model(family: str, seed: int, width: int, layers: int) -> Any:
    config = CONFIG_MAPPING[family](
        vocab_size=VOCAB, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
        query_pre_attn_scalar=8, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def local_numbers(module: Any) -> int:
    """Return how many of a module's weights this process holds."""
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())


def outcome(folder: Path) -> dict[str, Any]:
    """Return losses, norms, evaluations and final weights, as JSON; the teachers are those in `folder`."""
    ids = torch.randint(0, VOCAB, (24, 13), generator=torch.Generator().manual_seed(1))
    tokens = TokenSet(ids, "train", "tiny", "0" * 64, 1000, "1" * 64)
    held_out = TokenSet(ids[:1], "evaluation", "tiny", "2" * 64, 1000, "1" * 64)
    tokenizer: Any = None  # samples are written to no folder
    teacher = Teacher.load(folder / "gemma2", alone=False)
    student = model("gemma2", 2, 16, 2)
    attach_projections(student, PAIRS, 16, TEACHER_WIDTH)
    live = LiveTeacher(teacher, layers=[other for _, other in PAIRS])
    objective = DistillObjective(LOSSES, live, PAIRS)
    probe = Probe(held_out, live, 12, tokenizer)
    other = Teacher.load(folder / "gpt2", alone=False)
    held = {"loaded": local_numbers(teacher.model)}
    logits = LiveTeacher(other).targets(ids[:2]).states[0].logits()

    def watch(module: Any, step: int) -> dict[str, float]:
        held["student"] = local_numbers(module)
        return probe(module, step)

    read = train(student, objective, tokens, OPTIONS, evaluate=watch)
    written = OnPolicyObjective(objective, OnPolicyOptions(share=1.0, temperature=0.0))
    wrote = train(student, written, tokens, replace(OPTIONS, steps=2))
    held["teacher"] = local_numbers(live._model)
    lines = [{"loss": line.loss, "norm": line.grad_norm, **line.parts} for line in (*read.history, *wrote.history)]
    weights = {name: p.flatten().tolist() for name, p in student.named_parameters()}
    return {"lines": lines, "held": held, "weights": weights, "logits": logits.flatten().tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = outcome(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
