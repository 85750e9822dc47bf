"""Writing a logit cache: run the teacher on the windows that are missing, shard by shard.

The different windows of a token set, in their order, are cut into shards; which process writes a shard, and when, does
not matter. The draws of a window depend on the seed and its ids only and the batches of the teacher on the shard, so
one process, several, and a run that was killed give the same files. A shard is written beside its place, renamed and
then entered in the manifest, under a lock: a kill loses the shard under way. Appending is writing another token set
into the same folder; windows that are there already are left out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwindle.data_order import mixed_seed
from dwindle.distill.bit_fields import MAX_FIELD_BITS
from dwindle.distill.cache_options import CacheOptions
from dwindle.distill.cache_shard import Hashes, shard_bytes, shard_name, window_hashes
from dwindle.distill.logit_cache import CacheManifest, LogitCache, ShardEntry, require_identity
from dwindle.distill.teacher_model import Teacher
from dwindle.distill.teacher_signal import logit_slices
from dwindle.distill.token_sampling import SampledTokens, sample_tokens
from dwindle.distill.window_codec import Floats, Ints, WindowCodec, WindowTokens
from dwindle.errors import OutputError, RecipeError
from dwindle.evaluation_mode import evaluating
from dwindle.measure import LogitSlices
from dwindle.sharding import Processes
from dwindle.storage import atomic_file, hash_file, require_space
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.vocabulary_map import VocabularyMap

__all__ = ["enter_teacher_files", "write_cache"]

_LOGITS = 1 << 23
"""Logits made at a time: 32 MiB in float32."""
_SAMPLED = {"cpu": 1 << 19}
"""Logits sampled at a time: on a CPU what its caches hold."""
_SAMPLED_DEVICE = 1 << 25
_BYTES_PER_TOKEN = 64
"""What is asked for on the disk, in round numbers."""


def write_cache(
    teacher: ModelBundle | Teacher,
    tokens: TokenSet,
    options: CacheOptions,
    *,
    mapped: VocabularyMap | None = None,
    part: tuple[int, int] | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> LogitCache:
    """Return the cache at `options.folder` with all windows of `tokens` in it; only missing ones are asked for.

    With `mapped` the windows are in a pruned vocabulary, and so is the cache. The processes of a `torchrun` launch
    divide the shards among them; `part` (i, n) writes every n-th shard from the i-th on and waits for nobody, for
    machines that know nothing of each other. `on_shard` hears how many shards are done of how many.

    Raises RecipeError if the folder holds the predictions of something else or teacher and tokens do not go together,
    OutputError for a folder that cannot be written or holds other files.
    """
    tokens.require("train")
    with evaluating(teacher.model):
        return _written(Teacher.of(teacher), tokens, options, mapped, part, on_shard)


def _written(
    teacher: Teacher, tokens: TokenSet, options: CacheOptions, mapped: VocabularyMap | None,
    part: tuple[int, int] | None, on_shard: Callable[[int, int], None] | None,
) -> LogitCache:  # fmt: skip
    """Return the cache of a teacher in evaluation mode."""
    folder = Path(options.folder)
    vocabulary = teacher.anatomy.vocab if mapped is None else len(mapped.kept)
    _check(teacher, tokens, options, vocabulary, mapped)
    manifest = CacheManifest(
        teacher.content_sha256, teacher.name, tokens.tokenizer_sha256, vocabulary, options.sampling
    )
    manifest = _entered(folder, manifest, options)
    writer = _Writer(folder, manifest, logit_slices(teacher, mapped), teacher.device)
    ids, hashes = _different(tokens)
    cache = LogitCache(folder, manifest)
    missing = ~cache.holds(hashes)
    require_space(folder, int(missing.sum()) * ids.shape[1] * _BYTES_PER_TOKEN)
    size = max(1, manifest.sampling["shard_tokens"] // ids.shape[1])
    processes = Processes.current(teacher.device)
    first, step = (processes.rank, processes.world) if part is None else part
    starts = list(range(0, len(ids), size))[first::step]
    for done, start in enumerate(starts, 1):
        rows = np.flatnonzero(missing[start : start + size]) + start
        if len(rows):
            writer.write(ids[rows], hashes[rows])
        if on_shard is not None:
            on_shard(done, len(starts))
    if part is None:
        processes.wait()
    return _finished(folder, tokens, hashes)


def enter_teacher_files(folder: str | Path, digest: str | None) -> None:
    """Enter the hash of the files that the cache's teacher was loaded from, so that it is known without loading it."""
    with _locked(Path(folder)):
        manifest = LogitCache.open(folder).manifest
        replace(manifest, teacher_files=digest).write(Path(folder))


def _check(
    teacher: Teacher, tokens: TokenSet, options: CacheOptions, vocabulary: int, mapped: VocabularyMap | None
) -> None:
    wrong = []
    spoken = encoding_sha256(teacher.tokenizer) if mapped is None else mapped.pruned_sha256
    if spoken != tokens.tokenizer_sha256:
        wrong.append(f"the data was tokenised with {tokens.tokenizer_sha256[:12]}, the teacher reads {spoken[:12]}")
    if teacher.sharded:
        wrong.append("the teacher is sharded, and processes write at their own pace (load it with alone=True)")
    if beyond := [id_ for id_ in options.always if id_ >= vocabulary]:
        wrong.append(f"always={beyond} (needed: ids below {vocabulary:,})")
    if vocabulary > 1 << MAX_FIELD_BITS:
        wrong.append(f"the vocabulary has {vocabulary:,} entries (a cache holds ids below {1 << MAX_FIELD_BITS:,})")
    if (window := tokens.ids.shape[1] - 1) > teacher.anatomy.context:
        wrong.append(f"windows predict {window:,} tokens, the teacher's context is {teacher.anatomy.context:,}")
    if wrong:
        raise RecipeError(f"distill: cache: {'; '.join(wrong)}.")


def _entered(folder: Path, wanted: CacheManifest, options: CacheOptions) -> CacheManifest:
    """Return the folder's manifest, written if there was none; raise for a folder that holds something else."""
    with _locked(folder):
        found = CacheManifest.read(folder)
        if found is None:
            foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.suffix != ".shard")
            if foreign:
                raise OutputError(f"{folder} holds something else than a logit cache ({', '.join(foreign[:5])}). "
                                  "Take another folder; nothing was written.")  # fmt: skip
            wanted.write(folder)
            return wanted
        needed = {name: getattr(wanted, name) for name in ("teacher", "tokenizer", "vocabulary")}
        require_identity(folder, found, {**needed, **options.chosen})
        return found


def _finished(folder: Path, tokens: TokenSet, hashes: Hashes) -> LogitCache:
    """Return the cache, with `tokens` among its data if all of it is there."""
    with _locked(folder):
        cache = LogitCache.open(folder)
        entry = {"sha256": tokens.sha256, "source": tokens.source, "windows": len(tokens.ids),
                 "window_tokens": tokens.ids.shape[1], "licence": tokens.licence}  # fmt: skip
        if not cache.holds(hashes).all():
            return cache
        others = [one for one in cache.manifest.data if one != entry]
        data = sorted([*others, entry], key=lambda one: str(one["sha256"]))
        replace(cache.manifest, data=tuple(data)).write(folder)
        return LogitCache.open(folder)


def _different(tokens: TokenSet) -> tuple[Tensor, Hashes]:
    """Return the different inputs [N, T - 1] of a token set, in its order, and their hashes."""
    ids = tokens.ids[:, :-1]
    hashes = window_hashes(ids)
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return ids[torch.from_numpy(first)], hashes[first]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one process; others wait. The operating system drops the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: one process at a time there
        fcntl = None  # type: ignore[assignment]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}). Choose another folder.") from error
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class _Writer:
    """Runs the teacher over windows and writes them as one shard."""

    def __init__(self, folder: Path, manifest: CacheManifest, slices: LogitSlices, device: torch.device) -> None:
        sampling = manifest.sampling
        self._folder, self._slices, self._device = folder, slices, device
        self._draws, self._temperature = sampling["draws"], sampling["temperature"]
        self._always, self._seed = tuple(sampling["always"]), sampling["seed"]
        self._batch_tokens = sampling["batch_tokens"]
        self._sampled_rows = max(1, _SAMPLED.get(device.type, _SAMPLED_DEVICE) // manifest.vocabulary)
        self._logit_rows = max(self._sampled_rows, _LOGITS // manifest.vocabulary)
        self._codec = WindowCodec(manifest.vocabulary, self._draws, len(self._always))

    def write(self, ids: Tensor, hashes: Hashes) -> None:
        """Write the shard of the windows `ids` [N, T] and enter it in the manifest."""
        batch = max(1, self._batch_tokens // ids.shape[1])
        windows: list[bytes] = []
        for start in range(0, len(ids), batch):
            windows += self._encoded(ids[start : start + batch], hashes[start : start + batch])
        place = self._folder / shard_name(hashes)
        with atomic_file(place) as partial:
            partial.write_bytes(shard_bytes(windows, hashes))
        entry = ShardEntry(len(ids), ids.shape[1], place.stat().st_size, hash_file(place))
        with _locked(self._folder):
            manifest = CacheManifest.read(self._folder)
            assert manifest is not None
            replace(manifest, shards={**manifest.shards, place.name: entry}).write(self._folder)

    @torch.no_grad()
    def _encoded(self, ids: Tensor, hashes: Hashes) -> list[bytes]:
        """Return the bytes of a batch of windows."""
        uniform = torch.stack([_uniform(self._seed, int(one), ids.shape[1]) for one in hashes])
        flat, done, parts = uniform[..., 0].flatten(), 0, list[SampledTokens]()
        for logits in self._slices(ids.to(self._device), self._logit_rows):
            for part in torch.split(logits, self._sampled_rows):
                own = flat[done : done + len(part)]
                parts.append(sample_tokens(part, own, draws=self._draws, temperature=self._temperature,
                                           always=self._always))  # fmt: skip
                done += len(part)
        found = _windows(parts, len(ids))
        return [self._codec.encode(one, own[:, 1].numpy()) for one, own in zip(found, uniform, strict=True)]


def _uniform(seed: int, window: int, positions: int) -> Tensor:
    """Return the random numbers of a window, [T, 2]: one per position to draw with, one to round with."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, window))
    return torch.rand(positions, 2, dtype=torch.float64, generator=generator)


def _windows(parts: list[SampledTokens], count: int) -> Iterator[WindowTokens]:
    """Yield `count` windows of equally many positions out of the samples of consecutive slices."""
    certain = _Ragged([(p.certain_rows, p.certain_ids, len(p.top1)) for p in parts])
    drawn = _Ragged([(p.drawn_rows, p.drawn_ids, len(p.top1)) for p in parts])
    probabilities: Floats = torch.cat([p.certain_probabilities for p in parts]).double().cpu().numpy()
    entropy: Floats = torch.cat([p.entropy for p in parts]).double().cpu().numpy()
    top1: Ints = torch.cat([p.top1 for p in parts]).cpu().numpy()
    named: Floats = torch.cat([p.always for p in parts]).double().cpu().numpy()
    positions = len(top1) // count
    for start in range(0, len(top1), positions):
        rows = slice(start, start + positions)
        kept = certain.places(rows)
        yield WindowTokens(entropy[rows], top1[rows], named[rows], certain.counts[rows], certain.ids[kept],
                           probabilities[kept], drawn.counts[rows], drawn.ids[drawn.places(rows)])  # fmt: skip


class _Ragged:
    """Tokens of positions that have different numbers of them."""

    def __init__(self, parts: list[tuple[Tensor, Tensor, int]]) -> None:
        self.ids: Ints = torch.cat([ids for _, ids, _ in parts]).cpu().numpy()
        counts = [np.bincount(rows.cpu().numpy(), minlength=n) for rows, _, n in parts]
        self.counts: Ints = np.concatenate(counts)
        self._ends: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.counts)])

    def places(self, rows: slice) -> slice:
        """Return where the tokens of these positions stand."""
        return slice(int(self._ends[rows.start]), int(self._ends[rows.stop]))
