"""What each runtime can carry, as data, and the checks that refuse before any work starts. Torch-free.

A format is carried if the runtime computes with the codes that are stored, and stores them at their width. Sources:

coreml         Core ML, iOS 18 operators (coremltools 9.0, `mil/ops/defs/iOS18/compression.py`).
               `constexpr_lut_to_dense` takes indices of 1, 2, 3, 4, 6 and 8 bits with one palette per tensor or per
               group of output channels; `constexpr_blockwise_shift_scale` takes int4, uint4, int8, uint8 and fp16 data
               with any block that divides the shape. Chained, they give palettes with row scales, and integers of 2
               and 3 bits and balanced ones: the code's number is looked up and then scaled. Chained weights are known
               to leave the Neural Engine for the GPU (coreai-opt's notes on `enable_per_channel_scale`).
coreai         Core AI on CPU and GPU (coreai-torch 0.4.3): palettes of 2, 4, 6 and 8 bits, 3 refused by the converter;
               int4 and int8, any block that divides, Apple's preset being blocks of 32.
coreai-engine  Core AI on the Neural Engine (Apple's layout guide): palettes of 2, 4, 6 and 8 bits per tensor or group
               of rows without row scales; int4 and int8 per channel, symmetric.
onnx           ONNX Runtime 1.31 on CPU, executed (tests/export/test_onnx_quantized.py). `MatMulNBits` takes integers of
               2, 4 and 8 bits in blocks along the input, a power of two of at least 16, so a group of any multiple of
               16 (or a whole row, padded) is stored as blocks that repeat its scale; `bits=3` it refuses, and stored
               as 4 the file would not have the size that was asked for. `GatherBlockQuantized` looks rows up in 2, 4
               and 8 bits. It knows no palettes.

`runtime_notes` says what is carried and yet may disappoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dwindle.errors import RecipeError, did_you_mean
from dwindle.quantize.options import INTEGER_BITS, PALETTE_BITS, QuantizeOptions

__all__ = [
    "RUNTIMES",
    "RuntimeFormats",
    "carried_bits",
    "check",
    "check_runtimes",
    "embedding_problems",
    "linear_problems",
    "runtime_notes",
]


@dataclass(frozen=True)
class RuntimeFormats:
    """Formats of weights that one runtime executes without unpacking them to float on disk."""

    name: str
    palette_bits: tuple[int, ...]
    """Bits of palette indices; empty: no palettes."""
    row_scales: bool
    """Whether palettes may have one scale per output row."""
    integer_bits: tuple[int, ...]
    asymmetric: bool
    balanced_bits: tuple[int, ...]
    """Bits of symmetric integers that may be centred half-way between two codes (`AffineWeight.balanced`)."""
    block: Callable[[int], bool] = field(repr=False)
    """Whether so many inputs, fewer than a row, may share a scale; one scale per row is carried everywhere."""
    block_rule: str
    embedding_bits: tuple[int, ...]
    """Integers with one scale per row."""
    embedding_palette_bits: tuple[int, ...]
    """One palette for the table."""
    instead: str
    """What to choose for this runtime."""
    off_engine: tuple[int, ...] = ()
    """Integers that, like palettes with row scales, are carried but are known to leave its Neural Engine."""


RUNTIMES: dict[str, RuntimeFormats] = {
    "coreml": RuntimeFormats(
        name="Core ML (iOS 18)",
        palette_bits=PALETTE_BITS,
        row_scales=True,
        integer_bits=(2, 3, 4, 8),
        asymmetric=True,
        balanced_bits=(2, 3, 4, 8),
        block=lambda block: block >= 1,
        block_rule="at least 1",
        embedding_bits=(2, 3, 4, 8),
        embedding_palette_bits=PALETTE_BITS,
        instead="scheme=palettize, or scheme=integer",
        off_engine=(2, 3),
    ),
    "coreai": RuntimeFormats(
        name="Core AI (CPU and GPU)",
        palette_bits=(2, 4, 6, 8),
        row_scales=True,
        integer_bits=(4, 8),
        asymmetric=True,
        balanced_bits=(),
        block=lambda block: block >= 1,
        block_rule="at least 1",
        embedding_bits=(4, 8),
        embedding_palette_bits=(2, 4, 6, 8),
        instead="scheme=palettize with bits=2, 4, 6 or 8, or scheme=integer with bits=4 or 8",
    ),
    "coreai-engine": RuntimeFormats(
        name="Core AI (Neural Engine)",
        palette_bits=(2, 4, 6, 8),
        row_scales=False,
        integer_bits=(4, 8),
        asymmetric=False,
        balanced_bits=(),
        block=lambda block: False,
        block_rule="channel only",
        embedding_bits=(4, 8),
        embedding_palette_bits=(2, 4, 6, 8),
        instead="scheme=palettize with bits=2, 4, 6 or 8, or scheme=integer with bits=4 or 8 and group_size=channel",
    ),
    "onnx": RuntimeFormats(
        name="ONNX Runtime (MatMulNBits)",
        palette_bits=(),
        row_scales=False,
        integer_bits=(2, 4, 8),
        asymmetric=True,
        balanced_bits=(2, 4, 8),
        block=lambda block: block % 16 == 0,
        block_rule="a multiple of 16, or channel",
        embedding_bits=(2, 4, 8),
        embedding_palette_bits=(),
        instead="scheme=integer with bits=2, 4 or 8 and group_size=32, and embedding_scheme=integer",
    ),
}


def check(options: QuantizeOptions, runtime: str) -> None:
    """Raise RecipeError, with everything that is wrong at once, unless `runtime` can carry what `options` will make.

    >>> check(QuantizeOptions(scheme="integer"), "onnx")
    >>> check(QuantizeOptions(scheme="integer", bits=3), "onnx")
    Traceback (most recent call last):
    ...
    dwindle.errors.RecipeError: quantize: ONNX Runtime (MatMulNBits) cannot carry integers of 3 bits (it takes 2, 4, \
8). Set scheme=integer with bits=2, 4 or 8 and group_size=32, and embedding_scheme=integer.
    """
    formats = _known(runtime)
    wrong = [*linear_problems(options, runtime), *embedding_problems(options, runtime)]
    if wrong:
        raise RecipeError(f"quantize: {formats.name} cannot carry {'; '.join(wrong)}. Set {formats.instead}.")


def linear_problems(options: QuantizeOptions, runtime: str) -> list[str]:
    """Return what `runtime` cannot carry of the linears that `options` will make; embedding and head apart.

    >>> linear_problems(QuantizeOptions(bits=3), "coreai")
    ['palettes of 3 bits (it takes 2, 4, 6, 8)']
    """
    problems = _palette_problems if options.scheme == "palettize" else _integer_problems
    return problems(options, _known(runtime))


def embedding_problems(options: QuantizeOptions, runtime: str) -> list[str]:
    """Return what `runtime` cannot carry of the embedding and the head."""
    return _embedding_problems(options, _known(runtime))


def check_runtimes(options: QuantizeOptions) -> None:
    """Raise RecipeError with all that any of the options' own `runtimes` cannot carry."""
    wrong = []
    for runtime in options.runtimes:
        try:
            check(options, runtime)
        except RecipeError as problem:
            wrong.append(str(problem))
    if wrong:
        raise RecipeError(" ".join(dict.fromkeys(wrong)))
    if options.mixed:
        carried_bits(options)


def carried_bits(options: QuantizeOptions) -> tuple[int, ...]:
    """Return the bits per linear that the scheme, `allowed_bits` and all of `runtimes` carry, ascending.

    Raises RecipeError if there are none.

    >>> carried_bits(QuantizeOptions(target_bits_per_weight=3.5, runtimes=("coreml", "coreai")))
    (2, 4, 6, 8)
    """
    wanted = options.allowed_bits or _scheme_bits(options)
    found = tuple(b for b in wanted if all(b in _runtime_bits(_known(name), options) for name in options.runtimes))
    if not found:
        each = "; ".join(
            f"{RUNTIMES[name].name} takes {_listed(_runtime_bits(RUNTIMES[name], options))}"
            for name in options.runtimes
        )
        raise RecipeError(f"quantize: no bits of {_listed(wanted)} with scheme={options.scheme} are carried by all "
                          f"runtimes ({each}). Change allowed_bits, scheme or runtimes.")  # fmt: skip
    return found


def runtime_notes(options: QuantizeOptions) -> tuple[str, ...]:
    """Return what the options' runtimes carry and yet may run slower than hoped.

    >>> runtime_notes(QuantizeOptions(row_scales=True, runtimes=("coreml",)))
    ('Core ML (iOS 18): palettes with row scales are reported to leave the Neural Engine for the GPU',)
    """
    notes = []
    for formats in (_known(runtime) for runtime in options.runtimes):
        if not formats.off_engine:
            continue
        narrow = [bits for bits in _possible_bits(options) if bits in formats.off_engine]
        found = ["palettes with row scales"] if options.row_scales else []
        found += [f"integers of {_listed(tuple(narrow))} bits"] if options.scheme == "integer" and narrow else []
        notes += [f"{formats.name}: {what} are reported to leave the Neural Engine for the GPU" for what in found]
    return tuple(notes)


def _known(runtime: str) -> RuntimeFormats:
    if runtime not in RUNTIMES:
        raise RecipeError(f"quantize: runtime {runtime!r} is not known{did_you_mean(runtime, RUNTIMES)}.")
    return RUNTIMES[runtime]


def _scheme_bits(options: QuantizeOptions) -> tuple[int, ...]:
    return PALETTE_BITS if options.scheme == "palettize" else INTEGER_BITS


def _runtime_bits(formats: RuntimeFormats, options: QuantizeOptions) -> tuple[int, ...]:
    return formats.palette_bits if options.scheme == "palettize" else formats.integer_bits


def _possible_bits(options: QuantizeOptions) -> tuple[int, ...]:
    """Return every width that a linear may get. A mixed plan that is free to choose keeps to the options' runtimes."""
    if not options.mixed:
        return (options.bits,)
    return options.allowed_bits or carried_bits(options)


def _width_problems(options: QuantizeOptions, formats: RuntimeFormats, what: str) -> list[str]:
    allowed = _runtime_bits(formats, options)
    bad = tuple(bits for bits in _possible_bits(options) if bits not in allowed)
    if not bad:
        return []
    plan = ", which a mixed plan may choose" if options.mixed else ""
    return [f"{what} of {_listed(bad)} bits{plan} (it takes {_listed(allowed)})"]


def _palette_problems(options: QuantizeOptions, formats: RuntimeFormats) -> list[str]:
    if not formats.palette_bits:
        return ["scheme=palettize (it takes integers only)"]
    wrong = _width_problems(options, formats, "palettes")
    if options.row_scales and not formats.row_scales:
        wrong.append("row_scales (it takes palettes without scales)")
    return wrong


def _integer_problems(options: QuantizeOptions, formats: RuntimeFormats) -> list[str]:
    wrong = _width_problems(options, formats, "integers")
    if not options.symmetric and not formats.asymmetric:
        wrong.append("symmetric=False (it takes integers without zero points)")
    group = options.group_size
    if isinstance(group, int) and not formats.block(group):
        wrong.append(f"group_size={group} (it takes {formats.block_rule})")
    elif group is None and not formats.block(32):
        wrong.append(f"blocks of inputs, which group_size=None chooses (it takes {formats.block_rule})")
    return wrong


def _embedding_problems(options: QuantizeOptions, formats: RuntimeFormats) -> list[str]:
    palettes = options.embedding_scheme == "palettize"
    allowed = formats.embedding_palette_bits if palettes else formats.embedding_bits
    if palettes and not allowed:
        return ["embedding_scheme=palettize (it takes integers only)"]
    if options.embedding_bits not in allowed:
        return [f"embedding_bits={options.embedding_bits} (it takes {_listed(allowed)})"]
    return []


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
