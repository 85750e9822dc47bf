"""Who makes the codes of a layer, and what calibration must tell him.

    method     scheme     looks at                        walk
    kmeans     palettes   one group of weights            none; forward or backward for its importance
    rtn, hqq   integers   one group of weights            none
    lnq        palettes   one linear and its Hessian      matched; backward if guided
    gptq       integers   one linear and its Hessian      the same
    awq        integers   the linears of one input        the same (`awq` scales the norms, then gptq)
    learned    both       a block, or the whole model     matched, then learns each block or all of them
    qat        both       the whole model                 trains

A layer without statistics (the embedding, a head) is coded by the method that needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dwindle.errors import RecipeError
from dwindle.quantize.gptq import gptq
from dwindle.quantize.hqq import hqq
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.layer_plan import LayerFormat
from dwindle.quantize.layer_statistics import LayerStatistics
from dwindle.quantize.learned import Descent
from dwindle.quantize.lnq import lnq
from dwindle.quantize.options import DATA_FREE, QuantizeOptions
from dwindle.quantize.palettize import palettize
from dwindle.weights import QuantizedWeight

__all__ = ["Coder", "Walk", "importance_of", "layer_coder", "layerwise_method", "require_calibration",
           "require_effect", "walk_of"]  # fmt: skip

BALANCED_BITS = 2
"""Symmetric integers of so many bits are the balanced set {-1.5, -0.5, 0.5, 1.5}."""

Coder = Callable[[LayerFormat, Tensor, LayerStatistics | None], QuantizedWeight]
"""(format, float weight [O, I], statistics or None) -> codes."""


@dataclass(frozen=True)
class Walk:
    """What the coder of a layer wants to be told."""

    direction: Literal["none", "forward", "matched", "backward"] = "none"
    """See `coded_walk`."""
    hessian: bool = False
    fisher: bool = False
    rows: bool = False
    """A backward walk first, for how much each output row matters: rows that share a palette need it."""
    descent: Descent | None = None
    """Learn how the weights of each block round together, behind the coded ones."""


def layerwise_method(options: QuantizeOptions, method: str) -> str:
    """Return the layer-by-layer method that a method starts from: itself, or lnq or gptq for those that learn.

    >>> layerwise_method(QuantizeOptions(), "learned"), layerwise_method(QuantizeOptions(), "kmeans")
    ('lnq', 'kmeans')
    """
    if method in ("learned", "qat"):
        return "lnq" if options.scheme == "palettize" else "gptq"
    return method


def walk_of(options: QuantizeOptions, method: str, calibrated: bool) -> Walk:
    """Return the walk that a layer-by-layer method takes.

    >>> walk_of(QuantizeOptions(), "lnq", True)
    Walk(direction='matched', hessian=True, fisher=False, rows=True, descent=None)
    """
    if method in _CALIBRATED and calibrated:
        if options.guided:
            return Walk("backward", hessian=True, fisher=method == "lnq")
        by_block = options.method == "learned" and options.scope == "block"
        return Walk("matched", True, rows=method == "lnq", descent=Descent.of(options) if by_block else None)
    importance = importance_of(options, calibrated) if method == "kmeans" else None
    if importance == "activation":
        return Walk("forward")
    return Walk("backward", fisher=True) if importance == "fisher" else Walk()


def importance_of(options: QuantizeOptions, calibrated: bool) -> str | None:
    """Return how k-means weighs errors, with the default for None."""
    return options.importance or ("fisher" if calibrated else None)


def require_calibration(options: QuantizeOptions, method: str, calibrated: bool) -> None:
    """Raise RecipeError if the method needs a calibration text and there is none."""
    if calibrated:
        return
    needs = [f"method={method}"] if method not in DATA_FREE else []
    needs += [f"importance={options.importance}"] if options.importance in ("activation", "fisher") else []
    needs += [f"tune_steps={options.tune_steps}"] if options.tune_steps else []
    if needs:
        raise RecipeError(
            f"quantize: {' and '.join(needs)} needs a calibration text. Give one (-d TEXT, data.calibration), or "
            f"choose a method that needs none: {', '.join(DATA_FREE)}."
        )


def require_effect(options: QuantizeOptions, method: str) -> None:
    """Raise RecipeError naming every option that was set and that the method does not look at.

    >>> require_effect(QuantizeOptions(importance="fisher"), "lnq")
    Traceback (most recent call last):
    ...
    dwindle.errors.RecipeError: quantize: importance=fisher is of method=kmeans, and the method is lnq. Leave it out, \
or name another method.
    """
    of = {
        "importance": (options.importance is not None, ("kmeans",)),
        "guided": (options.guided, ("lnq", "gptq", "awq", "learned", "qat")),
        "scope": (options.scope != QuantizeOptions.scope, ("learned",)),
        "own_windows": (options.own_windows is not None, ("learned",)),
        "tokens": (options.tokens is not None, ("qat",)),
        "learning_rate": (options.learning_rate is not None and not options.tune_steps, ("learned", "qat")),
    }
    idle = [f"{name}={getattr(options, name)} is of method={' or '.join(methods)}"
            for name, (given, methods) in of.items() if given and method not in methods]  # fmt: skip
    if idle:
        raise RecipeError(f"quantize: {'; '.join(idle)}, and the method is {method}. Leave it out, or name another "
                          "method.")  # fmt: skip


def layer_coder(options: QuantizeOptions, method: str) -> Coder:
    """Return the coder of a layer-by-layer method; where a layer has no statistics, the one that needs none."""
    calibrated = _CALIBRATED.get(method)

    def code(layer: LayerFormat, dense: Tensor, found: LayerStatistics | None) -> QuantizedWeight:
        if found is not None and found.hessian is not None and calibrated is not None:
            return calibrated(layer, dense, found, options)
        if layer.scheme == "palettize":
            return palettize(dense, layer.bits, layer.group_size, options.histogram_bins,
                             importance=_importance(options, dense, found), row_scales=layer.row_scales)  # fmt: skip
        if method == "hqq":
            return hqq(dense, layer.bits, layer.group_size, layer.symmetric, balanced=_balanced(layer))
        return round_to_nearest(dense, layer.bits, layer.group_size, layer.symmetric, balanced=_balanced(layer))

    return code


def _balanced(layer: LayerFormat) -> bool:
    """Return True for symmetric integers of 2 bits: of {-2, -1, 0, 1} one level serves one side only."""
    return layer.symmetric and layer.bits == BALANCED_BITS


def _importance(options: QuantizeOptions, dense: Tensor, found: LayerStatistics | None) -> Tensor | None:
    if options.importance == "magnitude":
        return dense.abs()
    if found is None:
        return None
    return found.second_moment if found.fisher is None else found.fisher


def _lnq(layer: LayerFormat, dense: Tensor, found: LayerStatistics, options: QuantizeOptions) -> QuantizedWeight:
    assert found.hessian is not None
    importance = found.fisher
    if importance is None and found.row_curvature is not None:
        importance = found.row_curvature[:, None] * found.second_moment
    return lnq(dense, layer.bits, layer.group_size, found.hessian, importance=importance, row_scales=layer.row_scales)


def _gptq(layer: LayerFormat, dense: Tensor, found: LayerStatistics, options: QuantizeOptions) -> QuantizedWeight:
    assert found.hessian is not None
    return gptq(dense, layer.bits, layer.group_size, layer.symmetric, found.hessian, balanced=_balanced(layer))


_CALIBRATED: Mapping[str, Callable[[LayerFormat, Tensor, LayerStatistics, QuantizeOptions], QuantizedWeight]] = {
    "lnq": _lnq,
    "gptq": _gptq,
    "awq": _gptq,
}
