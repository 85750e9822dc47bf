"""The folder of a synthesis: synthetic.jsonl, one record a line, and card.json and card.md, which account for it.

A record has text, source, licence, id and how (model, hashes, seed, sampling, what it passed); where there is a
question or task also prompt and answer. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle import storage
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.data.synthesis.kinds import kind_of
from dwindle.data.synthesis.options import SynthesisOptions
from dwindle.data.synthesis.step import empty_error
from dwindle.storage import atomic_folder, hash_file, write_json, write_text
from dwindle.tokenization import encode_plain

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["require_place", "synthesis_summary", "write_synthesis"]

_FILES = {"synthetic.jsonl", "card.json", "card.md"}


def require_place(place: Path) -> None:
    """Raise OutputError unless the place is free or holds an earlier synthesis."""
    storage.require_place(place, None, "a synthesis", _FILES)


def write_synthesis(
    place: Path, pieces: Iterator[Document], count: StageCount, writer: ModelBundle, options: SynthesisOptions
) -> dict[str, Any]:
    """Write the folder and return the card. Raises DataError, and writes nothing, if no piece is left."""
    require_place(place)
    with atomic_folder(place) as partial:
        text = partial / "synthetic.jsonl"
        tokens = 0
        with text.open("w", encoding="utf-8", newline="\n", errors="replace") as lines:
            for piece in pieces:
                how = dict(piece.how)
                asked: dict[str, Any] = {key: how.pop(key) for key in ("prompt", "answer") if key in how}
                record = {"text": piece.text, **asked, "source": piece.source, "licence": piece.licence,
                          "id": piece.id, "how": how}  # fmt: skip
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
                tokens += len(encode_plain(writer.tokenizer, [piece.text])[0])
        if not count.documents_out:
            raise empty_error(count)
        card = {
            "schema": 1, "file": text.name, "sha256": hash_file(text), "tokens": tokens,
            "model": {"name": str(writer.lineage.entries[0].options["model"]), "sha256": writer.content_sha256},
            "options": asdict(options),
            "templates": {name: {"sha256": kind_of(name).sha256, "template": kind_of(name).template}
                          for name in options.kinds},
            "pieces": count.to_json(),
        }  # fmt: skip
        write_json(partial / "card.json", card)
        write_text(partial / "card.md", _markdown(card))
    return card


def synthesis_summary(card: dict[str, Any]) -> str:
    """Return what a card says, in lines for a terminal."""
    pieces = card["pieces"]
    took = "".join(f"\n  {why}: {number:,}" for why, number in pieces["dropped"].items())
    return (f"{pieces['documents_out']:,} of {pieces['documents_in']:,} pieces kept, {pieces['bytes_out']:,} bytes, "
            f"{card['tokens']:,} tokens{took}")  # fmt: skip


def _markdown(card: dict[str, Any]) -> str:
    pieces, options = card["pieces"], card["options"]
    lines = [
        "# Synthetic text", "",
        f"{pieces['documents_out']:,} pieces ({pieces['bytes_out']:,} bytes, {card['tokens']:,} tokens) of "
        f"{pieces['documents_in']:,} written by {card['model']['name']} (sha256 {card['model']['sha256'][:12]}), "
        f"kinds {', '.join(options['kinds'])}, temperature {options['temperature']:g}, top_p {options['top_p']:g}, "
        f"seed {options['seed']}.", "",
        "| dropped because | pieces |", "|---|---|",
        *(f"| {why} | {number:,} |" for why, number in pieces["dropped"].items()), "",
        "Every line of `synthetic.jsonl` says in `how` what made it and what it passed.", "",
    ]  # fmt: skip
    return "\n".join(lines)
