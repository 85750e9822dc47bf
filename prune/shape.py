"""The numbers that say how large a model is: what a cut changes, and how many parameters that leaves. Torch-free.

A `Shape` is read from an anatomy, so it can be had from a config alone. Its count of parameters is exact for every
family of the table: linears with their biases, norms, the embedding, a head of its own where it is not tied, and, in
layers with experts, router, experts and shared expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dwindle.families import family_of

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["Shape", "shape_refusals"]


@dataclass(frozen=True)
class Shape:
    """The size of a decoder along every axis, the same in all layers of a kind: with experts or without."""

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
    experts: int = 0
    """Experts of a layer that has any; 0: a dense family."""
    expert_width: int = 0
    """Units of each."""
    top_k: int = 0
    """How many of them a token passes."""
    shared_width: int = 0
    """Units of the shared expert; 0: there is none."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts in a family with them; `ffn_width` is theirs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    @classmethod
    def of(cls, anatomy: Anatomy) -> Shape:
        """Return the shape of a model."""
        traits = anatomy.traits
        dense = [layer for layer in range(anatomy.layers) if anatomy.experts_of(layer) is None]
        mixed = [layer for layer in range(anatomy.layers) if layer not in dense]
        experts = anatomy.experts_of(mixed[0]) if mixed else None
        ffn_width = anatomy.ffn_width[dense[0]] if dense else 0
        found = cls(
            anatomy.model_type, anatomy.layers, anatomy.width, ffn_width, anatomy.heads, anatomy.kv_heads,
            anatomy.head_dim, anatomy.vocab, anatomy.tied, len(anatomy.layer_norms(0)) - 2 * (traits.qk_norm != "none"),
            traits.qk_norm, traits.qkv_bias, traits.output_bias, traits.mlp_bias,
        )  # fmt: skip
        if experts is None:
            return found
        return replace(found, experts=experts.count, expert_width=experts.width, top_k=experts.top_k,
                       shared_width=anatomy.ffn_width[mixed[0]], dense_layers=tuple(dense))  # fmt: skip

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def units(self, layer: int) -> int:
        """Return the units of the FFN that every token passes in a layer: with experts those of the shared one."""
        return self.shared_width if self.has_experts(layer) else self.ffn_width

    def keeping(self, layers: Sequence[int]) -> Shape:
        """Return the shape that is left of these layers."""
        dense = tuple(new for new, layer in enumerate(layers) if layer in self.dense_layers)
        return replace(self, layers=len(layers), dense_layers=dense)

    @property
    def queries_per_group(self) -> int:
        """Return the query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of one layer without experts.

        >>> Shape("llama", 2, 8, 16, 4, 2, 2, 100, True, 2, "none", False, False, False).layer_parameters
        592
        """
        ffn = 3 * self.width * self.ffn_width
        return self._attention_parameters + ffn + self.mlp_bias * (2 * self.ffn_width + self.width)

    @property
    def mixture_parameters(self) -> int:
        """Return the parameters of one layer with experts: router, experts, and a shared expert with its gate.

        >>> mixture = Shape("mixtral", 2, 8, 0, 4, 2, 2, 100, True, 2, "none", False, False, False, 3, 5, 2)
        >>> mixture.mixture_parameters  # 208 beside the FFN, a router of 3 x 8, and 3 experts of 3 x 8 x 5
        592
        """
        shared = (3 * self.shared_width + 1) * self.width if self.shared_width else 0
        return self._attention_parameters + self.experts * self.width * (3 * self.expert_width + 1) + shared

    @property
    def _attention_parameters(self) -> int:
        """Return the parameters of one layer beside its FFN."""
        queries, keys, width = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.width
        linears = 2 * width * queries + 2 * width * keys
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * width
        of_qk = {"none": 0, "head": 2 * self.head_dim, "full": queries + keys}[self.qk_norm]
        return linears + biases + self.layer_norms * width + of_qk

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole model, a tied head once."""
        ends = self.vocab * self.width * (1 if self.tied else 2) + self.width
        mixed = self.layers - len(self.dense_layers) if self.experts else 0
        return ends + (self.layers - mixed) * self.layer_parameters + mixed * self.mixture_parameters


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
    filled = shape.heads * shape.head_dim
    if family_of(shape.model_type).heads_fill_width and filled != shape.width:
        heads = shape.width // shape.head_dim // shape.queries_per_group * shape.queries_per_group
        hint = f", or hidden_size {heads * shape.head_dim} with {heads} heads" if 0 < heads != shape.heads else ""
        wrong.append(
            f"transformers 4.57 refuses {shape.model_type} with hidden_size={shape.width} and {shape.heads} heads of "
            f"{shape.head_dim} (hidden_size must be their product). Nearest legal shapes: hidden_size {filled} with "
            f"{shape.heads} heads{hint}, so cut width and heads by the same share or neither"
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
