"""The two forms a quantized weight takes: integers on a scale, and indices into palettes.

Both are *rounded once*: a quantizer chooses the codes, a checkpoint stores them packed, an exporter writes the same
codes in its runtime's layout, and whoever dequantizes gets the same float32 numbers, because the arithmetic is fixed:
the fp16 table entry is taken to float32 (exact) and enters exactly one float32 multiplication.

    affine      W[o, i] = (codes[o, i] - zero[o, i // g]) * scales[o, i // g]
    palettized  W[o, i] = palettes[o // g, indices[o, i]] [ * row_scales[o] ]

zero is stored per group, or is 2^(bits-1) for all (symmetric), or 2^(bits-1) - 1/2 for all (balanced): symmetric
integers have one more value below zero than above, which is nothing in 8 bits and a quarter of all values in 2, where
{-2, -1, 0, 1} has one positive number. Balanced codes are centred half-way: {-1.5, -0.5, 0.5, 1.5} (AFM 2025, section
on quantization-aware training, arXiv:2507.13575).

`group_size` g counts along the inputs I for the affine form (g = I is "per channel": one scale an output row) and
along the output rows O for palettes (g = O is one palette a tensor). Shapes: W is O x I as in `torch.nn.Linear`;
an embedding table is V x D, so a row is a token.

`stored_bits` counts every bit that `to_tensors` stores: codes, scales, zero points, palettes, row scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dwindle.bit_packing import MAX_BITS, pack_bits, packed_bytes, unpack_bits
from dwindle.errors import UnsupportedModel

__all__ = ["AffineWeight", "PalettizedWeight", "QuantizedWeight", "centre_of", "packed_shapes", "spec_bits",
           "weight_from_tensors"]  # fmt: skip


@dataclass(frozen=True, eq=False)
class AffineWeight:
    """Integers with one scale (and zero point) per group of inputs."""

    kind: ClassVar[str] = "affine"
    tables: ClassVar[tuple[str, ...]] = ("scales",)

    codes: Tensor
    """uint8 [O, I], each below 2**bits."""
    scales: Tensor
    """float16 [O, I / group_size]."""
    zero_points: Tensor | None
    """uint8 [O, I / group_size], or None: symmetric around `centre`."""
    bits: int
    group_size: int
    balanced: bool = False
    """Symmetric around half-way between two codes; excludes zero points."""

    def __post_init__(self) -> None:
        _require_codes(self.codes, self.bits)
        assert not (self.balanced and self.zero_points is not None), "balanced weights have no zero points"
        groups = _divided(self.codes.shape[1], self.group_size, "inputs")
        _require_table("scales", self.scales, (len(self.codes), groups), torch.float16)
        if self.zero_points is not None:
            _require_table("zero_points", self.zero_points, (len(self.codes), groups), torch.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        """Return True if there are no zero points: all of them are `centre`."""
        return self.zero_points is None

    @property
    def centre(self) -> float:
        """Return the zero point of symmetric codes: 2**(bits - 1), half of one less if balanced.

        >>> codes, scales = torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 1).half()
        >>> AffineWeight(codes, scales, None, 2, 2, balanced=True).centre
        1.5
        """
        return centre_of(self.spec())

    @property
    def stored_bits(self) -> int:
        """Return the bits of all tensors of `to_tensors`."""
        return spec_bits(self.spec())

    def spec(self) -> dict[str, Any]:
        """Return what config.json keeps of it: kind, bits, group_size, shape, symmetric, and balanced where it is."""
        spec = {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "symmetric": self.symmetric,
        }
        return spec | ({"balanced": True} if self.balanced else {})

    def dequantize(self) -> Tensor:
        """Return float32 [O, I].

        >>> w = AffineWeight(torch.tensor([[7, 9]], dtype=torch.uint8), torch.tensor([[0.5]]).half(), None, 4, 2)
        >>> w.dequantize().tolist()
        [[-0.5, 0.5]]
        """
        outputs, inputs = self.shape
        grouped = self.codes.view(outputs, inputs // self.group_size, self.group_size).to(torch.float32)
        zero = self.centre if self.zero_points is None else self.zero_points.to(torch.float32)[..., None]
        return ((grouped - zero) * self.scales.to(torch.float32)[..., None]).view(outputs, inputs)

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the packed tensors under `prefix`: codes, scales and, if asymmetric, zero_points."""
        tensors = {f"{prefix}codes": pack_bits(self.codes, self.bits), f"{prefix}scales": self.scales}
        if self.zero_points is not None:
            tensors[f"{prefix}zero_points"] = pack_bits(self.zero_points, self.bits)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], prefix: str = "") -> AffineWeight:
        """Return the weight that `to_tensors` packed; `spec` is what `spec()` gave."""
        found = _required_tensors(tensors, spec, prefix)
        (outputs, inputs), bits, group_size = spec["shape"], spec["bits"], spec["group_size"]
        zero_points = None
        if not spec["symmetric"]:
            groups = inputs // group_size
            zero_points = unpack_bits(found["zero_points"], bits, outputs * groups).view(outputs, groups)
        codes = unpack_bits(found["codes"], bits, outputs * inputs).view(outputs, inputs)
        return cls(codes, found["scales"], zero_points, bits, group_size, spec.get("balanced", False))


@dataclass(frozen=True, eq=False)
class PalettizedWeight:
    """Indices into palettes of 2**bits values, one palette per group of output rows."""

    kind: ClassVar[str] = "palettized"
    tables: ClassVar[tuple[str, ...]] = ("palettes", "row_scales")

    indices: Tensor
    """uint8 [O, I], each below 2**bits."""
    palettes: Tensor
    """float16 [O / group_size, 2**bits]."""
    bits: int
    group_size: int
    row_scales: Tensor | None = None
    """float16 [O], or None."""

    def __post_init__(self) -> None:
        _require_codes(self.indices, self.bits)
        groups = _divided(len(self.indices), self.group_size, "output rows")
        _require_table("palettes", self.palettes, (groups, 2**self.bits), torch.float16)
        if self.row_scales is not None:
            _require_table("row_scales", self.row_scales, (len(self.indices),), torch.float16)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I)."""
        return self.indices.shape[0], self.indices.shape[1]

    @property
    def stored_bits(self) -> int:
        """Return the bits of all tensors of `to_tensors`."""
        return spec_bits(self.spec())

    def spec(self) -> dict[str, Any]:
        """Return what config.json keeps of it: kind, bits, group_size, shape, row_scales."""
        return {
            "kind": self.kind,
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.shape),
            "row_scales": self.row_scales is not None,
        }

    def dequantize(self) -> Tensor:
        """Return float32 [O, I].

        >>> w = PalettizedWeight(torch.tensor([[1, 0]], dtype=torch.uint8), torch.tensor([[-2.0, 3.0]]).half(), 1, 1)
        >>> w.dequantize().tolist()
        [[3.0, -2.0]]
        """
        outputs, inputs = self.shape
        groups, size = self.palettes.shape
        start = torch.arange(groups, dtype=torch.int32, device=self.indices.device) * size
        flat = (self.indices.view(groups, -1).to(torch.int32) + start[:, None]).view(-1)
        dense = self.palettes.to(torch.float32).view(-1).index_select(0, flat).view(outputs, inputs)
        return dense if self.row_scales is None else dense * self.row_scales.to(torch.float32)[:, None]

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the packed tensors under `prefix`: indices, palettes and, if there, row_scales."""
        tensors = {f"{prefix}indices": pack_bits(self.indices, self.bits), f"{prefix}palettes": self.palettes}
        if self.row_scales is not None:
            tensors[f"{prefix}row_scales"] = self.row_scales
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], prefix: str = "") -> PalettizedWeight:
        """Return the weight that `to_tensors` packed; `spec` is what `spec()` gave."""
        found = _required_tensors(tensors, spec, prefix)
        outputs, inputs = spec["shape"]
        indices = unpack_bits(found["indices"], spec["bits"], outputs * inputs).view(outputs, inputs)
        return cls(indices, found["palettes"], spec["bits"], spec["group_size"], found.get("row_scales"))


QuantizedWeight = AffineWeight | PalettizedWeight
_KINDS: dict[str, type[AffineWeight] | type[PalettizedWeight]] = {
    AffineWeight.kind: AffineWeight,
    PalettizedWeight.kind: PalettizedWeight,
}


def weight_from_tensors(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], prefix: str = "") -> QuantizedWeight:
    """Return the weight of the kind that `spec` names; raises UnsupportedModel on tensors that do not fit it."""
    packed_shapes(spec)
    return _KINDS[spec["kind"]].from_tensors(tensors, spec, prefix)


def packed_shapes(spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of the tensors that a weight with this spec is stored as.

    >>> packed_shapes({"kind": "palettized", "bits": 4, "group_size": 16, "shape": [32, 8], "row_scales": False})
    {'indices': ((128,), torch.uint8), 'palettes': ((2, 16), torch.float16)}
    """
    kind = spec.get("kind")
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"a weight is stored as kind {kind!r}; this version reads {sorted(_KINDS)}. Update dwindle."
        )
    (outputs, inputs), bits, group_size = spec["shape"], spec["bits"], spec["group_size"]
    codes = (packed_bytes(outputs * inputs, bits),), torch.uint8
    if kind == PalettizedWeight.kind:
        shapes = {"indices": codes, "palettes": ((outputs // group_size, 2**bits), torch.float16)}
        return shapes | ({"row_scales": ((outputs,), torch.float16)} if spec["row_scales"] else {})
    groups = inputs // group_size
    shapes = {"codes": codes, "scales": ((outputs, groups), torch.float16)}
    zero_points = (packed_bytes(outputs * groups, bits),), torch.uint8
    return shapes if spec["symmetric"] else shapes | {"zero_points": zero_points}


def spec_bits(spec: Mapping[str, Any]) -> int:
    """Return the bits of all tensors that a weight with this spec is stored as.

    >>> spec_bits({"kind": "palettized", "bits": 4, "group_size": 16, "shape": [32, 8], "row_scales": False})
    1536
    """
    return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in packed_shapes(spec).values())


def centre_of(spec: Mapping[str, Any]) -> float:
    """Return the zero point that all codes of a symmetric affine spec share.

    >>> centre_of({"bits": 4}), centre_of({"bits": 2, "balanced": True})
    (8.0, 1.5)
    """
    return 2.0 ** (int(spec["bits"]) - 1) - (0.5 if spec.get("balanced") else 0.0)


def _required_tensors(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one weight by short name, or raise UnsupportedModel naming all that are wrong."""
    wrong = []
    for name, (shape, dtype) in packed_shapes(spec).items():
        tensor = tensors.get(prefix + name)
        if tensor is None:
            wrong.append(f"{prefix}{name} is missing")
        elif tuple(tensor.shape) != shape or tensor.dtype != dtype:
            wrong.append(f"{prefix}{name} is {tensor.dtype} {list(tensor.shape)}, needed {dtype} {list(shape)}")
    if wrong:
        raise UnsupportedModel(
            "the packed weights do not fit their config: " + "; ".join(wrong) + ". "
            "The checkpoint is damaged or mixed; quantize the model again."
        )
    return {name: tensors[prefix + name] for name in packed_shapes(spec)}


def _require_codes(codes: Tensor, bits: int) -> None:
    assert (codes.dim(), codes.dtype) == (2, torch.uint8), (codes.dtype, codes.shape)
    assert 1 <= bits <= MAX_BITS, bits


def _require_table(name: str, table: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(table.shape), table.dtype) == (shape, dtype), (name, table.dtype, tuple(table.shape), shape)


def _divided(extent: int, group_size: int, what: str) -> int:
    groups, left_over = divmod(extent, group_size)
    assert left_over == 0, (what, extent, group_size)
    return groups
