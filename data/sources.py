"""Documents from files, folders and Hugging Face data sets, one at a time.

A source is written `PLACE` or `PLACE::COLUMN`. A place is

- a text file (.txt, .md, source code ...): see `text_file` for how it becomes documents;
- .jsonl, .json (a list of objects), .csv, .parquet: one document per row, from the text column (see `rows`);
- any of these but parquet with .gz or .zst behind;
- a folder of them, in sorted order, hidden files and other suffixes left out;
- when no such path exists, a Hugging Face data set, streamed (see `hub`).

Text is UTF-8 and is passed on byte for byte (line ends too), because bits/byte counts its bytes. Nothing is loaded
whole. A file that is named must be readable; inside a folder, files that are no UTF-8 text are left out with a warning
that names them, and empty files are passed over. `check_sources` finds every unusable source before anything long
begins.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import itertools
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dwindle.data.byte_stream import open_bytes, open_text, suffix
from dwindle.data.corpus_folder import licence_of, split_folder
from dwindle.data.document import Document
from dwindle.data.hub import hub_documents, hub_name
from dwindle.data.rows import READERS, row_texts
from dwindle.data.text_file import text_documents
from dwindle.errors import DataError, offenders

__all__ = ["CODE_SUFFIXES", "Source", "check_sources", "is_plain_text", "read_documents", "read_text"]

_LOG = logging.getLogger("dwindle")

CODE_SUFFIXES = frozenset({
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js", ".jsx", ".kt", ".lua", ".php", ".pl",
    ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx", ".html", ".css", ".xml", ".yaml", ".yml",
    ".toml",
})  # fmt: skip
_TEXT_SUFFIXES = CODE_SUFFIXES | {".txt", ".text", ".md", ".rst", ".tex"}
_SUFFIXES = _TEXT_SUFFIXES | READERS.keys()
_DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, csv.Error, zlib.error)
"""What the readers of the formats raise for a file that is not what its name says."""
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A place and the column its text stands in (rows only)."""

    place: str
    column: str

    @classmethod
    def parse(cls, spec: str, text_column: str) -> Source:
        """Return the source that `PLACE` or `PLACE::COLUMN` means.

        >>> Source.parse("faq.csv::answer", "text")
        Source(place='faq.csv', column='answer')
        """
        place, _, column = spec.partition("::")
        return cls(place, column or text_column)

    @property
    def path(self) -> Path:
        """Return the place as a path, `~` expanded."""
        return Path(self.place).expanduser()


def check_sources(specs: Iterable[str], text_column: str) -> None:
    """Raise one DataError that names every missing, empty or binary source with its remedy."""
    problems = [p for spec in dict.fromkeys(specs) if (p := _problem(Source.parse(spec, text_column)))]
    if problems:
        raise DataError("unusable data: " + "; ".join(problems))


def read_documents(
    spec: str,
    text_column: str,
    *,
    whole_files: bool | None = False,
    exclude: Sequence[str] = (),
    left_out: list[str] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Document]:
    """Yield the documents of a source in order; white space alone is no document. Raises DataError.

    With `whole_files`, a text file is not cut into stretches; None leaves source code whole and cuts prose. Files
    below a folder that match a pattern of `exclude` are not read; those that are no text are added to `left_out`.
    `part` (i, n) reads every n-th file of a folder, from the i-th on; anything else is one file, of part 0.
    """
    source = Source.parse(spec, text_column)
    if source.path.is_dir():
        yield from _read_folder(source, whole_files, exclude, [] if left_out is None else left_out, part)
    elif part[0] % part[1]:
        return
    elif source.path.exists():
        yield from _read_file(source.path, source.column, whole_files)
    elif _is_hub_name(source.place):
        yield from hub_documents(source.place, source.column)
    else:
        raise DataError(f"{source.place}: no such file or folder. Correct the path.")


def is_plain_text(path: Path) -> bool:
    """Return True for a file that is one text and not rows."""
    return path.is_file() and suffix(path) not in READERS


def read_text(path: Path) -> str:
    """Return the whole text of a file exactly, line ends included."""
    with open_text(path) as handle:
        return handle.read()


def _is_hub_name(place: str) -> bool:
    return suffix(Path(place)) not in _SUFFIXES and hub_name(place) is not None


def _problem(source: Source) -> str | None:
    path = source.path
    if path.is_dir():
        if not any(True for _ in _folder_files(path)):
            return f"{path}: the folder holds no text, .jsonl, .json, .csv or .parquet file; name the right folder"
        return None
    if path.exists():
        return _file_problem(path)
    return None if _is_hub_name(source.place) else f"{source.place}: no such file or folder; correct the path"


def _file_problem(path: Path) -> str | None:
    """Return why a file cannot hold text, judged by its first MiB, or None."""
    if path.stat().st_size == 0:
        return f"{path}: the file is empty; name a file with text in it"
    if suffix(path) == ".parquet":
        return None
    try:
        with open_bytes(path) as handle:
            head = handle.read(_SAMPLE_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        return f"{path}: cannot be read ({error}); mend or replace the file"
    if b"\0" in head:
        return f"{path}: a binary file (it holds NUL bytes); name a UTF-8 text file"
    try:
        io.TextIOWrapper(io.BytesIO(head), "utf-8", newline="").read()
    except UnicodeDecodeError as error:
        if len(head) < _SAMPLE_BYTES or error.start < len(head) - 3:
            return f"{path}: no UTF-8 text (byte {error.start:,}); convert it, for example with iconv -t UTF-8"
    empty = len(head) < _SAMPLE_BYTES and not head.strip()
    return None if not empty else f"{path}: the file holds white space only; name a file with text in it"


def _read_file(path: Path, column: str, whole: bool | None) -> Iterator[Document]:
    whole = suffix(path) in CODE_SUFFIXES if whole is None else whole
    try:
        if suffix(path) not in READERS:
            yield from text_documents(path, whole=whole)
            return
        licence = licence_of(path)
        for text in row_texts(path, column):
            if text.strip():
                yield Document(text, str(path), licence=licence)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: no UTF-8 text ({error.reason}). Convert it, for example with iconv -t UTF-8."
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{path}: the file is damaged or cannot be read ({error}). Copy it again.") from error


def _folder_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that can be read, in sorted order; hidden ones and `__pycache__` are left out.

    A corpus that `dwindle data build` made stands for its training text.
    """
    folder = split_folder(folder, "train")
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        known = suffix(path) in _SUFFIXES
        if known and path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in inside):
            yield path


def _read_folder(
    source: Source, whole_files: bool | None, exclude: Sequence[str], left_out: list[str], part: tuple[int, int]
) -> Iterator[Document]:
    found = 0
    for path in itertools.islice(_folder_files(source.path), part[0] % part[1], None, part[1]):
        inside = path.relative_to(source.path).as_posix()
        if any(fnmatch.fnmatchcase(inside, pattern) for pattern in exclude):
            continue
        if not path.stat().st_size:
            continue
        if (problem := _file_problem(path)) is not None:
            left_out.append(problem.partition(";")[0])
            continue
        for document in _read_file(path, source.column, whole_files):
            found += 1
            yield document
    if left_out:
        _LOG.warning("%s: %d file(s) left out: %s", source.path, len(left_out), offenders(left_out, limit=5))
    if not found and part[1] == 1:
        raise DataError(f"{source.path}: no file in the folder holds text. Name the right folder.")
