"""Activation-aware scaling (AWQ): strong inputs get a finer grid, at no cost when the model runs.

The weights of one group share a step, but the error of a weight counts by the square of its input. Multiplying an
input's column by s_i > 1, and what feeds that input by 1 / s_i, changes nothing in the float model and divides the
column's rounding error by s_i, at the price of a wider range for its neighbours (Lin et al., "AWQ", MLSys 2024,
arXiv:2306.00978). The scales are looked for among

    s_i = rms(x_i)^a / mean_o |w_oi|^b        a in 0, 0.1 ... 1;  b = 0 or 1 - a;  geometric middle 1

by the error that rounding to nearest then leaves in the outputs of all linears that read the input,

    sum over linears of tr(E H E^T)           E = Q(W s) / s - W

with H the Hessian of `layer_statistics` (plain or guided). s = 1 is among the candidates, and a pair is scaled only
where its error falls by `LEAST_GAIN`: "where it helps".

What feeds an input and can take 1 / s exactly:

    q, k, v  and  gate, up      the norm before them: offset + weight is divided (Gemma stores its weight less 1)
    o                           rows of v; the heads that share a KV head share its scales
    down                        rows of up: down reads act(gate) * up

In families that normalize after a half only (OLMo 2) q, k, v, gate and up read the residual stream: nothing to fold
into, and `Equalized.left_alone` says so. Rows of v and up lose nothing by being scaled: every row has scales of its
own. AWQ's own code searches with mean |x| and a plain output error on a sample; the Hessian holds the error of all
calibration tokens.

On stories260K (3 bits symmetric, group 32, 128 windows) scaling takes rounding from KL 0.614 to 0.576, and rounding
weighted by second moments from 0.567 to 0.545; GPTQ without scaling reaches 0.358. It is what to use where a Hessian
sweep is too slow.

`equalize` is pure: it returns new tensors of one block, the caller puts them into the model and quantizes as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_statistics import LayerStatistics

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy, Part
    from dwindle.quantize.layer_plan import LayerFormat

__all__ = ["Equalized", "equalize"]

STEPS = 10
"""Steps of the exponent a from 0 to 1."""
LEAST_GAIN = 0.01
"""Share of its error that a set of linears must lose to be scaled."""
_CLIP_CANDIDATES = 5
_LEAST_RATIO = 1e-3
"""Inputs and columns weaker than this share of the mean count as this: a dead input is not scaled without bound."""
_NORM_BEFORE: dict[str, tuple[int, int] | None] = {"pre": (0, 1), "sandwich": (0, 2), "post": None}
"""Which of a layer's norms feed the attention and the feed-forward half."""


@dataclass(frozen=True)
class Equalized:
    """What equalization changed in one block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Full parameter name -> new tensor; parameters that stay as they are do not appear."""
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [I]: what its columns were multiplied by."""
    output_scales: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> [O]: what its rows were multiplied by."""
    gains: dict[str, float] = field(default_factory=dict)
    """Linear -> share of the rounding error that went, for the linears that were scaled together with it."""
    left_alone: tuple[str, ...] = ()
    """Linears whose input comes from something that cannot take a scale."""

    def statistics(self, name: str, found: LayerStatistics) -> LayerStatistics:
        """Return a linear's statistics after the change, from those before.

        Guided weights of rows that were scaled (v, up) are kept as they were found.
        """
        columns, rows = self.input_scales.get(name), self.output_scales.get(name)
        hessian, fisher, moment = found.hessian, found.fisher, found.second_moment
        if columns is not None:
            columns = columns.to(moment.device)
            moment = moment / columns.square()
            hessian = None if hessian is None else hessian / (columns[:, None] * columns)
            fisher = None if fisher is None else fisher / columns.square()
        if rows is not None and fisher is not None:
            fisher = fisher / rows.to(fisher.device).square()[:, None]
        return replace(found, second_moment=moment, hessian=hessian, fisher=fisher)


def equalize(
    tensors: Mapping[str, Tensor],
    anatomy: Anatomy,
    layer: int,
    statistics: Mapping[str, LayerStatistics],
    formats: Mapping[str, LayerFormat],
) -> Equalized:
    """Return the scaled tensors of a block.

    `tensors` has the block's parameters by full name (`model.layers.3.mlp.up_proj.weight`), `statistics` and
    `formats` its linears by module name. Linears without a format stay float: they are scaled along, but their error
    does not count. Tensors keep their dtype.
    """
    found = Equalized(left_alone=tuple(_left_alone(anatomy, layer)))
    current = dict(tensors)
    for fold in _folds(anatomy, layer):
        rounded = [name for name in fold.readers if name in formats]
        scale, gain = _searched(fold, rounded, current, statistics, formats)
        if scale is None:
            continue
        found.gains.update(dict.fromkeys(fold.readers, gain))
        _apply(fold, scale, current, found, anatomy.traits.norm_offset)
    return found


@dataclass(frozen=True)
class _Fold:
    """Linears that read one input, and what the inverse of their scale goes into."""

    readers: tuple[str, ...]
    source: str
    first_row: int | None
    """Where the rows that feed the input begin in the source; None: the source is a norm."""
    shared: tuple[int, int, int] | None = None
    """(KV heads, heads per KV head, head_dim) where inputs of several heads come from one row."""

    def tied(self, squares: Tensor) -> Tensor:
        """Return per-input squares [I] with those that come from one row averaged."""
        if self.shared is None:
            return squares
        return squares.view(self.shared).mean(1, keepdim=True).expand(self.shared).reshape(-1)

    def row_scale(self, scale: Tensor) -> Tensor:
        """Return what the source's rows are divided by."""
        return scale if self.shared is None else scale.view(self.shared)[:, 0].reshape(-1)


def _folds(anatomy: Anatomy, layer: int) -> Iterator[_Fold]:
    parts, queries = anatomy.parts(layer), anatomy.heads * anatomy.head_dim
    norms, places = anatomy.layer_norms(layer), _NORM_BEFORE[anatomy.traits.norm_layout]
    for half, readers in enumerate(_readers(parts)):
        if places is not None:
            yield _Fold(readers, norms[places[half]], None)
    shared = anatomy.kv_heads, anatomy.heads // anatomy.kv_heads, anatomy.head_dim
    if anatomy.fused:
        yield _Fold((parts["o"],), parts["qkv"], queries + anatomy.kv_heads * anatomy.head_dim, shared)
        yield _Fold((parts["down"],), parts["gate_up"], anatomy.ffn_width[layer])
    else:
        yield _Fold((parts["o"],), parts["v"], 0, shared)
        yield _Fold((parts["down"],), parts["up"], 0)


def _readers(parts: Mapping[Part, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the linears that read the input of the attention and of the feed-forward half."""
    attention: tuple[Part, ...] = ("q", "k", "v", "qkv")
    feed_forward: tuple[Part, ...] = ("gate", "up", "gate_up")
    return (
        tuple(parts[part] for part in attention if part in parts),
        tuple(parts[part] for part in feed_forward if part in parts),
    )


def _left_alone(anatomy: Anatomy, layer: int) -> list[str]:
    if _NORM_BEFORE[anatomy.traits.norm_layout] is not None:
        return []
    return [name for readers in _readers(anatomy.parts(layer)) for name in readers]


def _searched(
    fold: _Fold,
    rounded: list[str],
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    formats: Mapping[str, LayerFormat],
) -> tuple[Tensor | None, float]:
    """Return the scale [I] that leaves the smallest error and the share of the error that goes, or None and 0."""
    if not rounded:
        return None, 0.0
    weights = {name: tensors[f"{name}.weight"].detach().to(torch.float32) for name in rounded}
    device = next(iter(weights.values())).device
    inputs = _relative(fold.tied(statistics[rounded[0]].second_moment.to(device, torch.float32)).sqrt())
    columns = torch.cat([weight.abs() / weight.abs().mean() for weight in weights.values()]).square().mean(0)
    columns = _relative(fold.tied(columns).sqrt())
    best, least, before = None, float("inf"), 0.0
    for step in range(STEPS + 1):
        a = step / STEPS
        for b in (0.0, 1.0 - a) if 0 < step < STEPS else (0.0,):
            scale = inputs**a / columns**b
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            error = sum(_error(weights[name], scale, statistics[name], formats[name]) for name in rounded)
            if step == 0:
                before = error
            if error < least:
                best, least = scale, error
    gain = 1.0 - least / before if before > 0 else 0.0
    return (best, gain) if gain >= LEAST_GAIN else (None, 0.0)


def _relative(sizes: Tensor) -> Tensor:
    mean = sizes.mean()
    return (sizes / mean).clamp(min=_LEAST_RATIO) if mean > 0 else torch.ones_like(sizes)


def _error(weight: Tensor, scale: Tensor, found: LayerStatistics, layer: LayerFormat) -> float:
    """Return the output error that rounding the scaled weight leaves."""
    moment = found.second_moment.to(weight.device)
    packed = round_to_nearest(weight * scale, layer.bits, layer.group_size, layer.symmetric, _CLIP_CANDIDATES,
                              importance=moment / scale.square())  # fmt: skip
    errors = packed.dequantize().to(weight.device) / scale - weight
    if found.hessian is None:
        return found.curvature * float((errors.square() * moment).sum(dtype=torch.float64))
    grouped = errors.view(len(found.hessian), -1, weight.shape[1])
    squares = torch.bmm(grouped, found.hessian.to(weight.device, torch.float32)) * grouped
    return found.curvature * float(squares.sum(dtype=torch.float64))


def _apply(fold: _Fold, scale: Tensor, tensors: dict[str, Tensor], found: Equalized, offset: float) -> None:
    """Put the scale into the readers and its inverse into the source, in `tensors` and in what was found."""
    changed: dict[str, Tensor] = {}
    for name in fold.readers:
        weight = tensors[f"{name}.weight"]
        changed[f"{name}.weight"] = (weight.float() * scale).to(weight.dtype)
        found.input_scales[name] = scale
    source = tensors[f"{fold.source}.weight"]
    if fold.first_row is None:
        changed[f"{fold.source}.weight"] = ((source.float() + offset) / scale - offset).to(source.dtype)
    else:
        divisor = torch.ones(len(source), device=source.device)
        rows = fold.row_scale(scale)
        divisor[fold.first_row : fold.first_row + len(rows)] = rows
        changed[f"{fold.source}.weight"] = (source.float() / divisor[:, None]).to(source.dtype)
        bias = tensors.get(f"{fold.source}.bias")
        if bias is not None:
            changed[f"{fold.source}.bias"] = (bias.float() / divisor).to(bias.dtype)
        found.output_scales[fold.source] = 1.0 / divisor
    tensors.update(changed)
    found.tensors.update(changed)
