"""datatrove's and text-dedup's stages: processor seconds for a list of documents, asked for on stdin.

Runs in the third peers' environment, without dwindle:

    python data_stages.py DOCUMENTS.jsonl --language-model lid.176.ftz --evaluation ITEMS.jsonl

A line on stdin names a stage; one JSON line comes back: peer -> seconds (`{}` where no peer has such a stage). What a
peer builds once (an index of evaluation n-grams, the language model) is built before its clock starts.

datatrove's classes are called as its executors do. Its language filter would download lid.176.bin; it gets the
compressed lid.176.ftz that dwindle's filter uses. Its index of evaluation n-grams is made by lighteval's tasks; here
its own `simplify_text`, tokenizer and hash fill the same file from the items. Near-duplicates are the signatures alone:
112 hashes of word 5-grams, for text-dedup in 14 bands of 8 like datatrove's preset.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from loguru import logger

Work = Callable[[list[str]], Any]


def documents(texts: list[str]) -> list[Any]:
    """Return datatrove's documents."""
    from datatrove.data import Document

    return [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


class Datatrove:
    """datatrove's way of dwindle's stages; a method for each, which returns its work."""

    def __init__(self, language_model: str, evaluation: Path) -> None:
        self.language_model, self.evaluation = language_model, evaluation
        self.folder = tempfile.mkdtemp()

    def normalization(self) -> Work:
        """ftfy, with datatrove's settings: also mends text decoded with the wrong table."""
        from datatrove.pipeline.formatters import FTFYFormatter

        ftfy = FTFYFormatter()
        return lambda texts: [ftfy.format(text) for text in texts]

    def exact_duplicates(self) -> Work:
        """Signatures, finding, filter: three steps through files."""
        from datatrove.pipeline.dedup.exact_dedup import (
            ExactDedupConfig,
            ExactDedupFilter,
            ExactDedupSignature,
            ExactFindDedups,
        )

        def content(document: Any) -> str:
            return str(document.text)

        content.__annotations__["return"] = str
        config = ExactDedupConfig(content_getter=content)

        def work(texts: list[str]) -> int:
            with tempfile.TemporaryDirectory() as folder:
                ExactDedupSignature(f"{folder}/signatures", config).run(iter(documents(texts)))
                ExactFindDedups(f"{folder}/signatures", f"{folder}/found", config).run()
                return len(list(ExactDedupFilter(f"{folder}/found", config).run(iter(documents(texts)))))

        return work

    def language(self) -> Work:
        """fastText's 176 languages."""
        from datatrove.pipeline.filters import LanguageFilter
        from fasttext.FastText import _FastText

        language = LanguageFilter(["en"])
        language.model._model = _FastText(self.language_model)
        return _filtering(language)

    def quality(self) -> Work:
        """The filters of Gopher, C4 and FineWeb."""
        from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter

        return _filtering(
            GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()
        )

    def repetition(self) -> Work:
        """Gopher's repetition filter."""
        from datatrove.pipeline.filters import GopherRepetitionFilter

        return _filtering(GopherRepetitionFilter())

    def near_duplicates(self) -> Work:
        """The signatures."""
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

        signature = MinhashDedupSignature(self.folder)
        return lambda texts: [signature.get_signature(signature.get_shingles(text)) for text in texts]

    def decontamination(self) -> Work:
        """The filter by 12-grams."""
        import numpy as np
        from datatrove.pipeline.decont import NGramsDecontFilter
        from datatrove.utils.text import ngrams, simplify_text

        decontaminate = NGramsDecontFilter(f"{self.folder}/index")
        config = decontaminate.config
        hashes: set[int] = set()
        for line in self.evaluation.read_text().splitlines():
            words = decontaminate.tokenizer.word_tokenize(simplify_text(json.loads(line), config.norm_config))
            hashes.update(decontaminate.hash_func(" ".join(gram)) for gram in ngrams(words, config.n_grams))
        with decontaminate.index_folder.open("items.index.hashes", mode="wb") as file:
            file.write(np.array(list(hashes), dtype=config.hash_config.np_descr).tobytes())
        decontaminate.load_index_hashes()
        return _filtering(decontaminate)

    def personal_data(self) -> Work:
        """Addresses and IPs."""
        from datatrove.pipeline.formatters import PIIFormatter

        scrub = PIIFormatter()
        return lambda texts: [scrub.format(text) for text in texts]


def _filtering(*filters: Any) -> Work:
    return lambda texts: [[one.filter(document) for one in filters] for document in documents(texts)]


class TextDedup:
    """text-dedup's way of near-duplicates."""

    def near_duplicates(self) -> Work:
        """The signatures."""
        import numpy as np
        from text_dedup.minhash import embed_func
        from text_dedup.utils import sha1_hash

        prime, most = np.uint64((1 << 61) - 1), np.uint32((1 << 32) - 1)
        draw = np.random.RandomState(42)
        permutations = (
            draw.randint(1, prime, size=112, dtype=np.uint64),
            draw.randint(0, prime, size=112, dtype=np.uint64),
        )
        settings = {
            "num_perm": 112,
            "ngram_size": 5,
            "min_length": 5,
            "hashranges": [(8 * i, 8 * i + 8) for i in range(14)],
            "permutations": permutations,
            "hash_func": sha1_hash,
            "dtype": np.uint64,
            "max_hash": most,
            "modulo_prime": prime,
        }
        return lambda texts: [embed_func(text, 0, **settings) for text in texts]


def main() -> None:
    """Answer the names of stages with seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, help="JSON lines: stage, texts.")
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON lines: texts of evaluation items.")
    options = parser.parse_args()
    texts = {row["stage"]: row["texts"] for row in map(json.loads, options.documents.read_text().splitlines())}
    peers = {"datatrove": Datatrove(options.language_model, options.evaluation), "text-dedup": TextDedup()}

    @cache
    def prepared(peer: str, stage: str) -> Work:
        work: Work = getattr(peers[peer], stage)()
        work(texts[stage][:1])  # what is loaded at first use
        return work

    logger.disable("datatrove")
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        stage, seconds = line.strip(), {}
        for peer in peers:
            if hasattr(peers[peer], stage):
                work = prepared(peer, stage)
                start = time.process_time()
                work(texts[stage])
                seconds[peer] = time.process_time() - start
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
