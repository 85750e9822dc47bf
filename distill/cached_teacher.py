"""The teacher from disk: the same small type as a live one, without its cost.

The training loop's batches are known by their ids, so their order, the number of epochs and a resumed run need nothing
from here. Each epoch reads the same draws: the gradient is unbiased over the seeds of a cache, not over its epochs, and
the noise of a cache that is read often is better lowered by more `draws`.

Whole caches are read without the teacher. Where windows are missing the teacher writes them first, each process of a
launch its share.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from dwindle.distill.cache_options import CacheOptions
from dwindle.distill.cache_shard import window_hashes
from dwindle.distill.cache_writer import enter_teacher_files, write_cache
from dwindle.distill.logit_cache import CacheManifest, LogitCache
from dwindle.distill.teacher_model import Teacher
from dwindle.distill.teacher_signal import TeacherTargets
from dwindle.errors import DataError
from dwindle.model_source import find_folder
from dwindle.storage import hash_file, hash_json
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.vocabulary_map import VocabularyMap

__all__ = ["CachedTeacher", "is_whole", "model_files_sha256", "prepared_cache", "remember_teacher", "teacher_is_needed"]


class CachedTeacher:
    """Reads the targets of every batch from a logit cache."""

    def __init__(self, cache: LogitCache) -> None:
        self.cache = cache

    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the cache's targets for `ids` [B, T]; raise DataError if a window is not in it."""
        sparse = self.cache.targets(ids).to(ids.device)
        return TeacherTargets(sparse.top1, None, sparse)


def is_whole(folder: str | Path, tokens: TokenSet) -> bool:
    """Return whether a cache at `folder` holds all windows of `tokens`, so that no teacher is needed."""
    if CacheManifest.read(Path(folder)) is None:
        return False
    return bool(LogitCache.open(folder).holds(window_hashes(tokens.ids[:, :-1])).all())


def prepared_cache(
    student: ModelBundle,
    tokens: TokenSet,
    options: CacheOptions,
    teacher: ModelBundle | Teacher | None = None,
    *,
    mapped: VocabularyMap | None = None,
) -> LogitCache:
    """Return a cache with all windows of `tokens`, written from `teacher` where some are missing.

    Raises DataError if windows are missing and there is no teacher, RecipeError for a cache of another teacher,
    tokenizer, vocabulary or sampling; nothing is changed then.
    """
    if teacher is not None:
        write_cache(teacher, tokens, options, mapped=mapped)
    cache = LogitCache.open(options.folder)
    tokenizer = encoding_sha256(student.tokenizer)
    cache.require_identity(tokenizer=tokenizer, vocabulary=student.anatomy.vocab, **options.chosen)
    cache.require(tokens)
    return cache


def model_files_sha256(folder: str | Path) -> str | None:
    """Return one hash over a model folder's config and weights, None if there are none: known without loading it."""
    files = sorted([*Path(folder).glob("config.json"), *Path(folder).glob("*.safetensors")])
    return hash_json([[file.name, hash_file(file)] for file in files]) if files else None


def remember_teacher(options: CacheOptions, teacher: str) -> None:
    """Note by which files the cache's teacher (folder or id) is known: `teacher_is_needed` then need not load it."""
    enter_teacher_files(options.folder, model_files_sha256(find_folder(teacher)[0]))


def teacher_is_needed(options: CacheOptions, tokens: TokenSet, teacher: str | None) -> bool:
    """Return whether the teacher (folder or id) has to be loaded: windows are missing, or it may be another one.

    Raises DataError if it is needed and not given.
    """
    if not is_whole(options.folder, tokens):
        if teacher is None:
            known = ""
            if CacheManifest.read(Path(options.folder)) is not None:
                cache = LogitCache.open(options.folder)
                missing = int((~cache.holds(window_hashes(tokens.ids[:, :-1]))).sum())
                known = f" {cache.missing_message(missing, len(tokens.ids), tokens.source)}"
            raise DataError(
                f"distill: the logit cache {options.folder} lacks windows of {tokens.source}, and no teacher is given "
                f"to write them. Add -t TEACHER.{known}"
            )
        return True
    if teacher is None:
        return False
    made_of = LogitCache.open(options.folder).manifest.teacher_files
    return made_of is None or made_of != model_files_sha256(find_folder(teacher)[0])
