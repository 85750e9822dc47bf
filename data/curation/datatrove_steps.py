"""Curation beyond one machine: the same stages as steps of datatrove's executors (local, Slurm, Ray).

datatrove (https://github.com/huggingface/datatrove) runs a pipeline as N tasks; a step is called with the documents of
the step before, the task's rank and N, and gives documents. Everything that looks at one document alone is done by
dwindle's own stages, in any number of tasks, with the bytes that `dwindle data build` gives. What needs the whole
corpus is datatrove's: MinHash signatures, buckets, clusters and the filter (`MinhashDedup...`, with the bands, rows and
n-grams of `near_duplicates`; without its search for edited copies). `executor_plan` cuts a corpus recipe into the runs
of executors this takes; `recipes/corpus_on_datatrove.py` is a script that runs them.

Steps are called, not derived from datatrove's classes: its executors take both, and importing this module needs no
datatrove.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dwindle.data.curation.corpus_options import CorpusOptions, SourceOptions
from dwindle.data.curation.decontamination import Decontamination
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.reading import SourceReading
from dwindle.data.curation.stage import CorpusStage, Stage, run_chain
from dwindle.data.document import Document
from dwindle.data.sources import Source, check_sources
from dwindle.errors import RecipeError, offenders
from dwindle.storage import write_json

__all__ = ["Curate", "ExecutorRun", "ReadSources", "executor_plan", "record"]


@dataclass(frozen=True)
class ReadSources:
    """Step: the documents of a recipe's sources; each task reads every N-th file of a folder, and no file twice."""

    sources: tuple[SourceOptions, ...]
    """As in a corpus recipe."""

    def __call__(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield the documents of a task."""
        yield from data or ()
        for number, source in enumerate(self.sources):
            # Sources of one file each go to different tasks.
            for document in SourceReading(source, ((rank - number) % world_size, world_size)):
                yield _theirs(document)


@dataclass(frozen=True)
class Curate:
    """Step: what the stages leave; a stage that sees the corpus sees the documents of its task."""

    stages: tuple[Stage, ...]
    counts: str
    """Folder of the counts, one JSON file for each task: documents, bytes, reasons, examples."""
    seed: int = 0
    """Of the examples."""

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield the documents that go on, and write the counts when all have gone by."""
        with TemporaryDirectory() as scratch:
            own = (_ours(document) for document in data)
            kept, counts = run_chain(self.stages, own, folder=Path(scratch), seed=self.seed)
            yield from map(_theirs, kept)
        write_json(Path(self.counts) / f"{rank:05d}.json", [count.to_json() for count in counts])


@dataclass(frozen=True)
class ExecutorRun:
    """One run of an executor: its name, its steps, and its number of tasks."""

    name: str
    steps: tuple[Any, ...]
    tasks: int


def executor_plan(options: CorpusOptions, output: Path | str, tasks: int) -> list[ExecutorRun]:
    """Return the runs of executors that curate a corpus, in order; `output`/text holds the result, a file a task.

    Stages before and behind `near_duplicates` run in `tasks` tasks each, in between datatrove's runs. Decontamination
    counts what is common in a task's documents, and exact duplicates are looked for in them; splits are not divided.

    Raises RecipeError for stages that need the whole corpus and have no counterpart, DataError for missing sources.
    """
    _require_distributed(options)
    check_sources([Source.parse(one.place, one.text).place for one in options.sources], "text")
    first, near, second = _around_near_duplicates(options.stages)
    folder = Path(output)

    def curated(name: str, stages: tuple[Stage, ...], *before: Any) -> ExecutorRun:
        curate = Curate(stages, str(folder / "counts" / name), options.seed)
        return ExecutorRun(name, (*before, curate, _writer(folder / name)), tasks)

    read = ReadSources(options.sources)
    if near is None:
        return [curated("text", first, read)]
    filtered = curated("filtered", first, read)
    return [filtered, *_minhash_runs(near, folder, tasks), curated("text", second, *_deduplicated(folder))]


def record(_: Any, document: Any) -> dict[str, Any]:
    """Return the row of a document as `dwindle data build` writes it; an `adapter` of datatrove's writers."""
    ours = _ours(document)
    return {"text": ours.text, "source": ours.source, "licence": ours.licence, "id": ours.id, "how": dict(ours.how)}


def _require_distributed(options: CorpusOptions) -> None:
    first, near, _ = _around_near_duplicates(options.stages)
    wrong = []
    for stage in options.stages:
        if isinstance(stage, ExactDuplicates) and (near is None or stage not in first):
            wrong.append("exact_duplicates without near_duplicates behind it, which finds them too")
        elif isinstance(stage, CorpusStage) and not isinstance(
            stage, ExactDuplicates | NearDuplicates | Decontamination
        ):
            wrong.append(f"{stage.name} (needs the whole corpus and models; build with it on one machine, behind)")
    if sum(isinstance(stage, NearDuplicates) for stage in options.stages) > 1:
        wrong.append("near_duplicates more than once")
    if limited := [one.name for one in options.sources if one.most_bytes is not None]:
        wrong.append(f"most_bytes of {offenders(limited)} (tasks do not know how much others have read)")
    if wrong:
        raise RecipeError(f"datatrove: {'; '.join(wrong)}. Take that out of the recipe.")


def _around_near_duplicates(
    stages: Sequence[Stage],
) -> tuple[tuple[Stage, ...], NearDuplicates | None, tuple[Stage, ...]]:
    """Return (stages before near_duplicates, the stage itself if there is one, stages behind it)."""
    for place, stage in enumerate(stages):
        if isinstance(stage, NearDuplicates):
            return tuple(stages[:place]), stage, tuple(stages[place + 1 :])
    return tuple(stages), None, ()


def _writer(place: Path) -> Any:
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    return JsonlWriter(str(place), output_filename="${rank}.jsonl.gz", adapter=record)


def _minhash_runs(near: NearDuplicates, folder: Path, tasks: int) -> list[ExecutorRun]:
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    asked = near.options
    config = MinhashConfig(n_grams=asked.ngram, num_buckets=asked.bands, hashes_per_bucket=asked.rows)
    signatures, buckets, clusters = (str(folder / "minhash" / name) for name in ("signatures", "buckets", "clusters"))
    return [
        ExecutorRun("signatures", (_reader(folder), MinhashDedupSignature(signatures, config)), tasks),
        ExecutorRun("buckets", (MinhashDedupBuckets(signatures, buckets, config=config),), config.num_buckets),
        ExecutorRun("clusters", (MinhashDedupCluster(buckets, clusters, config=config),), 1),
    ]


def _deduplicated(folder: Path) -> tuple[Any, ...]:
    from datatrove.pipeline.dedup import MinhashDedupFilter

    return _reader(folder), MinhashDedupFilter(str(folder / "minhash" / "clusters"))


def _reader(folder: Path) -> Any:
    from datatrove.pipeline.readers.jsonl import JsonlReader

    return JsonlReader(str(folder / "filtered"), add_file_path=False)


def _ours(document: Any) -> Document:
    known = document.metadata
    return Document(document.text, known["source"], licence=known["licence"], id=document.id, how=known["how"])


def _theirs(document: Document) -> Any:
    from datatrove.data import Document as Theirs

    metadata = {"source": document.source, "licence": document.licence, "how": dict(document.how)}
    return Theirs(text=document.text, id=document.id, metadata=metadata)
