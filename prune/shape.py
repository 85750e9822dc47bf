"""The numbers that say how large a model is: what a cut changes, and how many parameters that leaves. Torch-free.

A `Shape` is read from an anatomy, so it can be had from a config alone. Its count of parameters is exact for every
family of the table: linears with their biases, norms, the embedding, and a head of its own where it is not tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dwindle.families import family_of

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["Shape", "shape_refusals"]


@dataclass(frozen=True)
class Shape:
    """The size of a decoder along every axis, the same in all layers."""

    model_type: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    layer_norms: int
    """Norms over the width in a layer."""
    qk_norm: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @classmethod
    def of(cls, anatomy: Anatomy) -> Shape:
        """Return the shape of a model."""
        traits = anatomy.traits
        return cls(
            anatomy.model_type, anatomy.layers, anatomy.width, anatomy.ffn_width[0], anatomy.heads, anatomy.kv_heads,
            anatomy.head_dim, anatomy.vocab, anatomy.tied, len(anatomy.layer_norms(0)) - 2 * (traits.qk_norm != "none"),
            traits.qk_norm, traits.qkv_bias, traits.output_bias, traits.mlp_bias,
        )  # fmt: skip

    @property
    def queries_per_group(self) -> int:
        """Return the query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of one layer.

        >>> Shape("llama", 2, 8, 16, 4, 2, 2, 100, True, 2, "none", False, False, False).layer_parameters
        592
        """
        queries, keys, width, ffn = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.width,
            self.ffn_width,
        )
        linears = 2 * width * queries + 2 * width * keys + 3 * width * ffn
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * width + self.mlp_bias * (2 * ffn + width)
        of_qk = {"none": 0, "head": 2 * self.head_dim, "full": queries + keys}[self.qk_norm]
        return linears + biases + self.layer_norms * width + of_qk

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole model, a tied head once."""
        ends = self.vocab * self.width * (1 if self.tied else 2) + self.width
        return ends + self.layers * self.layer_parameters


def shape_refusals(shape: Shape, config: Any) -> list[str]:
    """Return one line, with the rule and the nearest legal shapes, per rule of transformers that the shape breaks.

    `config` is the full model's: Llama is no case here, since `smaller_config` writes it as an architecture without
    the rule where it has to.
    """
    wrong = []
    if (
        shape.model_type != "llama"
        and family_of(shape.model_type).width_divides_into_heads
        and shape.width % shape.heads
    ):
        step = math.lcm(shape.heads, 2)
        near = sorted({max(step, shape.width // step * step), (shape.width // step + 1) * step})
        divisors = [h for h in range(1, shape.heads + 1) if shape.width % h == 0 and h % shape.queries_per_group == 0]
        hint = f", or {max(divisors)} heads with this width" if divisors else ""
        wrong.append(
            f"transformers 5 refuses {shape.model_type} with hidden_size={shape.width} and {shape.heads} heads "
            f"(hidden_size must be a multiple of num_attention_heads). Nearest legal shapes: hidden_size "
            f"{' or '.join(map(str, near))} with {shape.heads} heads{hint}"
        )
    factors = _longrope_pairs(config) if shape.model_type == "phi3" else None
    if factors is not None:
        share = float(getattr(config, "partial_rotary_factor", None) or 1.0)
        if int(shape.width // shape.heads * share) // 2 != factors:
            wrong.append(
                f"transformers refuses phi3 with longrope unless hidden_size // num_attention_heads stays "
                f"{shape.head_dim}; found {shape.width} // {shape.heads}. Nearest legal shapes: hidden_size "
                f"{shape.head_dim * shape.heads} with {shape.heads} heads, so cut width and heads by the same share "
                "or neither"
            )
    return wrong


def _longrope_pairs(config: Any) -> int | None:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factors = given.get("short_factor")
    return None if factors is None else len(factors)
