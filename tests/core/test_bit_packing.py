from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwindle.bit_packing import pack_bits, packed_bytes, unpack_bits


def numpy_oracle(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """numpy's own little-endian bit packing of every code's lowest bits."""
    columns = np.unpackbits(codes.numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(columns.reshape(-1), bitorder="little"))


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 10_000))
def test_round_trip_and_layout(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.numel() == packed_bytes(count, bits)
    assert torch.equal(packed, numpy_oracle(codes, bits) if count else codes)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_chunks_join_without_a_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (1001,)).to(torch.uint8)
    whole = pack_bits(codes, bits)
    monkeypatch.setattr("dwindle.bit_packing._CHUNK_CODES", 64)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, 1001), codes)


def test_any_shape_is_row_major() -> None:
    codes = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert torch.equal(pack_bits(codes.T, 4), pack_bits(codes.T.contiguous().view(-1), 4))


def test_packing_does_not_alias_its_input() -> None:
    codes = torch.arange(4, dtype=torch.uint8)
    pack_bits(codes, 8)[0] = 9
    assert codes[0] == 0


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        pack_bits(torch.zeros(1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="a code of 16 does not fit into 4 bits"):
        pack_bits(torch.tensor([3, 16], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"torch.int64; torch.uint8 is needed"):
        pack_bits(torch.tensor([3]), 4)


def test_strings_of_the_wrong_length_or_type() -> None:
    with pytest.raises(ValueError, match=r"5 codes of 3 bits need a uint8 string of 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)
    with pytest.raises(ValueError, match=r"torch.int32"):
        unpack_bits(torch.zeros(2, dtype=torch.int32), 3, 5)
