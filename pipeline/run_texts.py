"""The text of a run, in the tokens of whatever model a step works on, and the meters that measure on it.

A step that cuts the vocabulary gives the model a tokenizer of its own. The sets are then made again, of the documents
that the teacher's tokenizer divided among the roles, and a meter measures in the new tokens. Steps with data of their
own get sets that leave out whatever calibrates or measures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dwindle.bundle import ModelBundle
from dwindle.data import DataOptions, TokenSets, build_token_sets, training_set
from dwindle.measure import Meter
from dwindle.storage import atomic_file
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

__all__ = ["RunTexts"]


class RunTexts:
    """Token sets and meters by tokenizer, made when a step first needs them."""

    def __init__(self, options: DataOptions, teacher: ModelBundle, notify: Callable[[str], None]) -> None:
        self._options, self._teacher, self._notify = options, teacher, notify
        notify("data: tokenising and packing")
        self.teachers = build_token_sets(options, teacher.tokenizer, teacher.anatomy.context)
        """The sets in the teacher's tokens; keys of steps hash these, those of other tokenizers follow from them."""
        self._made = {encoding_sha256(teacher.tokenizer): (self.teachers, Meter(self.teachers.evaluation, teacher))}

    def of(self, bundle: ModelBundle) -> tuple[TokenSets, Meter]:
        """Return the sets and the meter in the bundle's own tokens."""
        digest = encoding_sha256(bundle.tokenizer)
        if digest not in self._made:
            self._notify("data: tokenising and packing again, the vocabulary was cut")
            sets = build_token_sets(self._options, bundle.tokenizer, self._teacher.anatomy.context,
                                    counted_by=self._teacher.tokenizer)  # fmt: skip
            self._made[digest] = sets, Meter(sets.evaluation, self._teacher)
        return self._made[digest]

    def of_step(self, options: DataOptions, bundle: ModelBundle) -> TokenSet:
        """Return a step's own training set in the bundle's tokens, without what calibrates or measures."""
        sets = self.of(bundle)[0]
        return training_set(options, bundle.tokenizer, self._teacher.anatomy.context,
                            apart_from=(sets.calibration, sets.evaluation))  # fmt: skip

    def write_held_out(self, place: Path) -> None:
        """Write the text that was held out for evaluation: `dwindle evaluate --text` gives its numbers again."""
        if self.teachers.held_out_text is not None:
            with atomic_file(place) as partial:
                partial.write_text(self.teachers.held_out_text, encoding="utf-8", newline="")

    def _sets(self) -> tuple[TokenSet, ...]:
        return self.teachers.train, self.teachers.calibration, self.teachers.evaluation

    @property
    def sha256(self) -> dict[str, str]:
        """Return the hash of each role's set."""
        return {one.role: one.sha256 for one in self._sets()}

    def card(self) -> dict[str, Any]:
        """Return what the report says of the data."""
        return {
            one.role: {"source": one.source, "tokens": one.tokens, "bytes": one.text_bytes, "sha256": one.sha256,
                       "licence": one.licence}
            for one in self._sets()
        }  # fmt: skip
