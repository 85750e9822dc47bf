"""A task's data and its schema: which columns play which part. Torch-free.

    completion             prompt -> completion                   instruction-data, questions and answers, translations
    label                  prompt -> one of `labels`              intents, moods
    chosen, rejected       prompt -> the better and the worse     preferences

A field that names a part is a column, or a template over columns: `"{instruction}\\n{input}"`. Which of the three forms
a task has follows from which fields are set.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Literal

from dwindle.errors import RecipeError, did_you_mean

__all__ = ["METRICS", "Form", "TaskOptions", "columns_of"]

Form = Literal["completion", "label", "preference"]
METRICS: dict[str, tuple[Form, ...]] = {
    "exact_match": ("completion", "label"),
    "rouge_l": ("completion",),
    "label_accuracy": ("completion", "label"),
    "win_rate": ("preference",),
}
"""Metric -> the forms of task it can be measured on."""


@dataclass(frozen=True)
class TaskOptions:
    """One task: where its records lie, what their columns mean, how a record becomes text."""

    name: str
    """Names the adapter and its folder."""
    data: tuple[str, ...]
    """Files (.jsonl, .json, .csv, .parquet), folders of data sets saved to disk, or data set ids; `PLACE::KEY` takes
    one entry of a JSON object, or one split of a data set."""
    prompt: str = "prompt"
    """Column or template of what the model reads."""
    completion: str | None = None
    """Column or template of what it should write; None is `completion`, if neither labels nor preferences are named."""
    traces: str | None = None
    """Column or template of a second, longer completion (a whole trial-and-error solution); each record that has one is
    trained on both."""
    trace_prompt: str | None = None
    """What asks for the trace, if it is not the same prompt."""
    label: str | None = None
    """Column of a label; it is then what the model should write."""
    labels: tuple[str, ...] = ()
    """The label set; empty takes all labels of the training data. Other labels are errors."""
    choices: str | None = None
    """Column with each record's own list of answers, one of them right."""
    chosen: str | None = None
    """Column or template of the better answer."""
    rejected: str | None = None
    """Column or template of the worse answer."""
    columns: tuple[str, ...] = ()
    """Names for rows that are lists, in order."""
    held_out: tuple[str, ...] = ()
    """Places of the held-out records; none draws `held_out_share` of the prompts."""
    held_out_share: float = 0.1
    """Share of the prompts that is never trained on, where `held_out` names none."""
    max_records: int | None = None
    """Train on at most so many records, drawn by the seed; None takes all."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: the tokenizer's chat template around prompt and answer; `plain`: prompt, separator, answer, EOS; `auto`:
    chat where the tokenizer has a template."""
    system: str | None = None
    """System message (chat only)."""
    separator: str = " "
    """Stands between prompt and answer (plain only)."""
    answer: str | None = None
    """Regular expression whose first group is what exact match compares; None compares the whole answer."""
    checker: str | None = None
    """Checker that a training completion and a trace must pass (`exact`, `arithmetic`, `python` ...); what fails is
    left out and counted."""
    bad_records: Literal["refuse", "drop"] = "refuse"
    """`refuse`: an error that lists them; `drop`: leave them out, with a line in the record."""
    metrics: tuple[str, ...] = ()
    """What is measured on the held-out records; none takes all that the task's form allows."""
    licence: str | None = None
    """Licence of the data; it goes along with the adapter."""

    def __post_init__(self) -> None:
        for name in ("data", "labels", "columns", "held_out", "metrics"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        wrong = [*self._wrong_form(), *self._wrong_values()]
        if wrong:
            raise RecipeError(f"task {self.name!r}: {'; '.join(wrong)}.")

    def _wrong_form(self) -> list[str]:
        wrong = []
        if (self.chosen is None) != (self.rejected is None):
            wrong.append("chosen and rejected go together; name both or none")
        given = [name for name in ("completion", "label", "chosen") if getattr(self, name) is not None]
        if len(given) > 1:
            wrong.append(f"{' and '.join(given)} exclude each other (a task has completions, labels or preferences)")
        if self.labels and self.label is None:
            wrong.append("labels are given, but label names no column")
        if self.choices is not None and self.form != "completion":
            wrong.append("choices are for tasks with completions")
        if self.traces is not None and self.form != "completion":
            wrong.append("traces are for tasks with completions")
        for metric in self.metrics:
            if metric not in METRICS:
                wrong.append(f"metrics: {metric} is unknown{did_you_mean(metric, METRICS)}")
            elif self.form not in METRICS[metric]:
                wrong.append(f"metrics: {metric} cannot be measured on {self.form}s")
        if "label_accuracy" in self.metrics and self.form == "completion" and self.choices is None:
            wrong.append("metrics: label_accuracy needs choices or labels")
        return wrong

    def _wrong_values(self) -> list[str]:
        wrong = []
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            wrong.append("the name must begin with a letter or digit and hold only letters, digits, '.', '_' and '-'")
        if not self.data or not all(isinstance(place, str) and place for place in self.data):
            wrong.append(f"data={list(self.data)!r} (needed: at least one place)")
        if not 0 < self.held_out_share < 1:
            wrong.append(f"held_out_share={self.held_out_share!r} (needed: between 0 and 1)")
        if self.max_records is not None and not self.max_records >= 1:
            wrong.append(f"max_records={self.max_records!r} (needed: at least 1, or none)")
        if self.template not in ("auto", "chat", "plain"):
            wrong.append(f"template={self.template!r} (needed: auto, chat or plain)")
        if self.bad_records not in ("refuse", "drop"):
            wrong.append(f"bad_records={self.bad_records!r} (needed: refuse or drop)")
        for name in ("prompt", "completion", "traces", "trace_prompt", "chosen", "rejected"):
            if (text := getattr(self, name)) is not None:
                wrong += [f"{name}: {problem}" for problem in _template_problems(text)]
        if self.answer is not None:
            wrong += _pattern_problems(self.answer)
        return wrong

    @property
    def form(self) -> Form:
        """Return what the records are.

        >>> TaskOptions("mood", ("stories.csv",), label="mood").form
        'label'
        """
        return "preference" if self.chosen is not None else "label" if self.label is not None else "completion"

    @property
    def target(self) -> str:
        """Return the column or template of what the model should write (the better answer of a pair)."""
        return self.chosen or self.label or self.completion or "completion"

    @property
    def measures(self) -> tuple[str, ...]:
        """Return the metrics to be measured.

        >>> TaskOptions("sum", ("texts.jsonl",), completion="summary").measures
        ('exact_match', 'rouge_l')
        """
        if self.metrics:
            return self.metrics
        if self.form == "label":
            return ("label_accuracy",)
        possible = tuple(name for name, forms in METRICS.items() if self.form in forms)
        return possible if self.choices is not None else tuple(n for n in possible if n != "label_accuracy")


def columns_of(text: str) -> list[str]:
    r"""Return the columns that a column name or template reads.

    >>> columns_of("question"), columns_of("{instruction}\n{input}")
    (['question'], ['instruction', 'input'])
    """
    if "{" not in text:
        return [text]
    return [name for _, name, _, _ in string.Formatter().parse(text) if name]


def _template_problems(text: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(text)) if "{" in text else []
    except ValueError as error:
        return [f"{text!r} is no template ({error})"]
    plain = [name for _, name, form, change in parts if name is not None and not form and not change]
    wrong = [f"{{{name}}}" for _, name, form, change in parts if form or change]
    wrong += [f"{{{name}}}" for name in plain if not re.fullmatch(r"[\w -]+", name)]
    return [f"{text!r}: {', '.join(wrong)} is no column (needed: {{column}})"] if wrong else []


def _pattern_problems(pattern: str) -> list[str]:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"answer={pattern!r} is no regular expression ({error})"]
    return [] if groups >= 1 else [f"answer={pattern!r} has no group (needed: one, in parentheses)"]
