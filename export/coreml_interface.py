"""How a saved Core ML decoder is fed: which packages belong together, what their functions take, how long they are.

All of it is read off the saved program, so a bare package serves as well as an artifact folder, and so does a foreign
one of the same form (`inputIds` is `input_ids`): a function that takes new tokens or a hidden state [1, T, ...], a mask
added to the attention's scores [1, 1, T, S], and, where its shapes are static, the number of tokens before; that keeps
its cache in states [L, 1, K, context, D]; and that returns logits [1, T, V] or the next package's hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dwindle.errors import OutputError, UnsupportedModel, offenders
from dwindle.export.coreml_files import PACKAGE, chunk_name, read_specification
from dwindle.export.mil_reader import MilFunction

__all__ = ["Feed", "PackageInterface", "interface_of", "packages_at"]

_STATE_RANK, _STATE_SLOTS = 5, 3
_FIRST, _MASK, _POSITION = ("inputids", "hidden"), "causalmask", "position"


@dataclass(frozen=True)
class Feed:
    """The names of one function's inputs and output, as the package spells them."""

    first: str
    mask: str | None
    position: str | None
    output: str


@dataclass(frozen=True)
class PackageInterface:
    """How the packages of one model are fed, in the order they are run."""

    feeds: tuple[Mapping[str, Feed], ...]
    """For each package: function -> feed."""
    lengths: Mapping[int | None, str]
    """New tokens a function takes -> its name, longest first; None: any number."""
    context: int
    vocabulary: int | None
    """None where the package does not say."""
    fixed_slots: bool
    """The mask covers the whole context, whatever was fed."""

    def pieces(self, tokens: int) -> list[tuple[str, int]]:
        """Return the functions that take that many new tokens one after another, and how many each takes.

        >>> feeds = PackageInterface((), {64: "prefill", 1: "decode"}, 256, None, True)
        >>> feeds.pieces(130)
        [('prefill', 64), ('prefill', 64), ('decode', 1), ('decode', 1)]
        """
        if None in self.lengths:
            return [(self.lengths[None], tokens)]
        taken = []
        for length, name in self.lengths.items():
            assert length is not None
            taken += [(name, length)] * (tokens // length)
            tokens %= length
        return taken


def packages_at(path: Path) -> tuple[Path, ...]:
    """Return the packages of the model at `path`, in the order they are run.

    `path` is a package, one of a cut model's packages, or a folder that holds them. Raises OutputError if there is
    none or if some are missing.
    """
    if path.suffix != ".mlpackage":
        found = sorted(path.glob("*.mlpackage")) if path.is_dir() else []
        if not found:
            raise OutputError(f"{path} holds no Core ML package. Give a .mlpackage, or a folder with {PACKAGE}.")
        path = found[0]
    place = dict(read_specification(path).description.metadata.userDefined).get("dwindle.part", "1 of 1")
    count = int(place.rpartition(" ")[2])
    if count == 1:
        return (path,)
    packages = tuple(path.parent / chunk_name(number, count) for number in range(1, count + 1))
    missing = [package.name for package in packages if not package.is_dir()]
    if missing:
        raise OutputError(f"{path} is part {place} of a model; {len(missing)} parts are not beside it: "
                          f"{offenders(missing)}. Put all of them into one folder.")  # fmt: skip
    return packages


def interface_of(packages: Sequence[Path], functions: Sequence[Mapping[str, MilFunction]]) -> PackageInterface:
    """Return how these packages are fed. Raises UnsupportedModel naming all that has another form."""
    problems: list[str] = []
    feeds = []
    for package, bodies in zip(packages, functions, strict=True):
        feeds.append({name: feed for name, body in bodies.items()
                      if (feed := _feed(f"{package.name}: {name}", body, problems)) is not None})  # fmt: skip
    states = [shape for bodies in functions for body in bodies.values() for shape in body.states.values()]
    slots = {shape[_STATE_SLOTS] for shape in states if len(shape) == _STATE_RANK}
    if len(slots) != 1 or any(len(shape) != _STATE_RANK for shape in states):
        problems.append(f"states have the shapes {sorted(set(states))}, [L, 1, K, context, D] with one context is "
                        "needed")  # fmt: skip
    lengths = _lengths(functions[0], feeds[0])
    if None not in lengths and 1 not in lengths:
        problems.append(f"functions take {sorted(n for n in lengths if n is not None)} tokens, one that takes a single "
                        "token, or any number, is needed")  # fmt: skip
    if problems:
        raise UnsupportedModel(f"{packages[0]} is no decoder that can be fed here: {'; '.join(problems)}.")
    name = lengths.get(None, lengths.get(1, ""))
    last = functions[-1][name]
    return PackageInterface(
        feeds=tuple(feeds), lengths=lengths, context=slots.pop(), vocabulary=last.outputs[feeds[-1][name].output][-1],
        fixed_slots=any(feed.position is not None for part in feeds for feed in part.values()),
    )  # fmt: skip


def _feed(place: str, body: MilFunction, problems: list[str]) -> Feed | None:
    spelled = {name.replace("_", "").lower(): name for name in body.inputs}
    first = [spelled.pop(name) for name in _FIRST if name in spelled]
    mask, position = spelled.pop(_MASK, None), spelled.pop(_POSITION, None)
    outputs = list(body.outputs)
    if len(first) != 1 or spelled or len(outputs) != 1:
        problems.append(
            f"{place} takes {', '.join(body.inputs) or 'nothing'} and returns {', '.join(outputs)}; needed are "
            "input_ids or hidden, causal_mask, where shapes are static position, and one output"
        )
        return None
    return Feed(first[0], mask, position, outputs[0])


def _lengths(bodies: Mapping[str, MilFunction], feeds: Mapping[str, Feed]) -> dict[int | None, str]:
    found = {bodies[name].inputs[feed.first][1]: name for name, feed in feeds.items()}
    return dict(sorted(found.items(), key=lambda item: -(item[0] or 0)))
