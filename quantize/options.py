"""How to quantize. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dwindle.errors import RecipeError

__all__ = ["PALETTE_BITS", "QuantizeOptions", "Scheme"]

Scheme = Literal["palettize", "integer"]

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
_INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8)
_WHOLE: dict[str, str] = {"palettize": "tensor", "integer": "channel"}
_DEFAULT_GROUP: dict[str, int] = {"palettize": 16, "integer": 32}


@dataclass(frozen=True)
class QuantizeOptions:
    """Which codes the decoder's linears and the embedding get, and what stays float."""

    scheme: Scheme = "palettize"
    """`palettize`: indices into palettes of 2^bits fp16 values; `integer`: integers times an fp16 scale."""
    bits: int = 4
    """Bits of a code in the linears: 1, 2, 3, 4, 6 or 8 for palettes, 2 to 8 for integers."""
    group_size: int | str | None = None
    """Palettes: output rows that share one (16 if None, or "tensor"). Integers: inputs that share one scale (32 if
    None, or "channel")."""
    symmetric: bool = True
    """Integers without zero points. Palettes know none."""
    embedding_bits: int = 8
    """Bits of the embedding and the head, integers with one scale per row, whatever the scheme of the linears."""
    keep_float: tuple[str, ...] = ()
    """Names or glob patterns of linears, embedding or head that stay float; each is a line in the report."""
    histogram_bins: int = 256
    """Palettes: cuts that the exact programme may take; more is slower and hardly better. See `kmeans`."""

    def __post_init__(self) -> None:
        kept = (self.keep_float,) if isinstance(self.keep_float, str) else tuple(self.keep_float)
        object.__setattr__(self, "keep_float", kept)
        if self.scheme not in get_args(Scheme):
            raise RecipeError(f"quantize: scheme={self.scheme!r} (needed: {' or '.join(get_args(Scheme))}).")
        allowed = PALETTE_BITS if self.scheme == "palettize" else _INTEGER_BITS
        wrong = []
        if self.bits not in allowed:
            wrong.append(f"bits={self.bits!r} (needed with {self.scheme}: {', '.join(map(str, allowed))})")
        if self.embedding_bits not in _INTEGER_BITS:
            wrong.append(f"embedding_bits={self.embedding_bits!r} (needed: 2 to 8; keep_float keeps it float)")
        whole = _WHOLE[self.scheme]
        if not (self.group_size is None or self.group_size == whole or _is_positive(self.group_size)):
            wrong.append(f"group_size={self.group_size!r} (needed: a whole number of at least 1, or {whole!r})")
        if self.scheme == "palettize" and not self.symmetric:
            wrong.append("symmetric=False (palettes have no zero points; needed: scheme=integer)")
        if not _is_positive(self.histogram_bins) or self.histogram_bins > 4096:
            wrong.append(f"histogram_bins={self.histogram_bins!r} (needed: 1 to 4096)")
        if wrong:
            raise RecipeError(f"quantize: {'; '.join(wrong)}.")

    def group_of(self, outputs: int, inputs: int) -> int:
        """Return the group size for an O x I linear, in rows for palettes and in inputs for integers.

        >>> QuantizeOptions().group_of(64, 32), QuantizeOptions(scheme="integer", group_size="channel").group_of(64, 48)
        (16, 48)
        """
        if isinstance(self.group_size, str):
            return outputs if self.scheme == "palettize" else inputs
        return _DEFAULT_GROUP[self.scheme] if self.group_size is None else self.group_size


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
