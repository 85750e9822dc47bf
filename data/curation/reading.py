"""The documents of a corpus's sources, named: `SOURCE/FILE#NUMBER`, the same at every run.

Source code is read by whole files, prose by stretches (see `text_file`). What was read is counted and hashed on its
way: documents, bytes, and the sha256 of all texts with a zero byte behind each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwindle.data.byte_stream import suffix
from dwindle.data.curation.corpus_options import SourceOptions
from dwindle.data.document import Document
from dwindle.data.sources import CODE_SUFFIXES, Source, read_documents

__all__ = ["SourceReading"]


class SourceReading:
    """One pass over a source, or over every n-th file of it from the i-th on (part i, n), and what it found."""

    def __init__(self, options: SourceOptions, part: tuple[int, int] = (0, 1)) -> None:
        self.options, self.part = options, part
        self.documents = self.bytes = 0
        self.left_out: list[str] = []
        """Files of a folder that are no text, with the reason."""
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents."""
        options = self.options
        place = Source.parse(options.place, options.text).path
        everything = read_documents(options.place, options.text, whole_files=self._whole, left_out=self.left_out,
                                    exclude=options.exclude, part=self.part)  # fmt: skip
        for file, documents in itertools.groupby(everything, key=lambda document: document.source):
            inside = _relative(file, place)
            code = options.kind == "code" or (options.kind is None and suffix(Path(file)) in CODE_SUFFIXES)
            how: dict[str, Any] = {"kind": "code"} if code else {}
            for number, document in enumerate(documents):
                if options.most_bytes is not None and self.bytes >= options.most_bytes:
                    return
                self.documents += 1
                self.bytes += document.bytes
                self._digest.update(document.text.encode() + b"\0")
                name = f"{options.name}/{inside}#{number}"
                yield Document(document.text, options.name, licence=options.licence, id=name, how=how)

    @property
    def _whole(self) -> bool | None:
        return None if self.options.kind is None else self.options.kind == "code"

    def to_json(self) -> dict[str, Any]:
        """Return what the card says of the source, when all of it has been read."""
        return {
            "name": self.options.name,
            "place": self.options.place,
            "licence": self.options.licence,
            "text": self.options.text,
            "kind": self.options.kind or "by suffix",
            "weight": self.options.weight,
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256_of_texts": self._digest.hexdigest(),
            "files_left_out": len(self.left_out),
            "files_left_out_examples": [Path(reason).name for reason in self.left_out[:5]],
        }


def _relative(file: str, place: Path) -> str:
    path = Path(file)
    if path == place:
        return path.name
    return path.relative_to(place).as_posix() if path.is_relative_to(place) else file
