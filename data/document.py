"""One text of a corpus, with what is known about it. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Document", "document_sha256"]


@dataclass(frozen=True)
class Document:
    """One text, where it comes from, and what was done to it."""

    text: str
    """The text itself."""
    source: str
    """Name or place of the source it was read from, or of what made it."""
    continues: bool = False
    """It follows the document before it without a gap, in the same file."""
    licence: str | None = None
    """Licence it may be used under, as an SPDX name where there is one; None is unknown."""
    id: str = ""
    """Names the document in its corpus, the same at every run; empty outside a corpus."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """How it came to be if it was not read as it stands: what changed it, which model wrote it from what."""

    @property
    def bytes(self) -> int:
        """Return the size of the text in UTF-8.

        >>> Document("für", "f").bytes
        4
        """
        return len(self.text) if self.text.isascii() else len(self.text.encode(errors="surrogatepass"))


def document_sha256(document: Document) -> str:
    """Return the hash of a document's text, by which roles are kept apart."""
    return hashlib.sha256(document.text.encode()).hexdigest()
