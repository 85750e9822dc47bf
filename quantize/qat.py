"""Quantization-aware training: the weights move while every forward pass sees them quantized.

    minimise over W, tables      KL(unquantized || model with Q(W))        Q by `fake_quantize`, W straight through

From about 4 bits on, codes fitted after training are as good. At 2 bits no code of the given weights is good and they
must be rebuilt: trained weights move by about 40 % there (ParetoQ; Liu et al. 2025, arXiv 2502.02631, section 4).

What is used, and where it comes from:

- learned scales s = f * max|W| / qmax with c / max|W| as the first f, c by a Newton recursion, and the balanced set
  {-1.5, -0.5, 0.5, 1.5} for symmetric integers of 2 bits (arXiv 2507.13575, section 5: smoother, fewer loss spikes);
- palettes trained with the weights: the same idea without a grid;
- borders between cells that rest while the levels move (`fake_quantize` says why), which neither paper has;
- AdamW without weight decay and a cosine to 0 (ParetoQ, section 5; arXiv 2507.13575);
- the unquantized model as the teacher through the one training loop, so a run resumes exactly (`train`).

With `start`, the codes of a better quantizer (LNQ, GPTQ), training begins there: tables are taken over, and a weight
whose nearest level is another than its code's is moved just inside the cell of its code. So the first forward pass is
the start's, and every weight still knows which border it is near.

A weighted average of the iterates (EMA) is not kept: with a rate that ends at 0 the last iterate is an average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.errors import RecipeError, offenders
from dwindle.quantize.clipping import newton_clip, refined_clip
from dwindle.quantize.fake_quantize import FakeInteger, FakePalette, fake_quantized, inside_cells
from dwindle.quantize.integers import IntegerGrid, round_to_nearest, storable
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan
from dwindle.quantize.matching import Matching, training_of, training_windows
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.quantize.stand_in import StandIn
from dwindle.token_set import TokenSet
from dwindle.train import train
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["quantization_aware_training", "starting_point"]

RATE = 1e-2
"""AdamW's peak rate: a share of a typical weight per step."""
CHECKPOINT_EVERY = 200
"""Steps between checkpoints (only with a folder)."""


def quantization_aware_training(
    bundle: ModelBundle,
    plan: LayerPlan,
    tokens: TokenSet,
    options: QuantizeOptions,
    folder: Path | None = None,
    start: Mapping[str, QuantizedWeight] | None = None,
) -> dict[str, QuantizedWeight]:
    """Return the trained codes and tables of every layer of the plan."""
    windows = training_windows(tokens, "quantize.method=qat")
    if start is not None:
        _require_start(bundle, plan, start)
    weights: dict[str, FakeInteger | FakePalette] = {}
    for layer in plan.layers:
        dense = bundle.model.get_submodule(layer.name).weight.detach()
        begin = starting_point(dense, layer, options) if start is None else start[layer.name]
        weights[layer.name] = fake_quantized(dense if start is None else inside_cells(dense, begin), begin)
    bundle.model.eval()
    student = StandIn(bundle.model, weights, {})
    identity = {"teacher": bundle.content_sha256, "layers": [asdict(layer) for layer in plan.layers]}
    training = training_of(
        options, windows, bundle.anatomy.vocab, RATE, tokens=options.tokens, checkpoint_every=CHECKPOINT_EVERY
    )
    train(student, Matching(bundle), windows, training, folder=folder, identity=identity)
    return student.finish()


def _require_start(bundle: ModelBundle, plan: LayerPlan, start: Mapping[str, QuantizedWeight]) -> None:
    wrong = []
    for layer in plan.layers:
        shape = tuple(bundle.model.get_submodule(layer.name).weight.shape)
        if layer.name not in start:
            wrong.append(f"{layer.name} (missing)")
        elif _told(found := start[layer.name].spec()) != _told(layer.spec(shape)):
            wrong.append(f"{layer.name} ({_told(found)}, needed {_told(layer.spec(shape))})")
    if wrong:
        raise RecipeError(
            f"quantize: {len(wrong)} of {len(plan.layers)} layers have no codes of the planned format to start from: "
            f"{offenders(wrong)}. Quantize with the same plan first, or start from the float weights."
        )


def _told(spec: Mapping[str, object]) -> str:
    """Return the part of a spec that training keeps, as text; half-way levels are the quantizer's choice."""
    return " ".join(f"{key}={spec[key]}" for key in sorted(spec) if key != "balanced")


def starting_point(weight: Tensor, layer: LayerFormat, options: QuantizeOptions) -> QuantizedWeight:
    """Return the codes that training begins with where no better quantizer's are given.

    Symmetric integers of 2 bits are the balanced set. Scales are the better, group by group, of the ratios that RTN
    tries and of Newton's clip: statistics of a whole row favour the second, those of 32 weights the first.
    """
    if layer.scheme == "palettize":
        return palettize(weight, layer.bits, layer.group_size, options.histogram_bins)
    grid = IntegerGrid(layer.bits, layer.symmetric, balanced=layer.symmetric and layer.bits == 2)
    tried = round_to_nearest(weight, layer.bits, layer.group_size, layer.symmetric, balanced=grid.balanced)
    if not layer.symmetric:
        return tried
    groups = weight.detach().to(torch.float32).view(len(weight), -1, layer.group_size)
    scales = _newton_scales(groups, grid)
    zero = torch.full_like(scales, tried.centre)
    codes = grid.codes(groups, scales, zero)
    error = ((codes - zero) * scales - groups).square().sum(-1)
    before = (tried.dequantize().to(groups).view_as(groups) - groups).square().sum(-1)
    better = (error < before)[..., None]
    codes = torch.where(better, codes, tried.codes.to(groups).view_as(groups))
    scales = torch.where(better, scales, tried.scales.to(groups)[..., None])
    return grid.weight(codes.view_as(weight).cpu(), scales[..., 0].cpu(), zero[..., 0].cpu())


def _newton_scales(groups: Tensor, grid: IntegerGrid) -> Tensor:
    """Return storable scales [..., 1] whose clip has the least squared error over groups [..., g]."""
    rows = groups.reshape(-1, groups.shape[-1])
    _, zero = grid.ranges(rows[:1])
    centre = float(zero)
    qmax = centre + 0.5 if grid.balanced else centre - 1
    clip = refined_clip(rows, newton_clip(rows, qmax), -centre, grid.top - centre, qmax)
    return storable(clip / qmax).view(*groups.shape[:-1], 1)
