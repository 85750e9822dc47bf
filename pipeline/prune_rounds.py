"""`prune_and_distill`: one entry of a recipe that stands for several rounds of prune and distill.

    - prune_and_distill: {rounds: 3, prune: {ffn_keep: 0.34}, distill: {tokens: 2M}}

is read as

    - prune: {ffn_keep: 0.698}        # 0.34 ** (1/3)
    - distill: {tokens: 2M}
    - prune: {ffn_keep: 0.698}
    ...

so that every round is cached, resumed and reported as the two steps that it is. A deep cut costs less in rounds: 15B to
8B to 4B ended 12 points of MMLU above 15B to 4B at once (Muralidharan et al. 2024, Minitron, arXiv 2407.14679). Every
round keeps the same share of what there is, so the first cuts the most units, while there are most to spare, and scores
are taken anew of the model that has recovered. The teacher of all rounds is the recipe's own, which the same paper
found better than the model of the round before. The vocabulary is cut once, in the first round: how often a text holds
a token does not change. `tokens` and the other options of `distill` are those of one round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dwindle.errors import did_you_mean
from dwindle.pipeline.option_values import parse_count

__all__ = ["NAME", "rounds"]

NAME = "prune_and_distill"
_MOST_ROUNDS = 50
_KEYS = ("rounds", "prune", "distill")
_BUDGETS = ("parameters", "bytes")
_VOCABULARY = "vocabulary_"


def rounds(values: Any, place: str, problems: list[str]) -> list[tuple[str, Any]]:
    """Return (step, its options as they would stand in a recipe) in order; mistakes are appended to `problems`.

    >>> for step in rounds({"rounds": 2, "prune": {"ffn_keep": 0.25}, "distill": {"tokens": "1M"}}, "steps[0]", []):
    ...     print(*step)
    prune {'ffn_keep': 0.5}
    distill {'tokens': '1M'}
    prune {'ffn_keep': 0.5}
    distill {'tokens': '1M'}
    """
    if not isinstance(values, Mapping):
        problems.append(f"{place}: found {values!r}, needed rounds, prune and distill.")
        return []
    before = len(problems)
    problems += [f"{place}.{key} is unknown{did_you_mean(str(key), _KEYS)}." for key in values if key not in _KEYS]
    count = values.get("rounds")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST_ROUNDS:
        problems.append(f"{place}.rounds: found {count!r}, needed a whole number from 1 to {_MOST_ROUNDS}.")
    cut, training = values.get("prune"), values.get("distill") or {}
    if not isinstance(cut, Mapping) or not any(_is_share(str(key)) for key in cut):
        problems.append(f"{place}.prune: found {cut!r}, needed a share to keep, as in {{ffn_keep: 0.34}}.")
    else:
        problems += [
            f"{place}.prune.{key}: a budget is for one cut and has no rounds. Give shares to keep instead."
            for key in cut
            if key in _BUDGETS and cut[key] is not None
        ]
    if len(problems) > before or not isinstance(cut, Mapping) or not isinstance(count, int):
        return []
    steps: list[tuple[str, Any]] = []
    for done in range(count):
        steps += [("prune", _share_of_round(cut, count, first=done == 0)), ("distill", training)]
    return steps


def _is_share(key: str) -> bool:
    return key.endswith("_keep") and not key.startswith(_VOCABULARY)


def _share_of_round(cut: Mapping[str, Any], count: int, *, first: bool) -> dict[str, Any]:
    """Return the options of one round's cut; what is no share between 0 and 1 stays, to be refused as written."""
    options = {key: value for key, value in cut.items() if first or not str(key).startswith(_VOCABULARY)}
    for key, value in options.items():
        try:
            share = parse_count(value) if _is_share(str(key)) else 1.0
        except ValueError:
            continue
        if 0 < share < 1:
            options[key] = share ** (1 / count)
    return options
