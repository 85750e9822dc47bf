"""The nearest valid name to a mistyped one, as the tail of an error message. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


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
