"""Which variant goes into which format, decided before anything is exported.

ONNX Runtime executes integers; Core ML executes palettes and integers. A format takes the first variant that its
runtime can carry; a format that no variant fits is an error before the first step runs, not after the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError
from dwindle.export import ExportOptions
from dwindle.quantize import QuantizeOptions, check, check_runtimes

if TYPE_CHECKING:
    from dwindle.pipeline.recipe import Recipe

__all__ = ["ExportPlan", "ExportStepOptions", "plan_exports", "planned_exports"]


@dataclass(frozen=True)
class ExportStepOptions(ExportOptions):
    """The export step of a recipe: what `dwindle export` takes, and the formats that also get the float model."""

    float_formats: tuple[str, ...] = ()
    """Formats exported a second time from the unquantized model, into export/float/, for comparison."""


@dataclass(frozen=True)
class ExportPlan:
    """One export: the format, the variant it takes, and the folder under the run's `export/`."""

    format: str
    variant: str | None
    is_float: bool
    options: ExportOptions

    @property
    def carries_adapters(self) -> bool:
        """Return whether adapters of the variant go along; the float model is another base than theirs."""
        from dwindle.export.backends import BACKENDS

        return not self.is_float and BACKENDS[self.format].adapters

    @property
    def folder(self) -> str:
        """Return the folder below `export/`, as `onnx` or `float/onnx`."""
        return f"float/{self.format}" if self.is_float else self.format


def plan_exports(
    options: ExportStepOptions, variants: Mapping[str | None, QuantizeOptions | None]
) -> tuple[ExportPlan, ...]:
    """Return one plan per export; raise RecipeError naming every format that no variant fits.

    `variants` maps each end of the line to its quantization options, None where the model is still float.
    """
    plain = ExportOptions(**{name: getattr(options, name) for name in ExportOptions.__dataclass_fields__})
    plans, misfits = [], []
    for kind in options.formats:
        reasons: list[str] = []
        for variant, quantized in variants.items():
            try:
                if quantized is not None:
                    check(quantized, _runtime(plain, kind))
                plans.append(ExportPlan(kind, variant, False, _one(plain, kind)))
                break
            except RecipeError as problem:
                reasons.append(f"{variant or 'the model'}: {problem}")
        else:
            misfits.append(f"{kind} ({' '.join(reasons)})")
    if misfits:
        raise RecipeError(
            f"export: no variant fits {', '.join(misfits)}. "
            "Add a variant with another scheme under quantize, or drop the format."
        )
    still_float = all(quantized is None for quantized in variants.values())
    for kind in options.float_formats:
        if still_float and kind in options.formats:
            continue
        plans.append(ExportPlan(kind, None, True, _one(plain, kind)))
    return tuple(plans)


def planned_exports(recipe: Recipe) -> tuple[ExportPlan, ...]:
    """Return what will be exported; raises before any work if a format has no variant that fits."""
    ends: dict[str | None, Any] = {None: None}
    for index, step in enumerate(recipe.steps):
        if step.name == "quantize":
            ends = {variant: recipe.options[index, variant] for variant in step.variants}
            for options in ends.values():
                check_runtimes(options)
        if step.name == "export":
            return plan_exports(recipe.options[index, None], ends)
    return ()


def _runtime(options: ExportOptions, kind: str) -> str:
    """Return what must carry the codes: fixed shapes are for Core AI's Neural Engine, which takes fewer formats."""
    return "coreai-engine" if kind == "coreai" and options.shapes == "static" else kind


def _one(options: ExportOptions, kind: str) -> ExportOptions:
    changes: dict[str, Any] = {"formats": (kind,)}
    return replace(options, **changes)
