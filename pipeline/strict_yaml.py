"""YAML without the features that have hurt others."""

from __future__ import annotations

from typing import Any

import yaml

from dwindle.errors import RecipeError

__all__ = ["read_yaml"]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without two features: repeated keys (the last one wins in silence) and aliases (a few lines can grow to
    gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says; raise RecipeError that begins with `where` if it is none."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader, made stricter)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(
            f"{where} is no valid YAML: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
