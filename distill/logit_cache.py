"""A teacher's predictions on disk: a folder that many students, runs and machines read, and that can grow.

    FOLDER/manifest.json    whose predictions these are, how they were sampled, of which data, in which shards
    FOLDER/HASH.shard       windows (`cache_shard`), each some bit fields (`window_codec`) of sampled tokens

The manifest names teacher, tokenizer, vocabulary and sampling by content hash or value; a cache of something else is
refused before anything is read or written. A shard stands in the manifest once it is whole. A shard that was deleted
is not an error by itself: its windows are missing, and `cache_writer.write_cache` writes them again, to the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dwindle.distill.bit_fields import MAX_FIELD_BITS
from dwindle.distill.cache_shard import INDEX_BYTES, Hashes, Shard, window_hashes
from dwindle.distill.sparse_targets import SparseTargets
from dwindle.distill.window_codec import WindowCodec, WindowTokens
from dwindle.errors import DataError, RecipeError, offenders
from dwindle.storage import hash_file, read_json, write_json
from dwindle.token_set import TokenSet
from dwindle.typed_json import require_types

__all__ = ["CacheManifest", "LogitCache", "ShardEntry"]

_MANIFEST = "manifest.json"
_SCHEMA = 1
_SHARD_NAME = re.compile(r"[0-9a-f]{16}\.shard")


@dataclass(frozen=True)
class ShardEntry:
    """A whole shard."""

    windows: int
    positions: int
    """Positions per window: one less than the tokens of a training window."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CacheManifest:
    """What a cache holds."""

    teacher: str
    """Content hash of the teacher."""
    teacher_name: str
    tokenizer: str
    """`tokenization.encoding_sha256` of the tokenizer the windows are in."""
    vocabulary: int
    sampling: Mapping[str, Any]
    """`CacheOptions.sampling`."""
    teacher_files: str | None = None
    """Hash over the teacher's files, by which it is known without loading it; None if it was not loaded from files."""
    data: tuple[Mapping[str, Any], ...] = ()
    """Token sets that are in the cache as a whole: sha256, source, windows, window_tokens, licence."""
    shards: Mapping[str, ShardEntry] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> CacheManifest | None:
        """Return the manifest of a folder, None if it has none; raise DataError for a damaged one."""
        path = folder / _MANIFEST
        if not path.is_file():
            return None
        try:
            data = dict(read_json(path))
            if data.pop("schema") != _SCHEMA:
                raise ValueError(f"its schema is not {_SCHEMA}")
            data.pop("totals")
            shards = {name: ShardEntry(**entry) for name, entry in data.pop("shards").items()}
            made = cls(**{**data, "data": tuple(data["data"])}, shards=shards)
            require_types(made)
            _require_sane(made)
            return made
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({error}). Restore it, or take another folder.") from error

    def write(self, folder: Path) -> None:
        """Write the manifest, shards in the order of their names, with totals for the reader."""
        shards = {name: asdict(entry) for name, entry in sorted(self.shards.items())}
        body = {key: value for key, value in vars(self).items() if key != "shards"}
        totals = {"positions": self.positions, "bytes": self.bytes, "bytes_per_token": self.bytes_per_token}
        write_json(folder / _MANIFEST, {"schema": _SCHEMA, **body, "totals": totals, "shards": shards})

    @property
    def positions(self) -> int:
        """Return the positions of all shards."""
        return sum(entry.windows * entry.positions for entry in self.shards.values())

    @property
    def bytes(self) -> int:
        """Return the bytes of all shards."""
        return sum(entry.bytes for entry in self.shards.values())

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of a position, with all indices; 0 for an empty cache."""
        return self.bytes / max(1, self.positions)

    def differences(self, needed: Mapping[str, Any]) -> list[str]:
        """Return a line per field or sampling parameter that is not as needed."""
        found = {**vars(self), **self.sampling}
        return [f"{key}: found {_short(found[key])}, needed {_short(value)}" for key, value in needed.items()
                if found[key] != value]  # fmt: skip


def _require_sane(made: CacheManifest) -> None:
    """Raise ValueError for a manifest whose numbers no writer writes: places in files follow from them."""
    sampling = made.sampling
    draws, always, temperature = sampling["draws"], sampling["always"], sampling["temperature"]
    if not 1 < made.vocabulary <= 1 << MAX_FIELD_BITS or not isinstance(draws, int) or not 1 <= draws < 1 << 24:
        raise ValueError(f"vocabulary {made.vocabulary}, draws {draws!r}")
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature!r}")
    if not isinstance(always, list) or not all(isinstance(i, int) and 0 <= i < made.vocabulary for i in always):
        raise ValueError(f"always {always!r:.80}")
    wrong = [
        name
        for name, one in made.shards.items()
        if not _SHARD_NAME.fullmatch(name) or one.positions < 1 or not 0 < one.windows * INDEX_BYTES <= one.bytes
    ]
    if wrong:
        raise ValueError(f"impossible shards {offenders(wrong, limit=3)}")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


class LogitCache:
    """A cache opened for reading."""

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.absent = sorted(name for name in manifest.shards if not (folder / name).is_file())
        """Shards of the manifest whose files are gone."""
        there = {name: entry for name, entry in sorted(manifest.shards.items()) if name not in self.absent}
        self._shards = [Shard(folder / n, e.windows, e.positions, e.bytes) for n, e in there.items()]
        self._codec = WindowCodec(manifest.vocabulary, self._sampling("draws"), len(self._sampling("always")))
        hashes = np.concatenate([np.zeros(0, np.uint64), *(shard.hashes for shard in self._shards)])
        numbers = [len(shard.hashes) for shard in self._shards]
        self._order = np.argsort(hashes, kind="stable")
        self._sorted: Hashes = hashes[self._order]
        self._shard_of = np.repeat(np.arange(len(numbers)), numbers)
        self._row_of = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in numbers)])

    @classmethod
    def open(cls, folder: str | Path) -> LogitCache:
        """Return the cache at `folder`; raise DataError if there is none, or a part of it is damaged."""
        manifest = CacheManifest.read(Path(folder))
        if manifest is None:
            raise DataError(f"{folder} holds no logit cache (no {_MANIFEST}). Name another folder, or write one.")
        return cls(Path(folder), manifest)

    @property
    def temperature(self) -> float:
        """Return the temperature of the stored distributions."""
        return float(self._sampling("temperature"))

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the numbers read from here, as JSON values: equal for a cache that has only grown."""
        made = self.manifest
        return {"teacher": made.teacher, "tokenizer": made.tokenizer, "vocabulary": made.vocabulary, **made.sampling}

    def _sampling(self, name: str) -> Any:
        return self.manifest.sampling[name]

    def require_identity(self, **needed: Any) -> None:
        """Raise RecipeError, naming all differences, unless manifest and sampling have these values."""
        require_identity(self.folder, self.manifest, needed)

    def holds(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Return for each window hash whether the cache has that window."""
        if not len(self._sorted):
            return np.zeros(len(hashes), bool)
        found: NDArray[np.bool_] = self._sorted[self._places(hashes)] == hashes
        return found

    def _places(self, hashes: Hashes) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)

    def require(self, tokens: TokenSet) -> None:
        """Raise DataError, with numbers, if windows of `tokens` are missing."""
        missing = int((~self.holds(window_hashes(tokens.ids[:, :-1]))).sum())
        if missing:
            raise DataError(self.missing_message(missing, len(tokens.ids), tokens.source))

    def missing_message(self, missing: int, windows: int, source: str) -> str:
        """Return what to say about missing windows."""
        made = "; ".join(f"{one['source']}, windows of {one['window_tokens']} tokens" for one in self.manifest.data)
        gone = f" The files {offenders(self.absent, limit=5)} are gone." if self.absent else ""
        return (
            f"{self.folder}: {missing:,} of the {windows:,} windows of {source} are not in this logit cache "
            f"(it holds {len(self._sorted):,} windows{f' of {made}' if made else ''}).{gone} Run with the teacher, "
            "which adds them, or train on the text and the context that the cache was made of."
        )

    def targets(self, ids: Tensor) -> SparseTargets:
        """Return what the cache has on the windows `ids` [B, T], B * T positions; raise DataError for missing ones."""
        hashes = window_hashes(ids)
        found = self.holds(hashes)
        if not found.all():
            raise DataError(self.missing_message(int((~found).sum()), len(ids), "the batch"))
        places = self._order[self._places(hashes)]
        windows = [self._window(int(place)) for place in places]
        return _sparse_targets(windows, self.temperature, self._sampling("draws"), self._sampling("always"))

    def _window(self, place: int) -> WindowTokens:
        shard = self._shards[self._shard_of[place]]
        try:
            found = self._codec.decode(shard.window(int(self._row_of[place])), shard.positions)
            if max(found.certain_ids.max(initial=0), found.drawn_ids.max(initial=0)) >= self.manifest.vocabulary:
                raise ValueError("ids beyond the vocabulary")
        except (ValueError, IndexError) as error:
            raise DataError(f"{shard.path}: a window of this logit cache is none ({error}). Delete the file and run "
                            "again with the teacher: only its windows are written again.") from error  # fmt: skip
        return found

    def verify(self) -> None:
        """Read every shard; raise DataError naming all that are gone or not what was written."""
        wrong = [s.path.name for s in self._shards if hash_file(s.path) != self.manifest.shards[s.path.name].sha256]
        if wrong or self.absent:
            raise DataError(
                f"{self.folder}: shards of this logit cache are damaged or gone: {offenders([*wrong, *self.absent])}. "
                "Delete them and run again with the teacher: only their windows are written again."
            )


def require_identity(folder: Path, manifest: CacheManifest, needed: Mapping[str, Any]) -> None:
    """Raise RecipeError, naming all differences, unless a manifest has these values."""
    if differing := manifest.differences(needed):
        raise RecipeError(
            f"distill: {folder} holds the predictions of something else: {'; '.join(differing)}. Take another folder "
            "for the cache; nothing was changed."
        )


def _sparse_targets(windows: list[WindowTokens], temperature: float, draws: int, always: list[int]) -> SparseTargets:
    """Return the stored tokens as padded columns: most probable, named, kept for certain, drawn."""
    certain_counts = np.concatenate([window.certain_counts for window in windows])
    drawn_counts = np.concatenate([window.drawn_counts for window in windows])
    n, first = len(certain_counts), 1 + len(always)
    columns = first + int((certain_counts + drawn_counts).max())
    ids, weights = np.zeros((n, columns), np.int64), np.zeros((n, columns))
    ids[:, 0] = np.concatenate([window.top1 for window in windows])
    ids[:, 1:first] = always
    weights[:, 1:first] = np.concatenate([window.named for window in windows])
    rows, places = _columns(certain_counts, np.full(n, first))
    ids[rows, places] = np.concatenate([window.certain_ids for window in windows])
    weights[rows, places] = np.concatenate([window.certain_probabilities for window in windows])
    rows, places = _columns(drawn_counts, first + certain_counts)
    ids[rows, places] = np.concatenate([window.drawn_ids for window in windows])
    weights[rows, places] = 1 / draws
    weights[:, 0] = 1 - weights.sum(1)
    entropy = np.concatenate([window.entropy for window in windows]).astype(np.float32)
    return SparseTargets(torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float32)),
                         torch.from_numpy(entropy), temperature)  # fmt: skip


def _columns(counts: NDArray[np.int64], first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row and column of each of `counts` tokens, laid side by side from column `first` on."""
    rows = np.repeat(np.arange(len(counts)), counts)
    inside = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, inside + first[rows]
