"""datatrove's and text-dedup's stages on the same documents: MB per second of processor time, one process.

Runs in the third peers' environment, without dwindle. datatrove's classes are called document by document, as its
executors do; its language filter downloads its model and is left out. MinHash is the signatures alone: 112 hashes of
word 5-grams, for text-dedup in 14 bands of 8 like datatrove's preset.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LIMIT_BYTES = 300_000
"""Stages are timed on so much of the text: the slow ones would take minutes."""


def rate(work: Callable[[str], Any], texts: list[str]) -> float:
    """Return MB per second of processor time, the median of three runs over the first texts."""
    taken, size = [], 0
    for text in texts:
        if size < _LIMIT_BYTES:
            taken.append(text)
            size += len(text.encode())
    work(taken[0])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for text in taken:
            work(text)
        seconds.append(time.process_time() - start)
    return size / 1e6 / statistics.median(seconds)


def datatrove_stages() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """Return our stage -> (what text it sees, datatrove's way of it)."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter

    signature, scrub, repetition = (
        MinhashDedupSignature(tempfile.gettempdir()),
        PIIFormatter(),
        GopherRepetitionFilter(),
    )
    rules = [GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]

    def quality(text: str) -> None:
        document = Document(text=text, id="0")
        for rule in rules:
            rule.filter(document)

    return {
        "near_duplicates": ("all", lambda text: signature.get_signature(signature.get_shingles(text))),
        "quality": ("prose", quality),
        "repetition": ("prose", lambda text: repetition.filter(Document(text=text, id="0"))),
        "personal_data": ("all", scrub.format),
    }


def text_dedup_stages() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """Return our stage -> (what text it sees, text-dedup's way of it)."""
    import numpy as np
    from text_dedup.minhash import embed_func
    from text_dedup.utils import sha1_hash

    prime, most = np.uint64((1 << 61) - 1), np.uint32((1 << 32) - 1)
    draw = np.random.RandomState(42)
    permutations = (
        draw.randint(1, prime, size=112, dtype=np.uint64),
        draw.randint(0, prime, size=112, dtype=np.uint64),
    )
    bands = [(8 * i, 8 * i + 8) for i in range(14)]
    settings = {
        "num_perm": 112,
        "ngram_size": 5,
        "min_length": 5,
        "hashranges": bands,
        "permutations": permutations,
        "hash_func": sha1_hash,
        "dtype": np.uint64,
        "max_hash": most,
        "modulo_prime": prime,
    }
    return {"near_duplicates": ("all", lambda text: embed_func(text, 0, **settings))}


def main() -> None:
    """Print one JSON line: stage -> peer -> MB/s."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    kinds = ("stories", "articles", "code")
    # One of each kind in turn, so that the part that is timed has all kinds.
    by_kind = [[row["text"] for row in rows if row["kind"] == kind] for kind in kinds]
    mixed = [text for group in zip(*by_kind, strict=False) for text in group]
    prose = [text for group in zip(*by_kind[:2], strict=False) for text in group]
    result: dict[str, dict[str, float]] = {}
    for peer, stages in (("datatrove", datatrove_stages()), ("text-dedup", text_dedup_stages())):
        for name, (which, work) in stages.items():
            result.setdefault(name, {})[peer] = rate(work, mixed if which == "all" else prose)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
