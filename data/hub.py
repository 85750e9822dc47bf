"""The texts of Hugging Face data sets, streamed: `owner/name`, `owner/name[config]`, `owner/name:split`.

The split is `train` unless given. HF_HUB_OFFLINE and HF_DATASETS_OFFLINE are honoured: the library then reads its cache
or says that it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dwindle.data.document import Document
from dwindle.data.rows import pick
from dwindle.errors import DataError

__all__ = ["hub_documents", "hub_name"]

_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:\[(?P<config>[\w.-]+)\])?(?::(?P<split>[\w\[\]%:+-]+))?"
)


def hub_name(place: str) -> re.Match[str] | None:
    """Return the match if a place can be a data set's name."""
    return _NAME.fullmatch(place)


def hub_documents(place: str, column: str) -> Iterator[Document]:
    """Yield the documents of a data set, one a row. Raises DataError with what the library said."""
    match = hub_name(place)
    assert match is not None
    import datasets

    name, split = match["name"], match["split"] or "train"
    try:
        rows = datasets.load_dataset(name, match["config"], split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            text = pick(row, column, f"{place}: row {number}")
            if text.strip():
                yield Document(text, place)
    except DataError:
        raise
    except Exception as error:  # The library and its transports raise anything here.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise DataError(
            f"{place}: no such file or folder, and as a Hugging Face data set (split '{split}') it could not be "
            f"read: {reason}. Correct the path or the name, check the network, or download the data set first."
        ) from error
