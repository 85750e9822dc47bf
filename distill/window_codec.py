r"""One window of a logit cache as bytes: sampled tokens to bit fields and back.

For the T positions of a window, with M tokens asked for by name, b bits per id and c bits per count, one after the
other, each part filled up to a whole byte:

| part | fields | bits |
|---|---|---|
| tokens kept for certain, a count per position | T | c |
| tokens drawn, a count per position | T | c |
| entropy, in steps of 1/128 nat | T | 12 |
| most probable token | T | b |
| probabilities of the named tokens, on a scale of logarithms from 1 to 2^-32 | T * M | 16 |
| ids kept for certain, and their probabilities on a scale of logarithms from 1 to 1/N | sum of counts | b, and 8 |
| ids drawn | sum of counts | b |

The weight of a drawn token is 1/N and that of the most probable one what is missing to 1; neither is stored. Numbers
are rounded up or down at random so that the expectation is the number itself: the scales add noise (at most 1 % of a
probability for N = 32), no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dwindle.distill.bit_fields import field_bytes, pack_fields, unpack_fields

__all__ = ["WindowCodec", "WindowTokens"]

_ENTROPY_BITS, _ENTROPY_STEPS = 12, 128
_NAMED_BITS, _NAMED_OCTAVES = 16, 32
_CERTAIN_BITS = 8
_GOLDEN = (math.sqrt(5) - 1) / 2

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WindowTokens:
    """The tokens of T positions, as stored: what `token_sampling` keeps, with rounded numbers."""

    entropy: Floats
    """[T] nats."""
    top1: Ints
    """[T]."""
    named: Floats
    """[T, M] probabilities of the tokens asked for by name."""
    certain_counts: Ints
    """[T] tokens kept for certain."""
    certain_ids: Ints
    certain_probabilities: Floats
    drawn_counts: Ints
    """[T] tokens drawn."""
    drawn_ids: Ints


class _LogScale:
    """Codes of `bits` bits for numbers from 2^-octaves to 1, evenly spaced in the logarithm; with `zero`, also 0."""

    def __init__(self, bits: int, octaves: float, *, zero: bool = False) -> None:
        self.bits = bits
        self.values = 2.0 ** (-octaves * np.arange(1 << bits) / ((1 << bits) - 1 - zero))
        if zero:
            self.values[-1] = 0.0
        self._steps = ((1 << bits) - 1 - zero) / octaves

    def codes(self, numbers: Floats, uniform: Floats) -> Ints:
        """Return one of the two neighbouring codes, each as often as makes the expectation right."""
        with np.errstate(divide="ignore"):
            lower = np.floor(-np.log2(numbers) * self._steps)
        low = np.clip(lower, 0, len(self.values) - 2).astype(np.int64)
        above, below = self.values[low], self.values[low + 1]
        codes: Ints = low + (uniform * (above - below) < above - numbers)
        return codes


class WindowCodec:
    """Encodes and decodes windows of one cache."""

    def __init__(self, vocab: int, draws: int, named: int) -> None:
        self._id_bits = max(1, (vocab - 1).bit_length())
        self._count_bits = draws.bit_length()
        self._named = named
        self._certain = _LogScale(_CERTAIN_BITS, math.log2(draws))
        self._names = _LogScale(_NAMED_BITS, _NAMED_OCTAVES, zero=True)

    def encode(self, window: WindowTokens, uniform: Floats) -> bytes:
        """Return the bytes of a window; `uniform` [T] in [0, 1) decides the roundings."""
        certain = (np.repeat(uniform, window.certain_counts) + _GOLDEN * np.arange(len(window.certain_ids))) % 1.0
        names = (uniform[:, None] + _GOLDEN * (1 + np.arange(self._named))) % 1.0
        steps = np.minimum(np.floor(window.entropy * _ENTROPY_STEPS + uniform), (1 << _ENTROPY_BITS) - 1)
        parts = [
            pack_fields(window.certain_counts, self._count_bits),
            pack_fields(window.drawn_counts, self._count_bits),
            pack_fields(steps.astype(np.int64), _ENTROPY_BITS),
            pack_fields(window.top1, self._id_bits),
            pack_fields(self._names.codes(window.named, names), _NAMED_BITS),
            pack_fields(window.certain_ids, self._id_bits),
            pack_fields(self._certain.codes(window.certain_probabilities, certain), _CERTAIN_BITS),
            pack_fields(window.drawn_ids, self._id_bits),
        ]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, packed: NDArray[np.uint8], positions: int) -> WindowTokens:
        """Return the window that `encode` was given, with rounded numbers; ValueError for bytes that are no window."""
        fields = _Fields(packed)
        certain_counts = fields.take(positions, self._count_bits)
        drawn_counts = fields.take(positions, self._count_bits)
        entropy = fields.take(positions, _ENTROPY_BITS) / _ENTROPY_STEPS
        top1 = fields.take(positions, self._id_bits)
        named = self._names.values[fields.take(positions * self._named, _NAMED_BITS)].reshape(positions, self._named)
        certain = int(certain_counts.sum())
        certain_ids = fields.take(certain, self._id_bits)
        probabilities = self._certain.values[fields.take(certain, _CERTAIN_BITS)]
        drawn_ids = fields.take(int(drawn_counts.sum()), self._id_bits)
        return WindowTokens(entropy, top1, named, certain_counts, certain_ids, probabilities, drawn_counts, drawn_ids)


class _Fields:
    """The parts of a window, taken from the front."""

    def __init__(self, packed: NDArray[np.uint8]) -> None:
        self._rest = packed

    def take(self, count: int, bits: int) -> Ints:
        taken = unpack_fields(self._rest[: field_bytes(count, bits)], bits, count)
        self._rest = self._rest[field_bytes(count, bits) :]
        return taken
