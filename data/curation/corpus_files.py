"""Writes the documents of a corpus: one file for each source and split, the same bytes for the same documents.

A record has `text`, `source`, `licence`, `id` and `how`. zstd at its default level; parquet in row groups of 1,024.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from dwindle.data.document import Document
from dwindle.storage import hash_file

__all__ = ["SplitFiles"]

_ROWS = 1024


class SplitFiles:
    """The files of one split."""

    def __init__(self, folder: Path, format_: Literal["jsonl", "jsonl.zst", "parquet"]) -> None:
        self.folder = folder
        self.format = format_
        self._open: dict[str, _File] = {}
        folder.mkdir()

    def write(self, document: Document) -> None:
        """Write a document into the file of its source."""
        if document.source not in self._open:
            name = re.sub(r"[^\w.-]+", "_", document.source)
            self._open[document.source] = _File(self.folder / f"{name}.{self.format}")
        self._open[document.source].write(document)

    def close(self) -> None:
        """End all files."""
        for file in self._open.values():
            file.close()

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry, after `close`."""
        files = [
            {"path": f"{self.folder.name}/{file.path.name}", "source": source, "documents": file.documents,
             "bytes": file.bytes, "licences_bytes": dict(sorted(file.licences.items())), "sha256": hash_file(file.path)}
            for source, file in sorted(self._open.items())
        ]  # fmt: skip
        return {
            "documents": sum(f["documents"] for f in files),
            "bytes": sum(f["bytes"] for f in files),
            "files": files,
        }


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.bytes = 0
        self.licences: Counter[str] = Counter()
        self._rows: list[dict[str, Any]] = []
        self._stream: Any = None
        self._table: Any = None
        if path.suffix == ".jsonl":
            self._stream = path.open("wb", buffering=1 << 20)
        elif path.suffix == ".zst":
            import pyarrow

            self._stream = pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd")

    def write(self, document: Document) -> None:
        self.documents += 1
        self.bytes += document.bytes
        self.licences[document.licence or "unknown"] += document.bytes
        row = {"text": document.text, "source": document.source, "licence": document.licence, "id": document.id,
               "how": dict(document.how)}  # fmt: skip
        if self._stream is not None:
            self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            return
        self._rows.append({**row, "how": json.dumps(row["how"], ensure_ascii=False)})
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([(name, pyarrow.string()) for name in ("text", "source", "licence", "id", "how")])
        if self._table is None:
            self._table = pyarrow.parquet.ParquetWriter(self.path, schema, compression="zstd")
        self._table.write_table(pyarrow.Table.from_pylist(self._rows, schema))
        self._rows = []

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        elif self._rows or self._table is None:
            self._flush()
        if self._table is not None:
            self._table.close()
