"""Task accuracy by kind: does a model answer questions about stories it has never seen?

Greedy decoding, so the number is a property of the model and the seeds alone. Works for the teacher and for anything
that generates like it: a pruned student, a quantized model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dwindle.starter.story_world import SPLITS, story
from dwindle.starter.tasks import KINDS, Task, check, tasks

__all__ = ["LONGEST_ANSWER", "answer", "held_out_tasks", "task_accuracy"]

LONGEST_ANSWER = 32  # tokens


def held_out_tasks(seeds: Iterable[int], kinds: Sequence[str] = KINDS) -> list[Task]:
    """One task of each kind per story, where the story has one."""
    chosen: list[Task] = []
    for seed in seeds:
        of_kind = {task.kind: task for task in tasks(story(seed))}
        chosen += [of_kind[kind] for kind in kinds if kind in of_kind]
    return chosen


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int = 64
) -> list[str]:
    """The greedy continuation of every prompt. Prompts are sorted by length, so that padding is little."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    stop = [int(token) for token in (tokenizer.eos_token_id,) if token is not None]
    stop += tokenizer.encode("\n", add_special_tokens=False)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        out = model.generate(
            **inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seeds: Iterable[int] = SPLITS["test"][:300],
    kinds: Sequence[str] = KINDS,
) -> dict[str, float]:
    """Share of right answers by kind, in the order of `kinds`; a kind no story asks is left out.

    The default of 300 test stories gives at least 200 tasks of every kind.
    """
    asked = held_out_tasks(seeds, kinds)
    model.eval()
    answers = answer(model, tokenizer, [task.prompt for task in asked])
    right: dict[str, list[bool]] = {}
    for task, text in zip(asked, answers, strict=True):
        right.setdefault(task.kind, []).append(check(task, text))
    return {kind: sum(right[kind]) / len(right[kind]) for kind in kinds if kind in right}
