"""How well a model does a task, on its held-out records.

    exact_match       share of greedy answers that equal the right one; case, outer white space and a full stop at the
                      end do not count; where the right answer is one line, the first line is compared
    rouge_l           mean ROUGE-L of greedy answers against the right ones (`rouge`)
    label_accuracy    share of records whose right label is the likeliest: argmax over labels of log p(label | prompt)
    win_rate          share of pairs whose chosen answer is likelier than the rejected one; half for a tie

Greedy answers keep keys and values of the past. Labels share a prompt's pass: it is run once, and all labels go on from
its keys and values in one batch. Packed weights are unpacked once for all of it where they fit, not for every token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.adapters.rouge import rouge_l
from dwindle.adapters.sequence_scores import sequence_log_probs
from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import TaskRecords
from dwindle.adapters.task_tokens import Encoded, Encoder
from dwindle.evaluation_mode import evaluating
from dwindle.quantized_model import cache_dense

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["greedy_answers", "label_scores", "same_answer", "task_metrics"]

_BATCH = 32
_DENSE_BYTES = 2_000_000_000
"""Unpacked weights are kept while measuring if they need no more than this."""


def task_metrics(
    bundle: ModelBundle, records: TaskRecords, encoder: Encoder, examples: Sequence[Encoded]
) -> dict[str, float]:
    """Return the task's metrics of a model on some examples."""
    options, wanted = records.options, records.options.measures
    found: dict[str, float] = {}
    with evaluating(bundle.model), torch.inference_mode(), _unpacked(bundle):
        if {"exact_match", "rouge_l"} & set(wanted):
            right = [e.record.completion for e in examples]
            answers = greedy_answers(bundle, encoder, examples)
            if "exact_match" in wanted:
                found["exact_match"] = _mean(same_answer(a, r, options) for a, r in zip(answers, right, strict=True))
            if "rouge_l" in wanted:
                found["rouge_l"] = _mean(rouge_l(_like(a, r), r) for a, r in zip(answers, right, strict=True))
        if "label_accuracy" in wanted:
            found["label_accuracy"] = _mean(_is_right(bundle, encoder, e, records.choices(e.record)) for e in examples)
        if "win_rate" in wanted:
            found["win_rate"] = _mean(_wins(bundle.model, examples))
    return found


def same_answer(answer: str, right: str, options: TaskOptions) -> bool:
    """Return whether a greedy answer is the right one.

    >>> same_answer(" mia.\\nQuestion: Who ran?", "Mia", TaskOptions("who", ("a.csv",)))
    True
    """
    if options.answer is not None:
        found = [re.search(options.answer, text) for text in (answer, right)]
        return found[0] is not None and found[1] is not None and _normal(found[0][1]) == _normal(found[1][1])
    return _normal(_like(answer, right)) == _normal(right)


def greedy_answers(bundle: ModelBundle, encoder: Encoder, examples: Sequence[Encoded]) -> list[str]:
    """Return the most probable continuation, token by token, of every prompt; prompts of like length go together."""
    model, tokenizer = bundle.model, encoder.tokenizer
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    answers = [""] * len(examples)
    stops = encoder.stops or {-1}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else max(0, *stops)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        longest = max(len(examples[i].prompt) for i in rows)
        ids = torch.full((len(rows), longest), padding)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            prompt = torch.tensor(examples[index].prompt)
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        room = bundle.anatomy.context - longest
        most = max(1, min(room, max(len(examples[i].answer) for i in rows) + 4))
        with _settings(model, max_new_tokens=most, eos_token_id=sorted(stops), pad_token_id=padding):
            out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
        for row, text in zip(rows, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True):
            answers[row] = text
    return answers


def label_scores(model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Return log p(answer | prompt) [L] of all answers; the prompt is read once."""
    call: Any = model
    device = next(model.parameters()).device
    width = max(map(len, answers))
    ids = torch.zeros(len(answers), width, dtype=torch.int64, device=device)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)], counted[row, : len(answer)] = torch.tensor(answer, device=device), True
    last = torch.full((len(answers), 1), prompt[-1], device=device)
    read = torch.cat([last, ids[:, :-1]], dim=1)
    past = None
    if len(prompt) > 1:
        before = torch.tensor([prompt[:-1]], device=device)
        past = call(input_ids=before, use_cache=True, logits_to_keep=1).past_key_values
        past.batch_repeat_interleave(len(answers))
    mask = torch.ones(len(answers), len(prompt) - 1 + width, dtype=torch.int64, device=device)
    logits = call(input_ids=read, attention_mask=mask, past_key_values=past, use_cache=past is not None).logits
    log_probs = torch.log_softmax(logits.float(), -1).gather(2, ids[..., None])[..., 0]
    return (log_probs * counted).sum(1)


def _is_right(bundle: ModelBundle, encoder: Encoder, example: Encoded, choices: Sequence[str]) -> bool:
    answers = [encoder.answer(example.record.prompt, choice) for choice in choices]
    scores = label_scores(bundle.model, example.prompt, answers)
    return choices[int(scores.argmax())] == example.record.completion.strip()


def _wins(model: nn.Module, pairs: Sequence[Encoded]) -> Iterator[float]:
    """Yield 1 where the chosen answer is the likelier one, half for a tie."""
    device = next(model.parameters()).device
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        sides = [[*p.prompt, *p.answer] for p in part] + [[*p.prompt, *p.rejected] for p in part]
        lengths = torch.tensor([len(side) for side in sides], device=device)
        ids = torch.zeros(len(sides), int(lengths.max()), dtype=torch.int64, device=device)
        for row, side in zip(ids, sides, strict=True):
            row[: len(side)] = torch.tensor(side, device=device)
        starts = torch.tensor([len(p.prompt) for p in part] * 2, device=device)
        chosen, rejected = sequence_log_probs(model, ids, starts, lengths).view(2, -1)
        yield from (0.5 + 0.5 * torch.sign(chosen - rejected)).tolist()


@contextmanager
def _settings(model: Any, **values: Any) -> Iterator[None]:
    """Let a model generate with these settings alone: its own, such as a repetition penalty, fill what is not given."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, **values)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _unpacked(bundle: ModelBundle) -> Iterator[None]:
    """Keep unpacked weights for a while, if they fit; every token would unpack them again."""
    fits = bundle.quantized and 4 * bundle.size().parameters <= _DENSE_BYTES
    if fits:
        cache_dense(bundle.model)
    try:
        yield
    finally:
        if fits:
            cache_dense(bundle.model, enabled=False)


def _like(answer: str, right: str) -> str:
    """Return the part of an answer that is compared: its first line, where the right answer is one line."""
    return answer if "\n" in right.strip() else answer.strip().partition("\n")[0]


def _normal(text: str | None) -> str:
    return (text or "").strip().rstrip(".").strip().casefold()


def _mean(values: Iterator[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
