"""Drops documents that hold pieces of evaluation sets, by Apple's rule (arXiv 2407.21075, section 3.1.3).

A document is contaminated if it shares an n-gram of `shortest` to `longest` words (4 to 13) with an item of an
evaluation set, unless that n-gram collides too often to mean anything: if at least `common` documents of the corpus
(1,000) hold it, it is common usage and exempt. Every length is judged for itself: "one of the most important" may be
exempt while a longer n-gram that begins with it is not.

The count is taken over the corpus that is being built, behind the stages before this one. In a small corpus hardly
anything occurs 1,000 times, so that a shared phrase of four words costs a document; there, set `shortest` to 8 or more,
or `common` lower.

A source of which more than a tenth of the documents are evaluation items word for word is an error, not a filter's
work: somebody named the wrong file.

Memory: the n-grams (see `evaluation_ngrams`), 8 bytes for each to count, and 4 bytes for each n-gram met in a document.
Disk: the documents once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dwindle.data.curation.evaluation_ngrams import EvaluationNgrams
from dwindle.data.curation.spool import Spool
from dwindle.data.curation.stage import StageRun, batches
from dwindle.data.document import Document
from dwindle.data.sources import Source, check_sources, read_documents
from dwindle.errors import DataError, RecipeError, offenders

__all__ = ["Decontamination", "EvaluationText"]

_MOST_IDENTICAL = 0.1


@dataclass(frozen=True)
class EvaluationText:
    """An evaluation set that no document may hold pieces of."""

    name: str
    """What the card calls it."""
    place: str
    """File, folder or data set id."""
    text: str = "text"
    """Column, or pattern of columns such as {question} {answer}."""


@dataclass(frozen=True)
class Decontamination:
    """Stage: no document with a piece of an evaluation set."""

    sets: tuple[EvaluationText, ...]
    """The evaluation sets."""
    shortest: int = 4
    """Words of the shortest n-gram that counts."""
    longest: int = 13
    """Words of the longest n-gram looked at."""
    common: int = 1000
    """An n-gram in at least so many documents of the corpus is common usage."""
    name: ClassVar[str] = "decontamination"

    def __post_init__(self) -> None:
        wrong = []
        if not self.sets:
            wrong.append("sets: none (needed: at least one evaluation set with name and place)")
        names = Counter(one.name for one in self.sets)
        if twice := [name for name, number in names.items() if number > 1]:
            wrong.append(f"sets: {offenders(twice)} more than once (needed: each name once)")
        if not 1 <= self.shortest <= self.longest <= 60:
            wrong.append(f"shortest={self.shortest}, longest={self.longest} (needed: 1 <= shortest <= longest <= 60)")
        if not self.common >= 1:
            wrong.append(f"common={self.common} (needed: at least 1)")
        if wrong:
            raise RecipeError(f"decontamination: {'; '.join(wrong)}.")

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield the documents that hold no piece of an evaluation set."""
        items, owners = self._items()
        ngrams = EvaluationNgrams.of(items, self.shortest, self.longest)
        identical = _IdenticalItems(items, [self.sets[owner].name for owner in owners])
        with Spool(run.folder / "documents.jsonl") as spool:
            met: dict[int, NDArray[np.int32]] = {}
            counts = np.zeros(len(ngrams), np.int64)
            for batch, found in run.ordered(partial(_looked_up, ngrams), batches(documents)):
                for document, numbers in zip(batch, found, strict=True):
                    if len(numbers):
                        met[len(spool)] = numbers
                        counts[numbers] += 1
                    identical.look_at(document)
                    spool.add(document)
            identical.check()
            hits: Counter[str] = Counter()
            for number, document in enumerate(spool):
                numbers = met.get(number, _NOTHING)
                numbers = numbers[counts[numbers] < self.common]
                if not len(numbers):
                    yield document
                    continue
                length, item = ngrams.length_and_item(int(numbers[-1]))
                name = self.sets[owners[item]].name
                hits[name] += 1
                number_in_set = item - owners.index(owners[item])
                run.count.drop(document, f"a piece of {name}", f"{length} words of item {number_in_set}")
        run.count.details = {
            "evaluation_sets": [
                {"name": one.name, "place": one.place, "items": owners.count(i), "documents_hit": hits[one.name]}
                for i, one in enumerate(self.sets)
            ],
            "evaluation_items_too_short": ngrams.too_short,
            "ngrams": len(ngrams),
            "ngrams_met": int((counts > 0).sum()),
            "ngrams_exempt_as_common": int((counts >= self.common).sum()),
        }

    def _items(self) -> tuple[list[str], list[int]]:
        """Return the texts of all items, and for each the number of its set."""
        check_sources([one.place for one in self.sets], "text")
        items: list[str] = []
        owners: list[int] = []
        for index, one in enumerate(self.sets):
            texts = [document.text for document in read_documents(one.place, one.text, whole_files=True)]
            if not texts:
                raise DataError(f"decontamination: {one.name} ({one.place}) holds no text.")
            items += texts
            owners += [index] * len(texts)
        return items, owners

    def places(self) -> list[Source]:
        """Return where the evaluation sets lie."""
        return [Source.parse(one.place, one.text) for one in self.sets]


_NOTHING = np.zeros(0, np.int32)


def _looked_up(ngrams: EvaluationNgrams, batch: list[Document]) -> tuple[list[Document], list[NDArray[np.int32]]]:
    return batch, ngrams.met([document.text for document in batch])


class _IdenticalItems:
    """How many documents of each source are evaluation items, word for word."""

    def __init__(self, items: list[str], names: list[str]) -> None:
        self._names = dict(zip(map(_identity, items), names, strict=True))
        self._documents: Counter[str] = Counter()
        self._found: dict[str, list[tuple[str, str]]] = {}

    def look_at(self, document: Document) -> None:
        self._documents[document.source] += 1
        if (name := self._names.get(_identity(document.text))) is not None:
            self._found.setdefault(document.source, []).append((document.id, name))

    def check(self) -> None:
        """Raise DataError with every source that is made of evaluation items."""
        wrong = []
        for source, found in self._found.items():
            if len(found) > _MOST_IDENTICAL * self._documents[source]:
                sets = ", ".join(sorted({name for _, name in found}))
                wrong.append(f"{source}: {len(found):,} of {self._documents[source]:,} documents are items of {sets} "
                             f"word for word ({offenders([name for name, _ in found], 3)})")  # fmt: skip
        if wrong:
            raise DataError(f"evaluation text offered as training text: {'; '.join(wrong)}. Remove the source, or the "
                            "evaluation set if it is not one.")  # fmt: skip


def _identity(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode(errors="replace"), digest_size=12).digest()
