"""YAML from files that others wrote: plain values, each key once, no aliases, bounded size. Torch-free.

Safe YAML (no tags that make objects) without the two features that have hurt others: repeated keys (the last one wins
in silence) and aliases (a few lines that grow to gigabytes when they are written out, in an error message say).
"""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["read_yaml"]

_LARGEST_CHARACTERS = 256_000
"""Hundreds of times a long recipe."""
_DEEPEST = 60
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C where it was built: ten times as fast, and `devices list` reads every profile."""


class _StrictLoader(_Base):  # type: ignore[misc]
    """A safe loader that refuses repeated keys and keys that are no plain words."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """Return the mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _require_plain(text: str) -> None:
    """Raise for aliases and for nesting deeper than the stack of a parser in C: seen in the events, before any tree."""
    depth = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"aliases (*name) are not allowed {' '.join(str(event.start_mark).split())}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")


def read_yaml(text: str) -> Any:
    """Return what YAML text holds. Raises ValueError with the reason, on one line, whatever the text is.

    >>> read_yaml("steps: [prune, {distill: {tokens: 20M}}]")
    {'steps': ['prune', {'distill': {'tokens': '20M'}}]}
    """
    if len(text) > _LARGEST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters where at most {_LARGEST_CHARACTERS:,} make sense")
    try:
        _require_plain(text)
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader, made stricter)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # dates, numbers and tags raise whatever the conversion of their text does
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
