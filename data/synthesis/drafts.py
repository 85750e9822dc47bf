"""The pieces of one synthesis: what is asked, batch by batch, and what the model said, kept on disk as it comes.

Piece i is of kind i mod K and starts from passage i div K (again from the first when there are no more, with other
draws). Batch b holds pieces b*B to b*B + B - 1 and is drawn from a seed made of the run's and b, so a batch is the same
whenever it is written. Each one is a file, written whole: a killed run goes on behind its last batch and ends with the
same bytes. The files belong to one plan (options, model, passages); those of another are removed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.data.synthesis.kinds import Kind
from dwindle.data.synthesis.passages import Passage
from dwindle.data.synthesis.writer import Draft, Writer
from dwindle.data_order import mixed_seed
from dwindle.storage import write_json
from dwindle.time_left import TimeLeft

__all__ = ["Piece", "drafted"]

_LOG = logging.getLogger("dwindle")
_TELL_SECONDS = 30


@dataclass(frozen=True)
class Piece:
    """One piece: what was asked for and what came."""

    number: int
    kind: Kind
    passage: Passage | None
    seed: int
    """What its batch was drawn from."""
    draft: Draft


def drafted(
    writer: Writer, kinds: Sequence[Kind], passages: Sequence[Passage], *, pieces: int, batch_size: int,
    prefix_tokens: int, seed: int, folder: Path, plan: dict[str, Any],
) -> Iterator[Piece]:  # fmt: skip
    """Yield every piece in order, from disk where it was written before. `plan` tells this run from others."""
    _claim(folder, plan)
    batches = -(-pieces // batch_size)
    left, told = TimeLeft(batches), time.monotonic()
    for batch in range(batches):
        numbers = range(batch * batch_size, min(pieces, (batch + 1) * batch_size))
        kind_of_each = [kinds[number % len(kinds)] for number in numbers]
        started = [_passage(kind, passages, n // len(kinds)) for n, kind in zip(numbers, kind_of_each, strict=True)]
        drawn = mixed_seed(seed, batch)
        place = folder / f"batch-{batch:06d}.json"
        if place.exists():
            drafts = [Draft(**one) for one in json.loads(place.read_text(encoding="utf-8"))]
        else:
            prompts = [
                writer.prompt(kind, "" if passage is None else passage.text, mixed_seed(seed, number), prefix_tokens)
                for number, kind, passage in zip(numbers, kind_of_each, started, strict=True)
            ]
            drafts = writer.write(prompts, drawn)
            write_json(place, [vars(draft) for draft in drafts])
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                _LOG.info("synthesis: %d of %d batches, %s", batch + 1, batches, left.after(batch + 1))
        for number, kind, passage, draft in zip(numbers, kind_of_each, started, drafts, strict=True):
            yield Piece(number, kind, passage, drawn, draft)


def _passage(kind: Kind, passages: Sequence[Passage], turn: int) -> Passage | None:
    return passages[turn % len(passages)] if kind.uses_text else None


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    place = folder / "plan.json"
    folder.mkdir(parents=True, exist_ok=True)
    if place.exists() and json.loads(place.read_text(encoding="utf-8")) == json.loads(json.dumps(plan)):
        return
    if any(folder.iterdir()):
        _LOG.warning("%s: written under other options, or by another model; synthesis begins anew", folder)
        shutil.rmtree(folder)
        folder.mkdir()
    write_json(place, plan)
