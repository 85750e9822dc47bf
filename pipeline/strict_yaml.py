"""Strict YAML (`dwindle.strict_yaml`) whose errors are those of a recipe and name where the text stands."""

from __future__ import annotations

from typing import Any

from dwindle import strict_yaml
from dwindle.errors import RecipeError

__all__ = ["read_yaml"]


def read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says; raise RecipeError that begins with `where` if it is none."""
    try:
        return strict_yaml.read_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{where} is no valid YAML: {error}") from error
