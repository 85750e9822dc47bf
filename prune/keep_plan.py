"""What stays: for each layer the FFN units kept, decided before anything is cut, as JSON to read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, offenders
from dwindle.storage import write_json
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.bundle import ModelBundle
    from dwindle.prune.options import PruneOptions

__all__ = ["KeepPlan", "plan", "require_float"]

_SCHEMA = 1


@dataclass(frozen=True)
class KeepPlan:
    """FFN units to keep, the same number in every layer, so that one `intermediate_size` describes the result."""

    method: str
    """Where the choice comes from."""
    ffn_width: int
    """Units of a layer before."""
    ffn_units: tuple[tuple[int, ...], ...]
    """Per layer: indices of the kept units, ascending."""
    parameters_before: int
    parameters_after: int
    """Parameters the pruned model will have."""
    kept_score: tuple[float, ...] = ()
    """Per layer: sum of the kept units' scores over the sum of all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ffn_units", tuple(tuple(units) for units in self.ffn_units))
        object.__setattr__(self, "kept_score", tuple(self.kept_score))
        wrong = [
            f"layer {layer} ({_fault(units, self.ffn_width)})"
            for layer, units in enumerate(self.ffn_units)
            if _fault(units, self.ffn_width)
        ]
        if len({len(units) for units in self.ffn_units}) != 1:
            widths = sorted({len(units) for units in self.ffn_units})
            wrong.append(f"layers keep different numbers of units {widths}, one number is needed")
        if wrong:
            raise RecipeError(f"prune plan: {offenders(wrong)}. Keep ascending indices below {self.ffn_width}.")

    @property
    def kept_width(self) -> int:
        """Return the units of a layer after."""
        return len(self.ffn_units[0])

    def require(self, anatomy: Anatomy) -> None:
        """Raise RecipeError unless the plan was made for a model of this shape."""
        needed = [self.ffn_width] * len(self.ffn_units)
        if list(anatomy.ffn_width) != needed:
            raise RecipeError(
                f"prune plan: made for {len(needed)} layers of {self.ffn_width:,} FFN units, the model has "
                f"{anatomy.layers} of {max(anatomy.ffn_width):,}. Make a plan from this model."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the object `save` writes."""
        return {"schema": _SCHEMA, "kind": "keep_plan", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Return the plan that `to_json` gave; raise RecipeError for anything else."""
        values = dict(data)
        marks = (values.pop("kind", None), values.pop("schema", None))
        if marks != ("keep_plan", _SCHEMA) or not set(values) <= set(cls.__dataclass_fields__):
            raise RecipeError(f"this is no keep plan of schema {_SCHEMA} (keys: {offenders(sorted(data))}).")
        try:
            return cls(**values)
        except TypeError as error:
            raise RecipeError(f"this keep plan is incomplete or damaged: {error}.") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())


def _fault(units: tuple[int, ...], width: int) -> str:
    if not units:
        return "keeps nothing"
    if list(units) != sorted(set(units)):
        return "not ascending, or an index twice"
    return f"index {units[-1]} of {width}" if units[0] < 0 or units[-1] >= width else ""


def require_float(bundle: ModelBundle) -> None:
    """Raise RecipeError for a quantized model: its codes cannot be cut without quantizing again."""
    if bundle.quantized:
        raise RecipeError("prune: the model is quantized. Prune first, then quantize.")


def plan(bundle: ModelBundle, options: PruneOptions, calibration: TokenSet | None = None) -> KeepPlan:
    """Return which FFN units to keep: in each layer those with the highest scores, ties to the lower index.

    Raises RecipeError for a quantized model, missing calibration data, or a width that would not shrink.
    """
    from dwindle.prune.scores import activation_scores, magnitude_scores

    anatomy = bundle.anatomy
    if bundle.quantized:
        raise RecipeError(
            "prune: the model is quantized. Prune first, then quantize: codes cannot be cut and kept exact."
        )
    if options.method == "activation" and calibration is None:
        raise RecipeError("prune: method='activation' needs calibration data. Give some, or use method='magnitude'.")
    width = anatomy.ffn_width[0]
    kept = options.width(width)
    if kept == width and options.ffn_keep < 1:
        raise RecipeError(
            f"prune: ffn_keep={options.ffn_keep} of {width:,} units, rounded to multiples of {options.multiple}, "
            "removes nothing. Lower ffn_keep or multiple."
        )
    if options.method == "activation" and calibration is not None:
        scores = activation_scores(bundle, calibration)
    else:
        scores = magnitude_scores(bundle)
    chosen = [s.argsort(descending=True, stable=True)[:kept].sort().values for s in scores]
    before = bundle.size().parameters
    per_unit = 3 * anatomy.width + (2 if anatomy.traits.mlp_bias else 0)
    return KeepPlan(
        method=options.method,
        ffn_width=width,
        ffn_units=tuple(tuple(units.tolist()) for units in chosen),
        parameters_before=before,
        parameters_after=before - anatomy.layers * (width - kept) * per_unit,
        kept_score=tuple(float(s[u].sum() / s.sum()) if s.any() else 1.0 for s, u in zip(scores, chosen, strict=True)),
    )
