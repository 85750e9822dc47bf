r"""What a smaller model is likely to be worth, before anything is trained: effective parameters. Torch-free.

`fit` has to choose among thousands of shapes that all meet a budget. This prior orders them by

    ln N_eff = ln N - 0.1 ln^2 r_ffn - 0.2 ln^2 r_width - 0.4 ln^2 r_groups - 0.5 ln(1 / r_layers) + ln q(bits)

N counts the parameters of the decoder layers (embeddings hold words, not computation), r are shares kept of the full
model. N_eff reads: as good as a model of the full one's proportions with so many parameters. Where the terms come from:

- *Parameters.* Loss falls with N^-0.34 (Hoffmann et al. 2022, arXiv:2203.15556, fit 3), so equal factors of N cost the
  same share of the reducible loss and ln N is the scale on which losses add up.
- *Proportions.* Squares, because the first cut along an axis is the cheapest. The ratio 1 : 2 of FFN to width is the
  one at which the cut of Llama 3.1 8B to 4B is the best of its size (Minitron: FFN to 0.643, width to 0.75, arXiv
  2408.11796); KV groups, which Minitron leaves alone, cost twice the width. Their common scale is that of models
  trained from scratch: a ratio of FFN to width wrong by a factor of 3 costs 1 to 2 % of the loss (Kaplan et al. 2020,
  arXiv:2001.08361, figure 5), 0.1 to 0.2 in ln N.
- *Depth.* The same teacher cut to the same size in depth loses 6.6 points of MMLU instead of 4.8, 8.6 of HellaSwag
  instead of 5.7, so up to 1.5 times as much (same paper: width before depth, up to 15B). Linear, because there is no
  cheap first layer: depth goes last, and only where width alone would have to go too far.
- *Bits.* Llama-2-7B after its best palettes has perplexity 8.83, 5.57, 5.21 at 2, 3, 4 bits, 5.12 in float
  (GuidedQuant, ICML 2025, tables 3 and 4). q is the factor of N that costs as many nats by the law above at 6.5
  billion parameters, 406.4 N^-0.34: 0.02, 0.34, 0.77; between them ln of the nats is interpolated, above 4 bits a bit
  more costs a quarter. So 4 bits keep the most at a given size, as Dettmers & Zettlemoyer 2023 found (2212.09720).

A prior, not a measurement: recovery by training shrinks all terms, small models suffer more from few bits. Hence
`dwindle fit --distill-steps`, which trains the best few for a moment and believes that instead.
"""

from __future__ import annotations

import functools
import math

from dwindle.prune.shape import Shape

__all__ = ["DEPTH_COST", "SQUARE_COSTS", "bits_factor", "effective_parameters"]

SQUARE_COSTS = {"ffn": 0.1, "width": 0.2, "groups": 0.4}
"""Cost of ln^2 of the share kept, in ln N."""
DEPTH_COST = 0.5
"""Cost of ln of the share of layers removed, in ln N, beyond their parameters."""

_EXPONENT = 0.34
_REDUCIBLE_NATS = 406.4 * 6.48e9**-_EXPONENT
"""Of Llama-2-7B by the law, its embeddings apart."""
_NATS = {2: math.log(8.83 / 5.12), 3: math.log(5.57 / 5.12), 4: math.log(5.21 / 5.12)}


@functools.cache
def bits_factor(bits: float) -> float:
    """Return the share of parameters that codes of so many bits are worth.

    >>> [round(bits_factor(bits), 2) for bits in (2, 3, 3.5, 4, 8, 16)]
    [0.02, 0.34, 0.58, 0.77, 1.0, 1.0]
    """
    low = 2 if bits < 3 else 3
    slope = math.log(_NATS[low + 1] / _NATS[low]) if bits <= 4 else -math.log(4)
    start = low if bits <= 4 else 4
    nats = _NATS[start] * math.exp(slope * (bits - start))
    return float((1 + nats / _REDUCIBLE_NATS) ** (-1 / _EXPONENT))


def effective_parameters(shape: Shape, full: Shape, bits: float) -> float:
    """Return N_eff of a shape cut out of `full`, its linears stored in so many bits.

    >>> full = Shape("llama", 4, 64, 256, 8, 4, 8, 100, True, 2, "none", False, False, False)
    >>> round(effective_parameters(full, full, 16)) == 4 * full.layer_parameters
    True
    """
    cost = sum(
        weight * math.log(kept / whole) ** 2
        for weight, kept, whole in (
            (SQUARE_COSTS["ffn"], shape.ffn_width, full.ffn_width),
            (SQUARE_COSTS["width"], shape.width, full.width),
            (SQUARE_COSTS["groups"], shape.kv_heads, full.kv_heads),
        )
    )
    cost += DEPTH_COST * math.log(full.layers / shape.layers)
    return shape.layers * shape.layer_parameters * math.exp(-cost) * bits_factor(bits)
