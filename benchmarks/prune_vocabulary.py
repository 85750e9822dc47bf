r"""What a smaller vocabulary costs before any retraining, on real models.

    python benchmarks/prune_vocabulary.py [--tokens 16384]

One row per model, text that tokens are counted in, text that is measured, and limit on the size. `unused` rows measure
the text that was counted with every token of it kept: the case that must cost nothing. The others measure unseen text
of the same kind. Coverage is the share of the measured text's tokens, as the full tokenizer cuts it, that are kept
ones; bits/byte are of that same stretch of text, read by each model in its own tokens (`dwindle.measure`). KL is from
the full model over the kept tokens. A model of which nothing can go is a row that says why.

Prints a table in Markdown; `--json` one object per row. The models lie in `$DWINDLE_ASSETS`, or in `shared/assets`
beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from protocol import MODELS, RealModel, assets, model_folder

from dwindle.data import DataOptions, evaluation_set, training_texts
from dwindle.errors import DwindleError
from dwindle.measure import Meter
from dwindle.prune import PruneOptions, plan, run


@dataclass(frozen=True)
class _Case:
    model: str
    counted: tuple[str, ...]
    measured: str
    options: PruneOptions
    kind: str


_EVERY_SEEN = PruneOptions(vocabulary_min_count=1)
_HALF = PruneOptions(vocabulary_keep=0.5, vocabulary_min_count=0)
_PYTHON, _STORIES = MODELS["pycode-6m"], MODELS["stories260K"]
_CASES = (
    _Case("pycode-6m", ("lib2to3",), "lib2to3", _EVERY_SEEN, "unused"),
    _Case("pycode-6m", ("encodings",), "encodings", _EVERY_SEEN, "unused"),
    _Case("pycode-6m", _PYTHON.train, _PYTHON.evaluation, _EVERY_SEEN, "unseen text"),
    _Case("pycode-6m", _PYTHON.train, _PYTHON.evaluation, _HALF, "unseen text"),
    _Case("stories260K", _STORIES.train, _STORIES.evaluation, _EVERY_SEEN, "unseen text"),
    _Case("babyllama-105", _STORIES.train, _STORIES.evaluation, _EVERY_SEEN, "unseen text"),
)


def _row(case: _Case, real: RealModel, tokens: int) -> dict[str, Any]:
    """Return the row of a case; `skipped` says why nothing was cut."""
    told = {"model": case.model, "counted": ", ".join(Path(p).name for p in case.counted),
            "measured": Path(case.measured).name, "kind": case.kind}  # fmt: skip
    bundle = real.bundle
    corpora = training_texts(DataOptions(train=tuple(real.text.place(name) for name in case.counted)))
    try:
        chosen = plan(bundle, case.options, corpora=corpora)
    except DwindleError as error:
        return {**told, "skipped": str(error)}
    pruned, _ = run(bundle, case.options, keep_plan=chosen)
    place = real.text.place(case.measured)
    whole = evaluation_set(place, bundle.tokenizer, max_tokens=tokens)
    cut = evaluation_set(place, pruned.tokenizer, max_tokens=tokens, counted_by=bundle.tokenizer)
    assert chosen.vocabulary is not None
    kept = set(chosen.vocabulary.kept)
    context = real.text.context
    before = Meter(whole, context=context).measure(bundle)
    after = Meter(cut, teacher=bundle, context=context).measure(pruned)
    assert before.bits_per_byte is not None
    assert after.bits_per_byte is not None
    return {
        **told,
        "vocabulary": [bundle.anatomy.vocab, pruned.anatomy.vocab],
        "parameters": [before.parameters, after.parameters],
        "coverage": sum(token in kept for token in whole.ids[0].tolist()) / whole.tokens,
        "tokens": [whole.tokens, cut.tokens],
        "bits_per_byte": [before.bits_per_byte, after.bits_per_byte],
        "change": after.bits_per_byte / before.bits_per_byte - 1,
        "kl": after.kl_nats_per_token,
        "top1_agreement": after.top1_agreement,
    }


_COLUMNS = ("model", "counted in", "measured on", "vocabulary", "parameters", "coverage", "tokens of the text",
            "bits/byte", "change", "KL, nats")  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    named = f"| {row['model']} | {row['counted']} | {row['measured']} ({row['kind']})"
    if "skipped" in row:
        return f"{named} | {row['skipped']} | | | | | | |"
    (v0, v1), (p0, p1), (t0, t1) = row["vocabulary"], row["parameters"], row["tokens"]
    b0, b1 = row["bits_per_byte"]
    return (
        f"{named} | {v0:,} -> {v1:,} | {p0:,} -> {p1:,} ({p1 / p0 - 1:+.1%}) | {row['coverage']:.2%} "
        f"| {t0:,} -> {t1:,} | {b0:.4f} -> {b1:.4f} | {row['change']:+.2%} | {row['kl']:.4f} |"
    )


def main() -> None:
    """Cut, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384, help="Of the measured text, in the full tokenizer's.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not all(model_folder(case.model).is_dir() for case in _CASES):
        parser.exit(0, f"prune_vocabulary: skipped, there are no models below {assets()}; set DWINDLE_ASSETS.\n")
    models = {name: RealModel(name) for name in dict.fromkeys(case.model for case in _CASES)}
    if not options.json:
        print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for case in _CASES:
        row = _row(case, models[case.model], options.tokens)
        print(json.dumps(row) if options.json else _line(row), flush=True)


if __name__ == "__main__":
    main()
