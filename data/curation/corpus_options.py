"""What a corpus is made of: sources, stages, splits. A mistake in any of it is an error before anything is read."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dwindle.data.curation.clusters import NearDuplicateOptions
from dwindle.data.curation.decontamination import Decontamination
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.stage import Stage
from dwindle.data.sources import Source
from dwindle.errors import RecipeError, offenders

__all__ = ["CorpusOptions", "SourceOptions", "SplitOptions"]


@dataclass(frozen=True)
class SourceOptions:
    """One source of a corpus."""

    name: str
    """What the corpus calls it; letters, digits, - and _."""
    place: str
    """File, folder or data set id."""
    licence: str | None = None
    """Licence of all of it, as an SPDX name where there is one; None is unknown."""
    text: str = "text"
    """Column of rows, or a pattern of columns such as {question} {answer}."""
    kind: Literal["prose", "code"] | None = None
    """What its filters are; None goes by each file's suffix."""
    weight: float | None = None
    """Share in the tokens trained on, in proportion to the others'; None, for all sources, takes all there is."""
    exclude: tuple[str, ...] = ()
    """Patterns of files below a folder that are left out, as in tests/*."""
    most_bytes: int | None = None
    """Read about so much of it; None is all."""

    def __post_init__(self) -> None:
        wrong = []
        if not self.name.replace("-", "").replace("_", "").isalnum():
            wrong.append(f"name={self.name!r} (needed: letters, digits, - and _)")
        if not self.place:
            wrong.append(f"place={self.place!r} (needed: a file, folder or data set)")
        if self.weight is not None and not self.weight > 0:
            wrong.append(f"weight={self.weight!r} (needed: above 0)")
        if self.most_bytes is not None and not self.most_bytes >= 1:
            wrong.append(f"most_bytes={self.most_bytes!r} (needed: at least 1)")
        if wrong:
            raise RecipeError(f"source {self.name}: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class SplitOptions:
    """What is held out of training. Near-duplicates always go to the same split."""

    calibration: float = 0.01
    """Share of the bytes for calibration."""
    evaluation: float = 0.02
    """Share of the bytes for evaluation."""

    def __post_init__(self) -> None:
        if not (self.calibration >= 0 and self.evaluation >= 0 and self.calibration + self.evaluation < 1):
            raise RecipeError(
                f"splits: calibration={self.calibration!r}, evaluation={self.evaluation!r} (needed: shares of 0 or "
                "more that leave something to train on)."
            )


@dataclass(frozen=True)
class CorpusOptions:
    """A whole corpus recipe."""

    sources: tuple[SourceOptions, ...]
    """What is read, in this order; of duplicates the first stays."""
    stages: tuple[Stage, ...] = ()
    """What is done to it, in this order."""
    splits: SplitOptions = field(default_factory=SplitOptions)
    allowed_licences: tuple[str, ...] = ()
    """Patterns such as Apache-2.0 or CC-BY-*; with any given, every source's licence must match one."""
    forbidden_licences: tuple[str, ...] = ()
    """Patterns of licences no source may have."""
    format: Literal["jsonl", "jsonl.zst", "parquet"] = "jsonl.zst"
    """Of the files written."""
    name: str = "corpus"
    seed: int = 0
    """Of the draw of held-out documents and of the examples in the card."""

    def __post_init__(self) -> None:
        wrong = [*self._source_problems(), *self._licence_problems()]
        if wrong:
            raise RecipeError("corpus: " + "; ".join(wrong) + ".")

    @property
    def near_duplicates(self) -> NearDuplicateOptions:
        """Return what counts as a near-duplicate across splits: as in the stage, if there is one."""
        for stage in self.stages:
            if isinstance(stage, NearDuplicates):
                return stage.options
        return NearDuplicateOptions()

    @property
    def weights(self) -> dict[str, float] | None:
        """Return the sources' shares, or None where the recipe gives none."""
        given = {one.name: one.weight for one in self.sources if one.weight is not None}
        return given or None

    def _source_problems(self) -> list[str]:
        if not self.sources:
            return ["sources: none (needed: at least one with name and place)"]
        wrong = []
        sets = [one for stage in self.stages if isinstance(stage, Decontamination) for one in stage.sets]
        places = [(one.name, one.place) for one in self.sources] + [(one.name, one.place) for one in sets]
        if impossible := [name for name, place in places if _is_no_path(place)]:
            return [
                f"places that no file can have (a name of more than 255 bytes, or \\0 in it): {offenders(impossible)}"
            ]
        names = Counter(one.name.lower() for one in self.sources)
        if twice := [name for name, number in names.items() if number > 1]:
            wrong.append(f"source names that stand more than once: {offenders(twice)}; give each source its own")
        weighted = [one.name for one in self.sources if one.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            without = [one.name for one in self.sources if one.weight is None]
            wrong.append(f"weights for some sources and not for {offenders(without)}; give all of them one, or none")
        evaluation = [(one.name, place.path) for stage in self.stages if isinstance(stage, Decontamination)
                      for one, place in zip(stage.sets, stage.places(), strict=True)]  # fmt: skip
        for source in self.sources:
            path = Source.parse(source.place, source.text).path
            wrong += [
                f"source {source.name} and evaluation set {name} are the same text ({source.place}); evaluation text "
                "is not for training, remove the source"
                for name, other in evaluation
                if _overlap(path, other)
            ]
        return wrong

    def _licence_problems(self) -> list[str]:
        wrong = []
        for one in self.sources:
            if one.licence is None:
                if self.allowed_licences:
                    wrong.append(f"source {one.name} names no licence; allowed are {', '.join(self.allowed_licences)}")
                continue
            if _matches(one.licence, self.forbidden_licences):
                wrong.append(f"source {one.name} has the licence {one.licence}, which the recipe forbids; remove it")
            elif self.allowed_licences and not _matches(one.licence, self.allowed_licences):
                wrong.append(f"source {one.name} has the licence {one.licence}; "
                             f"allowed are {', '.join(self.allowed_licences)}")  # fmt: skip
        return wrong


def _matches(licence: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(licence.lower(), pattern.lower()) for pattern in patterns)


def _is_no_path(place: str) -> bool:
    return "\0" in place or any(len(part.encode(errors="replace")) > 255 for part in Path(place).parts)


def _overlap(one: Path, other: Path) -> bool:
    a, b = one.resolve(), other.resolve()
    return a == b or (one.exists() and other.exists() and (a in b.parents or b in a.parents))
