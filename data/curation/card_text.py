"""The data card as Markdown: README.md of a corpus, with the head that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["card_markdown", "card_summary"]


def card_markdown(card: Mapping[str, Any]) -> str:
    """Return the card as a page."""
    splits = card["stages"][-1]["details"]
    parts = [
        _head(card),
        f"# {card['name']}",
        _opening(card),
        "## Sources\n\n" + _table(
            ("source", "licence", "documents read", "bytes read", "weight", "sha256 of the texts"),
            ([s["name"], s["licence"] or "unknown", s["documents"], s["bytes"], s["weight"] or "-",
              s["sha256_of_texts"][:16]] for s in card["sources"]),
        ) + _left_out(card),
        "## What each stage took\n\n" + _table(
            ("stage", "documents in", "documents out", "bytes in", "bytes out", "dropped for", "changed"),
            ([s["stage"], s["documents_in"], s["documents_out"], s["bytes_in"], s["bytes_out"], _counts(s["dropped"]),
              _counts(s["changed"])] for s in card["stages"]),
        ) + "\n![bytes behind each stage](plots/stages.svg)\n",
        "## Splits\n\n" + _table(
            ("split", "documents", "bytes", "tokens", "bytes per token"),
            ([name, one["documents"], one["bytes"], *_tokens(card, name)] for name, one in card["splits"].items()),
        ) + "\n![bytes of each source](plots/sources.svg)\n\n"
        "No two splits share a near-duplicate: clusters of near-duplicates were divided whole, and "
        f"{splits['documents_compared_with_held_out']:,} documents were then compared exactly with all held-out ones; "
        f"{splits['near_duplicates_across_splits_found_and_dropped']:,} resembled one and were dropped, "
        f"{splits['near_duplicates_across_splits_left']:,} are left.\n",
        _contamination(card),
        "## Kept, drawn at random\n\n" + _examples(card["kept_examples"]),
        "## Dropped, drawn at random\n\n" + "\n".join(
            f"### {s['stage']}\n\n{_examples(s['dropped_examples'])}" for s in card["stages"] if s["dropped_examples"]
        ),
    ]  # fmt: skip
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def card_summary(card: Mapping[str, Any]) -> str:
    """Return the card in a few lines for a terminal."""
    lines = [f"{card['name']}: seed {card['seed']}, recipe {card['recipe_sha256'][:16]}"]
    for source in card["sources"]:
        lines.append(f"  source {source['name']:20} {source['licence'] or 'licence unknown':20} "
                     f"{source['documents']:>12,} documents {source['bytes']:>16,} bytes")  # fmt: skip
    for stage in card["stages"]:
        lines.append(f"  {stage['stage']:27} {stage['documents_in']:>12,} -> {stage['documents_out']:>12,} documents "
                     f"{stage['bytes_in']:>16,} -> {stage['bytes_out']:>16,} bytes")  # fmt: skip
        lines += [f"    {number:>10,} dropped: {why}" for why, number in stage["dropped"].items()]
        lines += [f"    {number:>10,} {what}" for what, number in stage["changed"].items()]
    for name, split in card["splits"].items():
        tokens = f" {card['tokens'][name]['tokens']:>14,} tokens" if card["tokens"] else ""
        lines.append(f"  {name:27} {split['documents']:>12,} documents {split['bytes']:>16,} bytes{tokens}")
    return "\n".join(lines)


def _head(card: Mapping[str, Any]) -> str:
    licences = sorted({s["licence"] or "unknown" for s in card["sources"]})
    listed = "\n".join(f"- {licence.lower()}" for licence in licences)
    return f"---\nlicense:\n{listed}\ntask_categories:\n- text-generation\npretty_name: {card['name']}\n---"


def _opening(card: Mapping[str, Any]) -> str:
    first, last = card["stages"][0], card["splits"]
    total = sum(split["bytes"] for split in last.values())
    documents = sum(split["documents"] for split in last.values())
    return (
        f"{documents:,} documents and {total:,} bytes, from {first['documents_in']:,} documents and "
        f"{first['bytes_in']:,} bytes in {len(card['sources'])} sources. Made by dwindle {card['dwindle']} with seed "
        f"{card['seed']} from a recipe with the hash {card['recipe_sha256'][:16]} (all of it is in card.json); the "
        "same sources, recipe and seed give the same bytes. The files and their hashes are in corpus.json."
    )


def _left_out(card: Mapping[str, Any]) -> str:
    lines = [f"{s['name']}: {s['files_left_out']:,} files are no text and were left out "
             f"({', '.join(s['files_left_out_examples'])})"
             for s in card["sources"] if s["files_left_out"]]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _contamination(card: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = []
    for stage in card["stages"]:
        rows += [
            [one["name"], one["items"], one["documents_hit"]] for one in stage["details"].get("evaluation_sets", [])
        ]
    if not rows:
        return ""
    return "## Evaluation sets held apart\n\n" + _table(("evaluation set", "items", "documents dropped for it"), rows)


def _tokens(card: Mapping[str, Any], split: str) -> list[Any]:
    if not card["tokens"]:
        return ["-", "-"]
    return [card["tokens"][split]["tokens"], card["tokens"][split]["bytes_per_token"]]


def _counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{what} {number:,}" for what, number in counts.items())


def _examples(examples: Sequence[Mapping[str, str]]) -> str:
    blocks = []
    for one in examples:
        quoted = "\n".join(f"    {line}" for line in one["text"].strip("\n").split("\n"))
        blocks.append(f"`{one['id']}`" + (f" ({one['why']})" if one["why"] else "") + f"\n\n{quoted}\n")
    return "\n".join(blocks)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
