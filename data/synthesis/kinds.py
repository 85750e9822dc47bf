"""What a model can be asked to write, and how its answer is read. Torch-free.

    rephrase:easy|medium|hard|dialogue    a passage in other words (WRAP, Maini et al. 2024, arXiv 2401.16380)
    questions                             a question on a passage, with its answer
    instructions                          a task that a passage suggests, with its solution
    continue                              the first tokens of a passage, taken further: any causal model can
    free                                  from the beginning-of-text token alone: for distillation without data
    free:seeded                           from one token drawn at random (Liu et al. 2023, arXiv 2305.17888)
    template:FILE                         a template of one's own with {text} in it

The first three need a model that follows instructions: it is asked through its chat template if it has one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dwindle.errors import RecipeError, did_you_mean

__all__ = ["KINDS", "Kind", "Written", "kind_of"]

Start = Literal["template", "prefix", "bos", "token"]


@dataclass(frozen=True)
class Written:
    """What a model's answer holds."""

    text: str
    """What goes into the corpus."""
    prompt: str = ""
    """The question or task in it, for checkers."""
    answer: str = ""
    """The answer to it; the whole text where there is no question."""


@dataclass(frozen=True)
class Kind:
    """One way of writing."""

    name: str
    start: Start
    """What the model is given."""
    template: str = ""
    """The request, with {text} for the passage."""
    cue: str = ""
    """What stands behind the request where the model has no chat template."""
    read: Callable[[str], Written | None] = lambda said: Written(said, "", said)
    """What the answer holds, or None if it has not the form that was asked for."""
    whole: bool = True
    """An answer that was cut off is of no use."""

    @property
    def uses_text(self) -> bool:
        """Return whether it starts from a passage of the corpus."""
        return self.start in ("template", "prefix")

    @property
    def sha256(self) -> str:
        """Return the hash of what decides its requests."""
        return hashlib.sha256(f"{self.name}\0{self.start}\0{self.template}\0{self.cue}".encode()).hexdigest()


def _paired(first: str, second: str) -> Callable[[str], Written | None]:
    mark = r"[^\w\n]*"
    form = re.compile(rf"(?:\A|\n){mark}{first}{mark}\s*(\S.*?)\s*\n{mark}{second}{mark}\s*(\S.*)\Z", re.DOTALL)

    def read(said: str) -> Written | None:
        if second not in said:  # looked for at every first word, for as long as the text is
            return None
        found = form.search(said) or form.search(f"{first}: {said}")  # the cue may have said the first word
        if found is None or re.search(rf"\n{mark}(?:{first}|{second}){mark}", found[2]):
            return None
        return Written(f"{found[1]}\n\n{found[2].strip()}", found[1], found[2].strip())

    return read


_ALIKE = ("Keep every fact and add none. Write only the new text, at most as long as the original.\n\n"
          "Text:\n{text}")  # fmt: skip
_STYLES = {
    "easy": "Rewrite the following text in very simple words and short sentences that a child understands. ",
    "medium": "Rewrite the following text in clear, neutral English as in an encyclopaedia. ",
    "hard": "Rewrite the following text in terse, abstract language as in a scientific paper. ",
    "dialogue": "Rewrite the following text as a conversation of questions and answers between two people. ",
}
KINDS: dict[str, Kind] = {
    **{
        f"rephrase:{style}": Kind(f"rephrase:{style}", "template", request + _ALIKE, "Rewritten text:\n")
        for style, request in _STYLES.items()
    },
    "questions": Kind(
        "questions", "template",
        "Write one question that the following text answers, and its answer. Use this form:\nQuestion: ...\n"
        "Answer: ...\n\nText:\n{text}", "Question:", _paired("Question", "Answer"),
    ),
    "instructions": Kind(
        "instructions", "template",
        "Think of one task for an assistant that the following text suggests, and solve it. Use this form:\nTask: ...\n"
        "Solution: ...\n\nText:\n{text}", "Task:", _paired("Task", "Solution"),
    ),
    "continue": Kind("continue", "prefix", whole=False),
    "free": Kind("free", "bos", whole=False),
    "free:seeded": Kind("free:seeded", "token", whole=False),
}  # fmt: skip
"""Every kind but those of templates of one's own."""


def kind_of(name: str) -> Kind:
    """Return the kind of a name; RecipeError for an unknown one, or a template that cannot be used."""
    if name.startswith("template:"):
        file = name.removeprefix("template:")
        try:
            template = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8 text"
            raise RecipeError(f"synthesis: template {file} cannot be read ({reason}). Correct the path.") from error
        if "{text}" not in template:
            raise RecipeError(f"synthesis: template {file} has no {{text}} in it, where the passage would stand.")
        return Kind(f"template:{Path(file).name}", "template", template)
    if name not in KINDS:
        raise RecipeError(f"synthesis: kind {name!r} is unknown{did_you_mean(name, [*KINDS, 'template:FILE'])}.")
    return KINDS[name]
