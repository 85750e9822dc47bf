"""A window of a logit cache is read as it was written, whatever its counts, vocabulary and number of draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.distill.bit_fields import field_bytes, pack_fields, unpack_fields
from dwindle.distill.window_codec import WindowCodec, WindowTokens


@settings(max_examples=200, deadline=None, derandomize=True)
@given(bits=st.integers(1, 25), count=st.integers(0, 60), seed=st.integers(0, 2**32 - 1))
def test_fields_of_any_width(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, count)
    packed = pack_fields(values, bits)
    assert len(packed) == field_bytes(count, bits)
    assert np.array_equal(unpack_fields(packed, bits, count), values)
    stream = sum(int(value) << (bits * i) for i, value in enumerate(values))  # the definition, in one large number
    assert int.from_bytes(packed.tobytes(), "little") == stream


@settings(max_examples=100, deadline=None, derandomize=True)
@given(vocabulary=st.integers(2, 70_000), draws=st.integers(2, 64), positions=st.integers(1, 12), named=st.integers(0, 3),
       seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_windows(vocabulary: int, draws: int, positions: int, named: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    certain = rng.integers(0, draws + 1, positions)
    drawn = np.array([rng.integers(0, draws - c + 1) for c in certain])
    window = WindowTokens(
        entropy=rng.uniform(0, 12, positions), top1=rng.integers(0, vocabulary, positions),
        named=rng.uniform(0, 1, (positions, named)), certain_counts=certain,
        certain_ids=rng.integers(0, vocabulary, certain.sum()),
        certain_probabilities=rng.uniform(1 / draws, 1, certain.sum()),
        drawn_counts=drawn, drawn_ids=rng.integers(0, vocabulary, drawn.sum()),
    )  # fmt: skip
    codec = WindowCodec(vocabulary, draws, named)
    packed = np.frombuffer(codec.encode(window, rng.uniform(0, 1, positions)), np.uint8)
    found = codec.decode(packed, positions)
    for name in ("top1", "certain_counts", "certain_ids", "drawn_counts", "drawn_ids"):
        assert np.array_equal(getattr(found, name), getattr(window, name)), name
    assert np.abs(found.entropy - window.entropy).max() <= 1 / 128 + 1e-9
    step = draws ** (1 / 255)  # neighbours on the scale of logarithms from 1 to 1/N
    assert np.all(found.certain_probabilities <= window.certain_probabilities * step * (1 + 1e-9))
    assert np.all(found.certain_probabilities >= window.certain_probabilities / step * (1 - 1e-9))
    if len(packed) > 1:
        with pytest.raises(ValueError, match="fields of"):
            codec.decode(packed[:-1], positions)
