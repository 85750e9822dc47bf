"""What the models of a run write: the same beginnings, taken from the evaluation text, continued by each of them.

Greedy, so that two runs of the same models tell the same, and so that a difference is a difference of the models. A few
lines prove nothing; they show at once what a KL of 0.3 looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dwindle.continuation import continued
from dwindle.report import Sample

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.token_set import TokenSet

__all__ = ["PROMPTS", "PROMPT_TOKENS", "SAMPLE_TOKENS", "collect_samples", "prompts_of"]

PROMPTS = 3
"""Beginnings, evenly spread over the evaluation text."""
PROMPT_TOKENS = 14
"""Tokens of the teacher in each."""
SAMPLE_TOKENS = 48
"""Tokens that each model writes, fewer if it ends the text."""


def prompts_of(evaluation: TokenSet, teacher: ModelBundle) -> list[str]:
    """Return beginnings of windows of the evaluation text, without special tokens; none of a text too short."""
    ids = evaluation.ids
    rows = sorted({round(number * (len(ids) - 1) / (PROMPTS - 1)) for number in range(PROMPTS)})
    texts = [teacher.tokenizer.decode(ids[row, :PROMPT_TOKENS].tolist(), skip_special_tokens=True) for row in rows]
    return [text.strip() for text in texts if text.strip()]


def collect_samples(models: Mapping[str, ModelBundle], prompts: Sequence[str]) -> tuple[Sample, ...]:
    """Return what each model writes after each prompt, in the order of `models`."""
    return tuple(
        Sample(prompt, {name: _written(model, prompt) for name, model in models.items()}) for prompt in prompts
    )


def _written(bundle: ModelBundle, prompt: str) -> str:
    tokenizer = bundle.tokenizer
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    room = min(ids.shape[1] + SAMPLE_TOKENS, bundle.anatomy.context)
    new = continued(bundle.model, ids, room, temperature=0)[0, ids.shape[1] :].tolist()
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()
