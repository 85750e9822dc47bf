"""What each runtime can carry, as data, and the check that refuses before any work starts. Torch-free.

Sources: Core ML, "iOS 18" operators of the model intermediate language (coremltools 9.0,
`mil/ops/defs/iOS18/compression.py`): `constexpr_lut_to_dense` takes indices of 1, 2, 3, 4, 6 and 8 bits with one
palette per tensor or per group of output channels; `constexpr_blockwise_shift_scale` takes int4, uint4, int8 and
uint8 with any block that divides the shape. ONNX Runtime, `docs/ContribOperators.md`: `MatMulNBits` takes integers of
2, 4 and 8 bits in blocks along the input, a power of two of at least 16, so a group of any multiple of 16 (or a whole
row, padded) is stored as blocks that repeat its scale; it knows no palettes. 3 bits would be stored as 4: refused,
because the file would not have the size that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dwindle.errors import RecipeError
from dwindle.quantize.options import PALETTE_BITS, QuantizeOptions

__all__ = ["RUNTIMES", "RuntimeFormats", "check"]


@dataclass(frozen=True)
class RuntimeFormats:
    """Formats of weights that one runtime executes without unpacking them to float on disk."""

    name: str
    palette_bits: tuple[int, ...]
    """Bits of palette indices; empty: no palettes."""
    integer_bits: tuple[int, ...]
    embedding_bits: tuple[int, ...]
    """Integers with one scale per row."""
    block: Callable[[int], bool] = field(repr=False)
    """Whether a block of so many inputs may share a scale."""
    block_rule: str
    per_channel: bool
    """Whether one scale may serve a whole output row of a linear."""
    instead: str
    """What to choose for this runtime."""


RUNTIMES: dict[str, RuntimeFormats] = {
    "coreml": RuntimeFormats(
        name="Core ML (iOS 18)",
        palette_bits=PALETTE_BITS,
        integer_bits=(4, 8),
        embedding_bits=(4, 8),
        block=lambda block: block >= 1,
        block_rule="at least 1",
        per_channel=True,
        instead="scheme=palettize, or scheme=integer with bits=4 or 8",
    ),
    "onnx": RuntimeFormats(
        name="ONNX Runtime (MatMulNBits)",
        palette_bits=(),
        integer_bits=(2, 4, 8),
        embedding_bits=(4, 8),
        block=lambda block: block % 16 == 0,
        block_rule="a multiple of 16",
        per_channel=True,
        instead="scheme=integer with bits=2, 4 or 8 and group_size=32",
    ),
}


def check(options: QuantizeOptions, runtime: str) -> None:
    """Raise RecipeError, with everything that is wrong at once, unless `runtime` can carry what `options` will make.

    >>> check(QuantizeOptions(scheme="integer"), "onnx")
    >>> check(QuantizeOptions(scheme="palettize"), "onnx")
    Traceback (most recent call last):
    ...
    dwindle.errors.RecipeError: quantize: ONNX Runtime (MatMulNBits) cannot carry scheme=palettize (it takes integers \
only). Set scheme=integer with bits=2, 4 or 8 and group_size=32.
    """
    if runtime not in RUNTIMES:
        raise RecipeError(f"quantize: runtime {runtime!r} is not known (known: {', '.join(RUNTIMES)}).")
    formats = RUNTIMES[runtime]
    wrong = (
        _palette_problems(options, formats) if options.scheme == "palettize" else _integer_problems(options, formats)
    )
    if options.embedding_bits not in formats.embedding_bits:
        wrong.append(f"embedding_bits={options.embedding_bits} (it takes {_listed(formats.embedding_bits)})")
    if wrong:
        raise RecipeError(f"quantize: {formats.name} cannot carry {'; '.join(wrong)}. Set {formats.instead}.")


def _palette_problems(options: QuantizeOptions, formats: RuntimeFormats) -> list[str]:
    if not formats.palette_bits:
        return ["scheme=palettize (it takes integers only)"]
    if options.bits not in formats.palette_bits:
        return [f"palettes of {options.bits} bits (it takes {_listed(formats.palette_bits)})"]
    return []


def _integer_problems(options: QuantizeOptions, formats: RuntimeFormats) -> list[str]:
    wrong = []
    if options.bits not in formats.integer_bits:
        wrong.append(f"integers of {options.bits} bits (it takes {_listed(formats.integer_bits)})")
    if options.group_size == "channel":
        if not formats.per_channel:
            wrong.append(f"group_size=channel (it takes {formats.block_rule})")
    elif not formats.block(group := options.group_of(1, 1)):
        wrong.append(f"group_size={group} (it takes {formats.block_rule})")
    return wrong


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
