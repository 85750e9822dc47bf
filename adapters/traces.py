r"""Reasoning traces: a model's own attempts at a record, up to the first that a checker passes.

    attempt 1  \n  Let me try again.  \n  attempt 2  ...  attempt k        the whole trial-and-error solution (`trace`)
    attempt k                                                               the short one (`completion`)

Attempts are drawn from the model's full distribution at a temperature, one after the other from the same prompt; those
after the first right one are not used. A record without a right attempt gives nothing and is counted. What comes out is
data for `adapt` (`traces: trace`), which trains on both. Learning from one's own solutions that were checked is STaR
(Zelikman et al. 2022, arXiv 2203.14465); keeping the wrong turns in them is Stream of Search (Gandhi et al. 2024, arXiv
2404.03683).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import Record
from dwindle.adapters.task_tokens import Encoder
from dwindle.checkers import make_checker
from dwindle.continuation import continued
from dwindle.data_order import mixed_seed
from dwindle.errors import RecipeError
from dwindle.evaluation_mode import evaluating
from dwindle.quantized_model import cache_dense

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["RETRY", "TraceOptions", "solved"]

RETRY = "\nLet me try again.\n"
"""Stands between two attempts of a trace."""


@dataclass(frozen=True)
class TraceOptions:
    """How attempts are made."""

    checker: str = "arithmetic"
    """What an attempt must pass (`dwindle.checkers`); the record's own answer is its reference."""
    samples: int = 4
    """Attempts at each record, at most."""
    temperature: float = 0.8
    """Of the attempts."""
    answer_tokens: int = 128
    """Tokens of an attempt, at most."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        wrong = [f"{name}={getattr(self, name)!r} (needed: a whole number of at least 1)"
                 for name in ("samples", "answer_tokens") if not getattr(self, name) >= 1]  # fmt: skip
        if not self.temperature > 0:
            wrong.append(f"temperature={self.temperature!r} (needed: above 0; attempts must differ)")
        if wrong:
            raise RecipeError(f"traces: {'; '.join(wrong)}.")
        make_checker(self.checker)


def solved(
    bundle: ModelBundle, records: Iterable[Record], task: TaskOptions, options: TraceOptions
) -> Iterator[dict[str, Any] | None]:
    """Yield {prompt, completion, trace, reference, attempts, checker} for each record, None without a right attempt."""
    encoder, checker = Encoder(bundle.tokenizer, task), make_checker(options.checker)
    cache_dense(bundle.model)
    try:
        for index, record in enumerate(records):
            encoder.answer(record.prompt, record.completion)  # it learns from the template what ends an answer
            found = _attempts(bundle, encoder, record, options, mixed_seed(options.seed, index))
            known = {"reference": record.completion, "prompt": record.prompt}
            passed = [checker(record.prompt, attempt, known).passed for attempt in found]
            if not any(passed):
                yield None
                continue
            right = passed.index(True)
            yield {"prompt": record.prompt, "completion": found[right], "trace": RETRY.join(found[: right + 1]),
                   "reference": record.completion, "attempts": right + 1, "checker": options.checker}  # fmt: skip
    finally:
        cache_dense(bundle.model, enabled=False)


def _attempts(bundle: ModelBundle, encoder: Encoder, record: Record, options: TraceOptions, seed: int) -> list[str]:
    """Return the attempts at one record, drawn together."""
    prompt = torch.tensor([encoder.prompt(record.prompt)]).repeat(options.samples, 1)
    length = min(bundle.anatomy.context, prompt.shape[1] + options.answer_tokens)
    draws = torch.Generator().manual_seed(seed)
    with evaluating(bundle.model):
        written = continued(bundle.model, prompt, length, draws, options.temperature)[:, prompt.shape[1] :]
    found = []
    for row in written.tolist():
        end = next((at for at, token in enumerate(row) if token in encoder.stops), len(row))
        found.append(encoder.tokenizer.decode(row[:end], skip_special_tokens=True).strip())
    return found
