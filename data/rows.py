"""The texts in the rows of .jsonl, .json, .csv and .parquet files, streamed.

The text of a row is one column, or several in a pattern: `{question} {answer}`. A row without the column, with no
text in it, or of another shape is an error; the rest of the file is then read to say how many rows are like that.
"""

from __future__ import annotations

import csv
import json
import re
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dwindle.data.byte_stream import LONGEST_RECORD_BYTES, lines, open_text, suffix
from dwindle.errors import DataError, offenders

__all__ = ["READERS", "pick", "row_texts"]

_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = "\ufeff"
"""Byte order mark, with which spreadsheets begin a file."""


def row_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the text of every row of a file of one of the formats in `READERS`. Raises DataError."""
    failed: list[str] = []
    total = 0
    for place, row in READERS[suffix(path)](path, column):
        total += 1
        try:
            text = pick(row, column, place)
        except DataError as error:
            failed.append(str(error) if not failed else place.removeprefix(f"{path}:").strip())
            continue
        if not failed:
            yield text
    if failed:
        more = (
            f" The same holds for {len(failed) - 1:,} more of {total:,} rows: {offenders(failed[1:], 5)}."
            if failed[1:]
            else ""
        )
        raise DataError(failed[0] + more)


def pick(row: Any, column: str, where: str) -> str:
    """Return the text of a row; `where` is for the message of the DataError if it has none.

    >>> pick({"q": "1 + 1?", "a": "2"}, "{q} {a}", "row 1")
    '1 + 1? 2'
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, but an object with a text column is needed.")
    if "{" not in column:
        return _value(row, column, where)
    return "".join(
        literal + (_value(row, name, where) if name else "")
        for literal, name, _, _ in string.Formatter().parse(column)
    )  # fmt: skip


def _value(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(_no_column(where, column, [str(name) for name in row]))
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column '{column}' holds a {type(value).__name__}, text is needed. Name another column."
        )
    if not value.isascii():
        _require_unicode(value, column, where)
    return value


def _require_unicode(value: str, column: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        why = f"{error.reason} at {error.start:,}"
        raise DataError(f"{where}: column '{column}' holds text that is no Unicode ({why}). Mend it.") from error


def _no_column(where: str, column: str, found: list[str]) -> str:
    return (
        f"{where}: no column '{column}'; the columns are {offenders(found) or 'none'}. "
        "Name one with data.text_column or as PLACE::COLUMN (in a corpus recipe as text of the source)."
    )


def _jsonl_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    for number, line in lines(path):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", str(error))
                raise DataError(f"{path}:{number}: no JSON ({why}). Mend or remove the line.") from error


def _json_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a JSON list, each decoded as soon as all of it has been read."""
    decode = json.JSONDecoder().raw_decode
    with open_text(path) as handle:
        text = handle.read(1 << 20).removeprefix(_MARK)
        at = _SPACE.match(text).end()  # type: ignore[union-attr]
        if text[at : at + 1] != "[":
            kind = {"{": "dict", '"': "str"}.get(text[at : at + 1], "value")
            raise DataError(f"{path}: a JSON {kind}, but a list of objects is needed.")
        at, line, number, step = at + 1, 1 + text.count("\n", 0, at), 0, 1 << 20
        while True:
            line += text.count("\n", 0, at)
            text, at = text[at:], 0
            begin = re.compile(r"[ \t\r\n,]*" if number else r"[ \t\r\n]*").match(text).end()  # type: ignore[union-attr]
            if text[begin : begin + 1] == "]":
                return
            try:
                row, at = decode(text, begin)
            except json.JSONDecodeError as error:
                more = handle.read(step)
                if not more or len(text) > LONGEST_RECORD_BYTES:
                    raise DataError(
                        f"{path}:{line + text.count(chr(10), 0, error.pos)}: no JSON ({error.msg}) within one entry "
                        f"of at most {LONGEST_RECORD_BYTES:,} characters. For one object a line, name it .jsonl."
                    ) from error
                text, step = text + more, 2 * step
                continue
            number, step = number + 1, 1 << 20
            yield f"{path}: entry {number}", row


def _csv_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = csv.DictReader(line.decode().removeprefix(_MARK if number == 1 else "") for number, line in lines(path))
    for row in rows:
        yield f"{path}:{rows.line_num}", row


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable parquet file ({error}). Copy it again.") from error
    wanted = [name for _, name, _, _ in string.Formatter().parse(column) if name] if "{" in column else [column]
    with table:
        for name in wanted:
            if name not in table.schema_arrow.names:
                raise DataError(_no_column(str(path), name, table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(columns=wanted, batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""Suffix -> reader of (place of the row, row)."""
