"""Documents from files, folders and Hugging Face data sets, one at a time.

A source is written `PLACE` or `PLACE::COLUMN`. A place is

- a text file (.txt, .md, source code ...): documents are what stands between lines that read `<|endoftext|>`; without
  such lines, stretches of whole paragraphs (cut at blank lines) of at least 4,000 characters that `continue` each
  other, so that joining them gives back the file exactly;
- .jsonl, .json (a list of objects), .csv, .parquet: one document per row, from the text column;
- any of these but parquet with .gz behind;
- a folder of them, in sorted order, hidden files and other suffixes left out;
- when no such path exists, a Hugging Face data set: `owner/name`, `owner/name[config]`, `owner/name:split`
  (split `train` unless given), streamed. HF_HUB_OFFLINE and HF_DATASETS_OFFLINE are honoured.

Text is UTF-8 and is passed on byte for byte (line ends too), because bits/byte counts its bytes. A file that is named
must be readable; inside a folder, files that are no UTF-8 text are left out with a warning that names them, and
empty files are passed over. `check_sources` finds every unusable source before anything long begins.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dwindle.data.document import Document
from dwindle.errors import DataError, offenders

__all__ = ["Source", "check_sources", "is_plain_text", "read_documents", "read_text"]

_LOG = logging.getLogger("dwindle")

_TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js",
    ".jsx", ".kt", ".lua", ".php", ".pl", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
    ".html", ".css", ".xml", ".yaml", ".yml", ".toml",
})  # fmt: skip
_TABLE_SUFFIXES = frozenset({".jsonl", ".json", ".csv", ".parquet"})
_STRETCH = 4000
_MARKER = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*\r?\n?", re.MULTILINE)
_BLANK_LINES = re.compile(r"(?:^[ \t]*\r?\n)+", re.MULTILINE)
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:\[(?P<config>[\w.-]+)\])?(?::(?P<split>[\w\[\]%:+-]+))?"
)
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


def read_documents(spec: str, text_column: str) -> Iterator[Document]:
    """Yield the documents of a source in order; white space alone is no document. Raises DataError."""
    source = Source.parse(spec, text_column)
    if not source.path.exists():
        yield from _read_hub(source)
    elif source.path.is_dir():
        yield from _read_folder(source)
    else:
        yield from _read_file(source.path, source.column)


def _problem(source: Source) -> str | None:
    path = source.path
    if path.is_dir():
        if not any(True for _ in _folder_files(path)):
            return f"{path}: the folder holds no text, .jsonl, .json, .csv or .parquet file; name the right folder"
        return None
    if path.exists():
        return _file_problem(path)
    if _hub_name(source.place) is None:
        return f"{source.place}: no such file or folder; correct the path"
    return None


def _file_problem(path: Path) -> str | None:
    """Return why a file cannot hold text, judged by its first MiB, or None."""
    if path.stat().st_size == 0:
        return f"{path}: the file is empty; name a file with text in it"
    if _suffix(path) == ".parquet":
        return None
    try:
        with _open(path) as handle:
            head = handle.read(_SAMPLE_BYTES)
    except (OSError, EOFError) as error:
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


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding="utf-8", newline="")


def is_plain_text(path: Path) -> bool:
    """Return True for a file that is one text and not rows."""
    return path.is_file() and _suffix(path) not in _TABLE_SUFFIXES


def read_text(path: Path) -> str:
    """Return the whole text of a file exactly, line ends included."""
    with _open_text(path) as handle:
        return handle.read()


def _read_file(path: Path, column: str) -> Iterator[Document]:
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".jsonl": _jsonl_texts,
        ".json": _json_texts,
        ".csv": _csv_texts,
        ".parquet": _parquet_texts,
    }
    reader = readers.get(_suffix(path))
    try:
        if reader is None:
            yield from _text_documents(path)
            return
        for text in reader(path, column):
            if text.strip():
                yield Document(text, str(path))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: no UTF-8 text ({error.reason}). Convert it, for example with iconv -t UTF-8."
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}). Copy it again.") from error


def _text_documents(path: Path) -> Iterator[Document]:
    text = read_text(path)
    if _MARKER.search(text):
        yield from (Document(part, str(path)) for part in _MARKER.split(text) if part.strip())
        return
    start = 0
    for end in _stretch_ends(text):
        yield Document(text[start:end], str(path), continues=start > 0)
        start = end


def _stretch_ends(text: str) -> list[int]:
    """Return where to cut a text: behind blank lines, at least 4,000 characters apart; the last end is len(text)."""
    ends = [0]
    for match in _BLANK_LINES.finditer(text):
        if match.end() - ends[-1] >= _STRETCH:
            ends.append(match.end())
    if len(text) - ends[-1] < _STRETCH and len(ends) > 1:
        ends.pop()
    return [*ends[1:], len(text)]


def _pick(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, but an object with a text column is needed.")
    if column not in row:
        raise DataError(_no_column(where, column, [str(name) for name in row]))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column '{column}' holds a {type(value).__name__}, text is needed. Name another column."
        )
    return value


def _no_column(where: str, column: str, found: list[str]) -> str:
    return (
        f"{where}: no column '{column}'; the columns are {offenders(found) or 'none'}. "
        "Name one with data.text_column or as PLACE::COLUMN."
    )


def _jsonl_texts(path: Path, column: str) -> Iterator[str]:
    with _open_text(path) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: no JSON ({error.msg}). Mend or remove the line.") from error
                yield _pick(row, column, f"{path}:{number}")


def _json_texts(path: Path, column: str) -> Iterator[str]:
    with _open_text(path) as handle:
        try:
            rows = json.load(handle)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: no JSON ({error.msg}). For one object a line, name it .jsonl."
            ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a JSON {type(rows).__name__}, but a list of objects is needed.")
    for number, row in enumerate(rows, 1):
        yield _pick(row, column, f"{path}: entry {number}")


def _csv_texts(path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_text(path) as handle:
        for row in csv.DictReader(handle):
            yield _pick(row, column, str(path))


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable parquet file ({error}). Copy it again.") from error
    with table:
        if column not in table.schema_arrow.names:
            raise DataError(_no_column(str(path), column, table.schema_arrow.names))
        for batch in table.iter_batches(columns=[column], batch_size=1024):
            yield from (_pick(row, column, str(path)) for row in batch.to_pylist())


def _folder_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that can be read, in sorted order; hidden ones and `__pycache__` are left out."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        known = _suffix(path) in _TEXT_SUFFIXES | _TABLE_SUFFIXES
        if known and path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in inside):
            yield path


def _read_folder(source: Source) -> Iterator[Document]:
    left_out, found = [], 0
    for path in _folder_files(source.path):
        if not path.stat().st_size:
            continue
        if (problem := _file_problem(path)) is not None:
            left_out.append(problem.partition(";")[0])
            continue
        for document in _read_file(path, source.column):
            found += 1
            yield document
    if left_out:
        _LOG.warning("%s: %d file(s) left out: %s", source.path, len(left_out), offenders(left_out, limit=5))
    if not found:
        raise DataError(f"{source.path}: no file in the folder holds text. Name the right folder.")


def _hub_name(place: str) -> re.Match[str] | None:
    """Return the match if a place that is no path can be a data set's name."""
    looks_like_a_file = _suffix(Path(place)) in _TEXT_SUFFIXES | _TABLE_SUFFIXES
    return None if looks_like_a_file else _HUB_NAME.fullmatch(place)


def _read_hub(source: Source) -> Iterator[Document]:
    match = _hub_name(source.place)
    if match is None:
        raise DataError(f"{source.place}: no such file or folder. Correct the path.")
    import datasets

    name, split = match["name"], match["split"] or "train"
    try:
        rows = datasets.load_dataset(name, match["config"], split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = _pick(row, source.column, f"{source.place}: row {number}")
            if text.strip():
                yield Document(text, source.place)
    except DataError:
        raise
    except Exception as error:  # The library and its transports raise anything here.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise DataError(
            f"{source.place}: no such file or folder, and as a Hugging Face data set (split '{split}') it could not be "
            f"read: {reason}. Correct the path or the name, check the network, or download the data set first."
        ) from error
