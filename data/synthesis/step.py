"""Synthesis from end to end: passages are drawn, a model writes, what fails is dropped with the reason.

What a piece must pass, in this order; the card counts and shows what each one took:

    short        at least `least_tokens` tokens of text
    cut off      it ended by itself, where half an answer is of no use
    form         it has the parts that were asked for (question and answer, task and solution)
    checks       every checker passes (code runs in the sandbox, sums are computed, schemas match)
    verifier     the second model scores it at least `least`
    not new      at most `most_overlap` of its word n-grams stand in the corpus or in a piece kept before
    share        the synthetic text is at most `most_share` of the bytes of the whole

Every piece says how it was made: model and its hash, kind and hash of its template, seed, sampling, where it started,
what it passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.checkers import Checker, make_checker
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.data.synthesis.drafts import Piece, drafted
from dwindle.data.synthesis.kinds import Kind, Written, kind_of
from dwindle.data.synthesis.novelty import Novelty
from dwindle.data.synthesis.options import SynthesisOptions
from dwindle.data.synthesis.passages import Passage, drawn_passages
from dwindle.data.synthesis.verifier import Verifier
from dwindle.data.synthesis.writer import Writer
from dwindle.errors import DataError, RecipeError
from dwindle.storage import hash_json

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["empty_error", "synthesized"]

_TOGETHER = 64


def synthesized(
    writer: ModelBundle, options: SynthesisOptions, documents: Iterable[Document], *, folder: Path, count: StageCount,
    verifier: ModelBundle | None = None, name: str = "",
) -> Iterator[Document]:  # fmt: skip
    """Yield the pieces that pass, as documents; `count` says what was dropped and why.

    `documents` is the corpus, gone through twice: for passages, and for what is known already; it may be empty for
    kinds that need no text. `folder` keeps what was written, for a run that was cut off. `name` is the model's name in
    the records. Raises RecipeError or DataError before anything is written.
    """
    kinds = [kind_of(kind) for kind in options.kinds]
    checks = [make_checker(spec) for spec in options.checks]
    if (verifier is None) != (options.verifier is None):
        raise RecipeError("synthesis: a verifier needs both its options and its model.")
    passages = []
    if any(kind.uses_text for kind in kinds):
        wanted = -(-options.pieces // len(kinds))
        passages = drawn_passages(documents, writer.tokenizer, count=wanted, tokens=options.piece_tokens,
                                  least=options.least_tokens, seed=options.seed)  # fmt: skip
        if not passages:
            raise DataError(f"synthesis: no passage of {options.least_tokens} to {options.piece_tokens} tokens in the "
                            f"text, and {', '.join(k.name for k in kinds if k.uses_text)} needs one. Add text, or take "
                            "kinds that need none (free, free:seeded).")  # fmt: skip
    corpus = _Corpus(documents, options)
    room = _room(corpus.bytes, options)
    made = {"model": name or str(writer.lineage.entries[0].options["model"]), "model_sha256": writer.content_sha256}
    plan = {
        **made, "options": {key: value for key, value in asdict(options).items() if key in _WRITTEN_BY},
        "kinds": [kind.sha256 for kind in kinds], "passages": hash_json([asdict(passage) for passage in passages]),
    }  # fmt: skip
    writes = Writer(writer, temperature=options.temperature, top_p=options.top_p, most_tokens=options.piece_tokens)
    _require_room(writes, kinds, passages, options)
    pieces = drafted(writes, kinds, passages, pieces=options.pieces, batch_size=options.batch_size,
                     prefix_tokens=options.prefix_tokens, seed=options.seed, folder=folder, plan=plan)  # fmt: skip
    judged = _Judged(options, checks, None if verifier is None or options.verifier is None
                     else Verifier(verifier, options.verifier), corpus.novelty, count, made)  # fmt: skip
    for part in _chunks(pieces):
        for document in judged.kept(part):
            if document.bytes > room:
                count.drop(document, "above the share of synthetic text")
                continue
            room -= document.bytes
            count.give(document)
            yield document


_WRITTEN_BY = ("kinds", "pieces", "piece_tokens", "prefix_tokens", "temperature", "top_p", "batch_size", "least_tokens",
               "seed")  # fmt: skip
"""The options that decide what is written; the others decide what is kept of it."""


def _require_room(
    writes: Writer, kinds: Sequence[Kind], passages: Sequence[Passage], options: SynthesisOptions
) -> None:
    """Raise RecipeError for a kind that the model cannot begin, or a passage that leaves it no room to write."""
    for kind in kinds:
        for text in [passage.text for passage in passages] if kind.uses_text else [""]:
            writes.prompt(kind, text, options.seed, options.prefix_tokens)


class _Corpus:
    """What the corpus holds: bytes, and n-grams where novelty is asked for."""

    def __init__(self, documents: Iterable[Document], options: SynthesisOptions) -> None:
        self.bytes = 0
        self.novelty = None if options.most_overlap is None else Novelty(options.novelty_ngram)
        for document in documents:
            self.bytes += document.bytes
            if self.novelty is not None:
                self.novelty.add(document.text)


def _room(corpus_bytes: int, options: SynthesisOptions) -> float:
    """Return the bytes of synthetic text that the share allows: s / (1 - s) times those of the corpus."""
    if options.most_share == 1:
        return float("inf")
    if not corpus_bytes:
        raise RecipeError(f"synthesis: most_share={options.most_share:g} of a whole without other text leaves no room. "
                          "Give text with -d, or set most_share=1.")  # fmt: skip
    return corpus_bytes * options.most_share / (1 - options.most_share)


def _chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    while part := list(itertools.islice(pieces, _TOGETHER)):
        yield part


class _Judged:
    """Drops what fails, in the order of the table above."""

    def __init__(self, options: SynthesisOptions, checks: Sequence[Checker], verifier: Verifier | None,
                 novelty: Novelty | None, count: StageCount, made: Mapping[str, Any]) -> None:  # fmt: skip
        self.options, self.checks, self.verifier = options, checks, verifier
        self.novelty, self.count, self.made = novelty, count, made

    def kept(self, pieces: Sequence[Piece]) -> Iterator[Document]:
        """Yield what passes of a few pieces."""
        formed = [(piece, *found) for piece in pieces if (found := self._formed(piece)) is not None]
        scores: list[float | None] = [None] * len(formed)
        if self.verifier is not None:
            scores = [*self.verifier.scores([written for _, written, _ in formed])]
        for (piece, written, how), score in zip(formed, scores, strict=True):
            document = self._document(piece, written.text, how)
            if score is not None and self.options.verifier is not None:
                how["verifier"] = {"model": self.options.verifier.model, "asks": self.options.verifier.asks,
                                   "score": round(score, 3)}  # fmt: skip
                if not score >= self.options.verifier.limit:
                    self.count.drop(document, "the verifier disagrees", f"{score:.3f}")
                    continue
            if self.novelty is not None and self.options.most_overlap is not None:
                overlap = self.novelty.overlap(written.text)
                how["overlap"] = round(overlap, 3)
                if overlap > self.options.most_overlap:
                    self.count.drop(document, "not new", f"overlap {overlap:.2f}")
                    continue
                self.novelty.add(written.text)
            yield document

    def _formed(self, piece: Piece) -> tuple[Written, dict[str, Any]] | None:
        """Return what a piece holds and how it was made, if its form and the checkers let it pass."""
        how = self._how(piece)
        raw = self._document(piece, piece.draft.text, how)
        self.count.take(raw)
        if piece.draft.tokens < self.options.least_tokens or not piece.draft.text.strip():
            self.count.drop(raw, "short", f"{piece.draft.tokens} tokens")
            return None
        if piece.kind.whole and not piece.draft.ended:
            self.count.drop(raw, "cut off")
            return None
        written = piece.kind.read(piece.draft.text)
        if written is None:
            self.count.drop(raw, "not of the form asked for")
            return None
        record = {"kind": piece.kind.name, "passage": "" if piece.passage is None else piece.passage.text}
        for check in self.checks:
            verdict = check(written.prompt, written.answer, record)
            if not verdict.passed:
                self.count.drop(raw, f"check {check.spec}", verdict.why)
                return None
            told = {"check": check.spec, "why": verdict.why} | ({"sha256": check.sha256} if check.sha256 else {})
            how["checks"].append(told)
        if written.prompt:
            how |= {"prompt": written.prompt, "answer": written.answer}
        return written, how

    def _how(self, piece: Piece) -> dict[str, Any]:
        how: dict[str, Any] = {
            **self.made, "kind": piece.kind.name, "template_sha256": piece.kind.sha256, "seed": piece.seed,
            "temperature": self.options.temperature, "top_p": self.options.top_p, "ended": piece.draft.ended,
            "checks": [],
        }  # fmt: skip
        if piece.passage is not None:
            how["from"] = {"source": piece.passage.source, "document": piece.passage.document,
                           "passage": piece.passage.number}  # fmt: skip
        return how

    def _document(self, piece: Piece, text: str, how: dict[str, Any]) -> Document:
        licence = None if piece.passage is None else piece.passage.licence
        return Document(text, f"synthetic:{self.made['model']}", licence=licence,
                        id=f"{piece.kind.name}#{piece.number}", how=how)  # fmt: skip


def empty_error(count: StageCount) -> DataError:
    """Return the error for a synthesis of which nothing is left: what took how many, with examples."""
    took = ", ".join(f"{why} {number:,}" for why, number in count.reasons.most_common())
    shown = "; ".join(f"{example['why']}: {' '.join(example['text'].split())[:100]!r}"
                      for example in count.dropped.to_json()[:3])  # fmt: skip
    return DataError(f"synthesis: nothing is left of {count.documents_in:,} pieces ({took}). For example: {shown}. "
                     "Loosen what took most, or let another model write.")  # fmt: skip
