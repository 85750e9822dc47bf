from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dwindle.data.curation.stage import StageRun, batches, run_chain
from dwindle.data.curation.stage_count import Examples, StageCount
from dwindle.data.document import Document
from dwindle.errors import DataError


def documents(count: int = 3000) -> Iterator[Document]:
    return (Document(f"text {i} " * (i % 40 + 1), "s", id=f"s#{i}") for i in range(count))


@dataclass(frozen=True)
class DropsEvery:
    step: int
    name: str = "drops"

    def edit(self, document: Document, count: StageCount) -> Document | None:
        if int(document.id.partition("#")[2]) % self.step == 0:
            count.drop(document, "divisible", document.id)
            return None
        return document


@dataclass(frozen=True)
class Shouts:
    name: str = "shouts"

    def edit(self, document: Document, count: StageCount) -> Document | None:
        count.changes["upper"] += 1
        return replace(document, text=document.text.upper())


@dataclass(frozen=True)
class KeepsLongest:
    name: str = "longest"

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        everything = list(documents)
        for document, size in zip(everything, run.ordered(len_of, everything), strict=True):
            if size > 200:
                yield document
            else:
                run.count.drop(document, "short")


def len_of(document: Document) -> int:
    return len(document.text)


def test_a_chain_counts_what_every_stage_takes_and_gives(tmp_path: Path) -> None:
    stages = [DropsEvery(3), Shouts(), KeepsLongest(), DropsEvery(7)]
    out, counts = run_chain(stages, documents(), folder=tmp_path, seed=5)
    texts = [d.text for d in out]
    counted = [count.to_json() for count in counts]
    assert [c["documents_in"] for c in counted] == [3000, 2000, 2000, counted[2]["documents_out"]]
    assert counted[0]["dropped"] == {"divisible": 1000}
    assert counted[1]["changed"] == {"upper": 2000}
    for count in counted:
        assert count["documents_in"] - count["documents_out"] == sum(count["dropped"].values())
    assert all(text == text.upper() for text in texts)


def test_examples_are_a_draw_that_ignores_order_and_parts() -> None:
    whole, first, second = Examples("k"), Examples("k"), Examples("k")
    listed = list(documents(500))
    for document in listed:
        whole.offer(document, "w")
    for document in reversed(listed[200:]):
        first.offer(document, "w")
    for document in listed[:200]:
        second.offer(document, "w")
    first.add(second)
    assert whole.to_json() == first.to_json()
    assert len(whole.to_json()) == 5
    other = Examples("another")
    for document in listed:
        other.offer(document, "w")
    assert [e["id"] for e in other.to_json()] != [e["id"] for e in whole.to_json()]


def test_batches_are_bounded() -> None:
    sizes = [sum(len(d.text) for d in batch) for batch in batches(Document("x" * 100_000, "s") for _ in range(20))]
    assert max(sizes) <= (1 << 19) + 100_000
    assert sum(sizes) == 2_000_000


def test_work_spread_over_processes_comes_back_in_order(tmp_path: Path) -> None:
    run = StageRun(StageCount("s"), tmp_path, workers=2)
    assert list(run.ordered(abs, range(-50, 50))) == [abs(i) for i in range(-50, 50)]


def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    run = StageRun(StageCount("s"), tmp_path, workers=2)
    with pytest.raises(DataError, match="worker process was killed"):
        list(run.ordered(os._exit, [9]))
