"""Builds a corpus: reads the sources, runs the stages, divides what is left, and writes it with its card.

The folder appears when all of it is whole; on any error nothing is left of it. The same input, recipe and seed give the
same bytes, whatever the number of workers.

Memory, beside the interpreter's 100 MB or so: batches of half a megabyte (2 * workers + 1 of them, and the longest
document), and what the stages state: 120 bytes a document for exact duplicates, 600 for near-duplicates (once in the
stage and once, after it, for the splits), 16 a word of evaluation sets, 45 a word of held-out text. Disk: three times
the text.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwindle.data.corpus_folder import MANIFEST, SPLITS
from dwindle.data.curation.card import corpus_card
from dwindle.data.curation.card_plots import write_plots
from dwindle.data.curation.card_text import card_markdown
from dwindle.data.curation.corpus_files import SplitFiles
from dwindle.data.curation.corpus_options import CorpusOptions
from dwindle.data.curation.near_duplicates import clustered
from dwindle.data.curation.reading import SourceReading
from dwindle.data.curation.splits import HeldOut, divided, without_resemblance
from dwindle.data.curation.spool import Spool, read_spooled
from dwindle.data.curation.stage import StageRun, run_chain
from dwindle.data.curation.stage_count import Examples, StageCount
from dwindle.data.curation.token_counts import TokenCounts
from dwindle.data.document import Document
from dwindle.data.sources import Source, check_sources
from dwindle.errors import DataError
from dwindle.storage import atomic_folder, folder_bytes, require_place, require_space, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["build_corpus"]

_TEXTS_ON_DISK = 3
"""How often the text stands on the disk while a corpus is built; sources that are compressed need more."""


def build_corpus(
    options: CorpusOptions,
    output: Path,
    *,
    workers: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the corpus to `output` and return its card; `tokenizer` is the student's, for counts of tokens.

    Raises DataError for text that cannot be used and for a corpus of which nothing is left, OutputError for a
    place that holds something else than a corpus or has no room for one.
    """
    require_place(output, MANIFEST, "a corpus")
    places = [Source.parse(one.place, one.text).place for one in options.sources]
    check_sources(places, "text")
    here = [Path(place) for place in places if Path(place).exists()]
    require_space(output, _TEXTS_ON_DISK * sum(map(folder_bytes, here)))
    readings = [SourceReading(one) for one in options.sources]
    with atomic_folder(output) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        documents = _told(itertools.chain.from_iterable(readings), notify)
        stream, counts = run_chain(options.stages, documents, folder=scratch, seed=options.seed, workers=workers)
        kept = Examples(f"{options.seed}\0kept")
        division = StageRun(StageCount("splits", options.seed), scratch, options.seed, workers)
        splits, tokens = _divided(stream, options, division, folder, kept, counts, tokenizer, notify)
        shutil.rmtree(scratch)
        card = corpus_card(
            options, [one.to_json() for one in readings], [*counts, division.count], splits, kept, tokens
        )
        manifest = {"schema": 1, "name": options.name, "seed": options.seed, "splits": splits,
                    "weights": options.weights}  # fmt: skip
        write_json(folder / MANIFEST, manifest)
        write_json(folder / "card.json", card)
        write_plots(card, folder / "plots")
        write_text(folder / "README.md", card_markdown(card))
    return card


def _divided(
    stream: Iterator[Document],
    options: CorpusOptions,
    run: StageRun,
    folder: Path,
    kept: Examples,
    counts: Sequence[StageCount],
    tokenizer: PreTrainedTokenizerBase | None,
    notify: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the splits; return (their entries in the manifest, counts of tokens by split if there is a tokenizer)."""
    ids: list[str] = []
    sizes: list[int] = []

    def noted() -> Iterator[Document]:
        for document in stream:
            run.count.take(document)
            ids.append(document.id)
            sizes.append(document.bytes)
            yield document

    near = options.near_duplicates
    with Spool(run.folder / "divided.jsonl") as spool:
        clusters = clustered(noted(), near, run, spool)
        if not ids:
            raise DataError(_nothing_left(counts))
        notify(f"{len(ids):,} documents are left, {sum(sizes):,} bytes; dividing them")
        split = divided(ids, np.array(sizes, np.int64), clusters.first, options.splits, options.seed)
        held: list[Document] = []
        entries: dict[str, Any] = {}
        tokens: dict[str, Any] = {}
        for number, name in reversed(list(enumerate(SPLITS))):
            if name == "train":
                chosen: Iterator[Document] = (d for d, where in zip(spool, split, strict=True) if where == number)
            else:
                offsets = (spool.offsets[i] for i in np.flatnonzero(split == number))
                chosen = iter(read_spooled(spool.path, offsets))
            apart = HeldOut.of([document.text for document in held], near)
            if held:
                chosen = without_resemblance(chosen, apart, [document.id for document in held], run)
            files = SplitFiles(folder / name, options.format)
            counter = None if tokenizer is None else TokenCounts(tokenizer)
            written: list[Document] = []
            for document in chosen:
                run.count.give(document)
                files.write(document)
                kept.offer(document, name)
                if counter is not None:
                    counter.add(document)
                if name != "train":
                    written.append(document)
            files.close()
            held += written
            entries[name] = files.to_json()
            if counter is not None:
                tokens[name] = counter.to_json()
    if not entries["train"]["documents"]:
        raise DataError(f"{len(ids)} document(s) are too few to hold some out and train on the rest. Add text, or set "
                        "splits.calibration and splits.evaluation to 0.")  # fmt: skip
    run.count.details = {
        "documents_compared_with_held_out": len(ids) - entries["evaluation"]["documents"],
        "near_duplicates_across_splits_found_and_dropped": sum(run.count.reasons.values()),
        "near_duplicates_across_splits_left": 0,
    }
    return {name: entries[name] for name in SPLITS}, {name: tokens[name] for name in SPLITS} if tokens else None


def _told(documents: Iterator[Document], notify: Callable[[str], None]) -> Iterator[Document]:
    source = None
    for document in documents:
        if document.source != source:
            source = document.source
            notify(f"reading {source}")
        yield document


def _nothing_left(counts: Sequence[StageCount]) -> str:
    lines = []
    for count in counts:
        if count.reasons:
            why = ", ".join(f"{reason} {number:,}" for reason, number in count.reasons.most_common(4))
            example = count.dropped.to_json()[0]
            taken = count.documents_in - count.documents_out
            lines.append(f"{count.name} took {taken:,} of {count.documents_in:,} ({why}; "
                         f"for example {example['id']}: {example['why']})")  # fmt: skip
    return ("nothing is left after filtering: " + ("; ".join(lines) or "the sources hold no text")
            + ". Loosen the filter that took the most, or mend the sources.")  # fmt: skip
