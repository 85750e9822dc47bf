"""The errors a user can meet, and the exit code each one ends a command with.

    DwindleError                 everything below; never a traceback unless --debug
    |- RecipeError          2    a recipe, option or flag that cannot be meant
    |- DataError            2    a corpus or token set that cannot be used
    |- UnsupportedModel     2    a checkpoint, family or shape outside the table
    |- DoesNotFit           2    no plan meets the budget that was asked for
    |- OutputError          2    a place that cannot be written, or that holds something else
    |- MissingExtra         2    an optional package is not installed (with the pip line)
    |- ExportFailed         2    a converter gave up (with the operator and module it failed on)
    |- TargetError          2    a device to measure on that cannot be reached, is locked or full, or went away
    `- GateFailed           1    work was done, but a quality, parity or budget gate failed

A message says what was found, what was needed and what to do, with every offender at once:
`offenders()` formats such a list so that all errors read alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "DoesNotFit",
    "DwindleError",
    "ExportFailed",
    "GateFailed",
    "MissingExtra",
    "OutputError",
    "RecipeError",
    "TargetError",
    "UnsupportedModel",
    "did_you_mean",
    "offenders",
]


class DwindleError(Exception):
    """Base of all errors that are the user's to mend. `exit_code` is what the CLI returns."""

    exit_code = 2


class RecipeError(DwindleError):
    """A recipe, an option or a flag that cannot be meant."""


class DataError(DwindleError):
    """A corpus, text file or token set that cannot be used."""


class UnsupportedModel(DwindleError):
    """A checkpoint that is no model, is damaged, or belongs to a family outside the table."""


class DoesNotFit(DwindleError):
    """No plan within the limits meets the budget."""


class OutputError(DwindleError):
    """An output place that cannot be written or belongs to another run."""


class MissingExtra(DwindleError):
    """An optional dependency is missing.

    >>> str(MissingExtra("Core ML export", "coreml"))
    "Core ML export needs an extra that is not installed. Run: pip install 'dwindle[coreml]'"
    """

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an extra that is not installed. Run: pip install 'dwindle[{extra}]'")


class ExportFailed(DwindleError):
    """A converter of another library gave up; the message names the operator and the module it failed on."""


class TargetError(DwindleError):
    """A device to measure on that cannot be reached, refuses, is locked or full, or went away in between."""


class GateFailed(DwindleError):
    """The work was done, but its result misses a gate: quality, parity or a budget."""

    exit_code = 1


def offenders(names: Iterable[str], limit: int = 20) -> str:
    """Return names joined by commas; past `limit`, the count of those left out.

    >>> offenders(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    listed = list(names)
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest valid name, or a list of all if none is near.

    >>> did_you_mean("iphone-15pro", ["iphone-15-pro", "pixel-9"])
    " (did you mean 'iphone-15-pro'?)"
    >>> did_you_mean("toaster", ["iphone-15-pro", "pixel-9"])
    ' (known: iphone-15-pro, pixel-9)'
    """
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else f" (known: {', '.join(names)})"
