"""Rows of task data: dictionaries out of .jsonl, .json, .csv, .parquet, and data sets of Hugging Face.

`PLACE::KEY` takes one entry of a JSON object (`clinc150.json::train`) or one split of a data set. Rows that are lists
get the names given. A line that is no JSON is a row's problem like any other: it is told with the rest, not alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwindle.errors import DataError, did_you_mean

__all__ = ["Row", "read_rows"]


@dataclass(frozen=True)
class Row:
    """One row: where it stands, and its values, or why it has none."""

    place: str
    values: Mapping[str, Any]
    problem: str | None = None


def read_rows(spec: str, columns: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a place. Raises DataError for a place that cannot be read at all."""
    place, colons, key = spec.partition("::")
    if colons and not key:
        raise DataError(f"{spec}: no entry or split is named after '::'. Name one, or leave '::' out.")
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            found = list(_saved_rows(path, key))
        elif path.is_file():
            found = list(_file_rows(path, key, columns))
        else:
            found = list(_hub_rows(place, key))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no UTF-8 text ({error.reason}). Convert it to UTF-8.") from error
    if not found:
        raise DataError(f"{spec}: no rows in it. Name a place with records.")
    return found


def _file_rows(path: Path, key: str, columns: Sequence[str]) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if key and suffix != ".json":
        raise DataError(f"{path}::{key}: only a .json file has entries of its own names. Leave '::{key}' out.")
    if suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_line(line, f"{path.name}:{number}", columns)
    elif suffix == ".json":
        for number, value in enumerate(_json_list(path, key), 1):
            yield _row(value, f"{path.name}: entry {number}", columns)
    elif suffix == ".csv":
        yield from _csv_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: records are read from .jsonl, .json, .csv and .parquet, not from {suffix or 'this'}.")


def _json_line(line: str, place: str, columns: Sequence[str]) -> Row:
    try:
        return _row(json.loads(line), place, columns)
    except json.JSONDecodeError as error:
        return Row(place, {}, f"no JSON ({error.msg})")
    except (ValueError, RecursionError):
        return Row(place, {}, "no JSON that makes sense: nested too deeply, or a number of thousands of digits")


def _row(value: Any, place: str, columns: Sequence[str]) -> Row:
    if isinstance(value, Mapping):
        return Row(place, value)
    if isinstance(value, list) and columns and len(value) == len(columns):
        return Row(place, dict(zip(columns, value, strict=True)))
    if isinstance(value, list):
        needed = f"columns names {len(columns)}" if columns else "name them with columns"
        return Row(place, {}, f"a list of {len(value)} values ({needed})")
    return Row(place, {}, f"a {type(value).__name__}, no object")


def _json_list(path: Path, key: str) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: no JSON ({error.msg}). One object a line is a .jsonl file.") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a JSON number of thousands of digits, or nested too deeply. Mend it.") from error
    if isinstance(value, Mapping):
        if not key:
            keys = ", ".join(f"{path}::{name}" for name in value)
            raise DataError(f"{path}: a JSON object; name one of its entries: {keys}.")
        if key not in value:
            raise DataError(f"{path}: no entry {key!r}{did_you_mean(key, map(str, value))}.")
        value = value[key]
    elif key:
        raise DataError(f"{path}::{key}: a JSON {type(value).__name__}, no object with entries. Leave '::{key}' out.")
    if not isinstance(value, list):
        raise DataError(f"{path}: a JSON {type(value).__name__}, but a list of records is needed.")
    return value


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle)
        for values in reader:
            place = f"{path.name}:{reader.line_num}"
            extra = values.pop(None, None)
            problem = f"{len(extra)} values more than the header has" if extra else None
            yield Row(place, values, problem)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no readable parquet file ({error}). Copy it again.") from error
    for number, values in enumerate(rows, 1):
        yield Row(f"{path.name}: row {number}", values)


def _saved_rows(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder: a data set saved to disk, or a folder of files that `datasets` can load."""
    import datasets

    try:
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the library raises anything here
        raise DataError(f"{path}: no data set can be read from this folder ({_first_line(error)}).") from error
    yield from _data_set_rows(data, str(path), split)


def _hub_rows(place: str, split: str) -> Iterator[Row]:
    import datasets

    if Path(place).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".yaml"):
        raise DataError(f"{place}: no such file. Correct the path.")
    try:
        data = datasets.load_dataset(place)
    except Exception as error:  # the library and its transports raise anything here
        raise DataError(
            f"{place}: no such file or folder, and as a Hugging Face data set it could not be read "
            f"({_first_line(error)}). Correct the path or the name, or download the data set first."
        ) from error
    yield from _data_set_rows(data, place, split)


def _data_set_rows(data: Any, place: str, split: str) -> Iterator[Row]:
    """Yield rows; class labels, which data sets store as numbers, come back as their names."""
    if isinstance(data, Mapping):
        chosen = split or ("train" if "train" in data else next(iter(data)))
        if chosen not in data:
            raise DataError(f"{place}: no split {chosen!r}{did_you_mean(chosen, map(str, data))}.")
        data = data[chosen]
    elif split and split != str(data.split):
        raise DataError(f"{place}::{split}: one data set without splits of its own. Leave '::{split}' out.")
    names = {key: kind.int2str for key, kind in data.features.items() if hasattr(kind, "int2str")}
    for number, values in enumerate(data, 1):
        told = {key: _class_name(names[key], value) if key in names else value for key, value in values.items()}
        yield Row(f"{place}: row {number}", told)


def _class_name(name_of: Any, value: int | None) -> Any:
    """Return a class label's name; -1 is how data sets say that a row has none."""
    return None if value is None or value < 0 else name_of(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
