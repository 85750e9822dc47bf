"""The data card as one JSON object: where the text comes from, what was done to it, what is left, and examples of it.

It holds nothing that changes from run to run (no times, no machine), so that it too has the same bytes every time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dwindle
from dwindle.data.curation.corpus_options import CorpusOptions
from dwindle.data.curation.stage_count import Examples, StageCount
from dwindle.storage import hash_json

__all__ = ["corpus_card"]


def corpus_card(
    options: CorpusOptions,
    sources: Sequence[Mapping[str, Any]],
    counts: Sequence[StageCount],
    splits: Mapping[str, Any],
    kept: Examples,
    tokens: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the card of a corpus."""
    made = _plain(dataclasses.asdict(options))
    made["stages"] = [{stage.name: _plain(_options_of(stage))} for stage in options.stages]
    licences: Counter[str] = Counter()
    for split in splits.values():
        for file in split["files"]:
            licences.update(file["licences_bytes"])
    return {
        "schema": 1,
        "name": options.name,
        "seed": options.seed,
        "dwindle": dwindle.__version__,
        "recipe_sha256": hash_json(made),
        "sources": list(sources),
        "licences_bytes": dict(sorted(licences.items())),
        "stages": [count.to_json() for count in counts],
        "splits": splits,
        "tokens": tokens,
        "kept_examples": kept.to_json(),
        "recipe": made,
    }


def _options_of(stage: Any) -> dict[str, Any]:
    return dataclasses.asdict(stage) if dataclasses.is_dataclass(stage) and not isinstance(stage, type) else {}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists, anything unknown as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
