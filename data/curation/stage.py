"""What a curation stage is, and how a chain of them runs.

A stage takes documents and gives documents. There are two kinds:

- a `DocumentStage` looks at one document at a time (normalise, filter, scrub). Consecutive ones run together, in
  batches, over worker processes; what comes out does not depend on how many.
- a `CorpusStage` sees the whole stream (duplicates, scoring by a model, rebalancing). It gets a `StageRun`: its count,
  a scratch folder for what does not fit into memory, the seed, and `ordered` to spread its own heavy part.

Stages are values that can be pickled; what they compute once (tables, models) they compute lazily.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.errors import DataError

__all__ = ["CorpusStage", "DocumentStage", "Stage", "StageRun", "batches", "run_chain"]

_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 1024

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class DocumentStage(Protocol):
    """Decides on each document alone."""

    @property
    def name(self) -> str:
        """Return what the card calls the stage."""
        ...

    def edit(self, document: Document, count: StageCount) -> Document | None:
        """Return the document, changed or not; or None, having told `count.drop(document, why)`."""
        ...


@runtime_checkable
class CorpusStage(Protocol):
    """Decides with the whole corpus in view."""

    @property
    def name(self) -> str:
        """Return what the card calls the stage."""
        ...

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield the documents that go on; `run.count.drop(document, why)` for every other."""
        ...


Stage = DocumentStage | CorpusStage


@dataclass
class StageRun:
    """What a corpus stage works with."""

    count: StageCount
    folder: Path
    """Scratch folder of this stage alone; removed after the build."""
    seed: int = 0
    workers: int = 1

    def ordered(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield function(item) in order, computed by the workers, a bounded number of items ahead.

        The function is pickled once for each worker: a module's function, a `partial`, or a frozen dataclass that is
        called.
        """
        return _ordered(function, items, self.workers)


def run_chain(
    stages: Sequence[Stage], documents: Iterator[Document], *, folder: Path, seed: int = 0, workers: int = 1
) -> tuple[Iterator[Document], list[StageCount]]:
    """Return (the documents behind the last stage, the count of every stage: complete when the stream has ended)."""
    counts = [StageCount(stage.name, seed) for stage in stages]
    together = itertools.groupby(zip(stages, counts, strict=True), key=lambda pair: isinstance(pair[0], CorpusStage))
    for whole_corpus, pairs in together:
        if not whole_corpus:
            documents = _edited(list(pairs), documents, seed, workers)
            continue
        for stage, count in pairs:
            assert isinstance(stage, CorpusStage)
            scratch = folder / f"{counts.index(count):02}-{stage.name}"
            scratch.mkdir(parents=True, exist_ok=True)
            documents = _counted(stage, documents, StageRun(count, scratch, seed, workers))
    return documents, counts


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists of about half a megabyte: enough work for a process, little memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(stage: CorpusStage, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
    def taken() -> Iterator[Document]:
        for document in documents:
            run.count.take(document)
            yield document

    for document in stage.run(taken(), run):
        run.count.give(document)
        yield document


def _edited(pairs: list[tuple[Any, StageCount]], documents: Iterator[Document], seed: int,
            workers: int) -> Iterator[Document]:  # fmt: skip
    stages = [stage for stage, _ in pairs]
    work = _EditBatch(stages, seed)
    for kept, counted in _ordered(work, batches(documents), workers):
        for (_, count), part in zip(pairs, counted, strict=True):
            count.add(part)
        yield from kept


@dataclass(frozen=True)
class _EditBatch:
    stages: list[DocumentStage]
    seed: int

    def __call__(self, batch: list[Document]) -> tuple[list[Document], list[StageCount]]:
        counts = [StageCount(stage.name, self.seed) for stage in self.stages]
        kept = []
        for document in batch:
            current: Document | None = document
            for stage, count in zip(self.stages, counts, strict=True):
                assert current is not None
                count.take(current)
                if (current := stage.edit(current, count)) is None:
                    break
                count.give(current)
            if current is not None:
                kept.append(current)
        return kept, counts


_FUNCTION: Callable[[Any], Any] | None = None
"""In a worker process: the function of the pass it serves."""


def _hold(function: Callable[[Any], Any]) -> None:
    global _FUNCTION
    _FUNCTION = function


def _apply(item: Any) -> Any:
    assert _FUNCTION is not None
    return _FUNCTION(item)


def _ordered(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: the parent may have threads (arrow's, a tokenizer's), whose locks a fork would copy held.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_hold, initargs=(function,)) as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(_apply, item))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise DataError("a worker process was killed, most often for want of memory. Use fewer workers.") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
