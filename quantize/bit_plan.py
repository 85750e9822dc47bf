"""The plan of a mixed quantization as a file: decided, shown, edited if one likes, then applied as it stands.

bits.json (schema 1):

    {"schema": 1, "scheme": "palettize", "grade": "fisher",
     "target": {"bits_per_weight": 3.5, "bytes": null}, "model_sha256": "...",
     "linear_bits_per_weight": 3.498, "model_bits_per_weight": 4.1, "model_bytes": 118784,
     "predicted_kl": 0.0258, "measured_kl": 0.0277, "joint_curve": [[0.0021, 0.0024], [0.19, 0.33]], "notes": [...],
     "layers": [{"name": "model.layers.0.self_attn.q_proj", "bits": 4, "group_size": 16, "symmetric": true,
                 "row_scales": false, "shape": [64, 64], "stored_bits": 17408, "predicted_kl": 0.0011,
                 "alternatives": [{"bits": 2, "group_size": 16, "stored_bits": 8448, "predicted_kl": 0.0213}, ...]}]}

`bits`, `group_size`, `symmetric` and `row_scales` decide; they may be edited. Sizes follow from them and are counted
anew when a file is read; the predicted KL of an edited layer is looked up among its alternatives, and of the whole it
is no longer known, nor is the measured one; `expected_kl` then adds the layers' up and follows `joint_curve`, which
plans of equal bits everywhere were measured for. Reading collects every mistake of the file into one error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dwindle.errors import RecipeError, did_you_mean, offenders
from dwindle.quantize.allocation import Choice
from dwindle.quantize.joint_kl import JointCurve
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan
from dwindle.quantize.options import INTEGER_BITS, PALETTE_BITS, Scheme
from dwindle.quantize.plan_table import plan_table
from dwindle.quantize.sensitivity import Sensitivities
from dwindle.storage import read_json, write_json
from dwindle.typed_json import require_types

__all__ = ["SCHEMA", "BitPlan", "PlannedLayer", "rest_of"]

SCHEMA = 1
_DECIDING = ("bits", "group_size", "symmetric", "row_scales")
Shape = tuple[int, int]


@dataclass(frozen=True)
class PlannedLayer:
    """One linear: its format, what it is predicted to cost, and what else it could have had."""

    format: LayerFormat
    shape: Shape
    predicted_kl: float | None = None
    alternatives: tuple[Choice, ...] = ()
    """All choices it had, the taken one among them."""

    @property
    def stored_bits(self) -> int:
        """Return the bits of its codes and tables."""
        return self.format.stored_bits(self.shape)

    @property
    def weights(self) -> int:
        """Return O * I."""
        return self.shape[0] * self.shape[1]

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands under `layers`."""
        form = self.format
        return {
            "name": form.name, "bits": form.bits, "group_size": form.group_size, "symmetric": form.symmetric,
            "row_scales": form.row_scales, "shape": list(self.shape), "stored_bits": self.stored_bits,
            "predicted_kl": self.predicted_kl,
            "alternatives": [
                {"bits": c.bits, "group_size": c.group_size, "stored_bits": c.stored_bits, "predicted_kl": c.cost}
                for c in sorted(self.alternatives)
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class BitPlan:
    """Formats of all planned linears, with what they were chosen for and what is known of the result."""

    scheme: Scheme
    layers: tuple[PlannedLayer, ...]
    grade: str = "none"
    """Where the costs come from (see `sensitivity`); none: written by hand."""
    target_bits_per_weight: float | None = None
    target_bytes: int | None = None
    rest: tuple[int, int] = (0, 0)
    """Stored bits and weights of all that is not planned: embedding, head, norms, biases, linears kept float."""
    predicted_kl: float | None = None
    """Nats/token of all linears together, known before the plan was measured."""
    measured_kl: float | None = None
    """The same, measured on windows held apart from calibration."""
    model_sha256: str | None = None
    """Content hash of the model that the plan was made for."""
    notes: tuple[str, ...] = ()
    joint_curve: tuple[tuple[float, float], ...] = ()
    """Measured points (sum of the linears' own KL, joint KL), ascending; see `joint_kl.JointCurve`."""

    @property
    def expected_kl(self) -> float | None:
        """Return nats/token of all linears together from the costs of each; None where one has no known cost."""
        costs = [layer.predicted_kl for layer in self.layers]
        known = [cost for cost in costs if cost is not None]
        return JointCurve(self.joint_curve).joint(sum(known)) if known and len(known) == len(costs) else None

    @property
    def linear_bits(self) -> int:
        """Return the stored bits of the planned linears."""
        return sum(layer.stored_bits for layer in self.layers)

    @property
    def linear_bits_per_weight(self) -> float:
        """Return their stored bits per weight, scales, zero points and palettes included."""
        return self.linear_bits / sum(layer.weights for layer in self.layers)

    @property
    def model_bytes(self) -> int:
        """Return the bytes of the whole model, as `ModelBundle.size` counts them."""
        return -(-(self.linear_bits + self.rest[0]) // 8)

    @property
    def model_bits_per_weight(self) -> float:
        """Return the stored bits per parameter of the whole model."""
        return (self.linear_bits + self.rest[0]) / (sum(layer.weights for layer in self.layers) + self.rest[1])

    @property
    def formats(self) -> dict[str, LayerFormat]:
        """Return the formats by name."""
        return {layer.format.name: layer.format for layer in self.layers}

    @classmethod
    def from_formats(
        cls, formats: Mapping[str, LayerFormat], shapes: Mapping[str, Shape], sensitivities: Sensitivities, **known: Any
    ) -> BitPlan:
        """Return the plan of an allocation with all its alternatives; `known` are further fields."""
        choices = sensitivities.choices(shapes)
        layers = tuple(
            PlannedLayer(
                form,
                shapes[name],
                sensitivities.costs[name][form] if sensitivities.in_nats else None,
                tuple(choices[name]) if sensitivities.in_nats else (),
            )
            for name, form in formats.items()
        )
        return cls(layers[0].format.scheme, layers, sensitivities.grade, **known)

    @classmethod
    def from_layer_plan(cls, plan: LayerPlan, shapes: Mapping[str, Shape], linears: Collection[str]) -> BitPlan:
        """Return the plan that a `LayerPlan` already is, to be written and edited."""
        layers = tuple(PlannedLayer(layer, shapes[layer.name]) for layer in plan.layers if layer.name in linears)
        return cls(layers[0].format.scheme, layers)

    def layer_plan(self, plan: LayerPlan) -> LayerPlan:
        """Return `plan` with these formats in the place of its linears'."""
        return replace(plan, layers=tuple(self.formats.get(layer.name, layer) for layer in plan.layers))

    def table(self) -> str:
        """Return the plan as text: blocks by parts, bits per weight and share of the predicted KL."""
        return plan_table(self)

    def to_json(self) -> dict[str, Any]:
        """Return the object of bits.json."""
        return {
            "schema": SCHEMA, "scheme": self.scheme, "grade": self.grade,
            "target": {"bits_per_weight": self.target_bits_per_weight, "bytes": self.target_bytes},
            "model_sha256": self.model_sha256, "linear_bits_per_weight": self.linear_bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight, "model_bytes": self.model_bytes,
            "predicted_kl": self.predicted_kl, "measured_kl": self.measured_kl,
            "joint_curve": [list(anchor) for anchor in self.joint_curve], "notes": list(self.notes),
            "rest": {"stored_bits": self.rest[0], "weights": self.rest[1]},
            "layers": [layer.to_json() for layer in self.layers],
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Write bits.json."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path, plan: LayerPlan, shapes: Mapping[str, Shape], linears: Collection[str]) -> BitPlan:
        """Return the plan in a file, held to the model that it is for. Raises RecipeError with every mistake."""
        try:
            data = read_json(path)
        except OSError as error:
            raise RecipeError(f"bit plan {path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise RecipeError(f"bit plan {path}: is not JSON ({error}). Write it anew with --dry-run.") from error
        try:
            return cls.from_json(data, plan, shapes, linears)
        except RecipeError as error:
            raise RecipeError(f"bit plan {path}: {error}") from None

    @classmethod
    def from_json(cls, data: Any, plan: LayerPlan, shapes: Mapping[str, Shape], linears: Collection[str]) -> BitPlan:
        """Return the plan of a JSON object; `plan` holds the layers that it must name, all and no other."""
        planned = {layer.name: layer for layer in plan.layers if layer.name in linears}
        wrong = _wrong_whole(data, planned)
        rows = data.get("layers", []) if isinstance(data, dict) and isinstance(data.get("layers"), list) else []
        wrong += _wrong_names(rows, planned)
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("name"), str) and row["name"] in planned:
                wrong += _wrong_format(row, planned[row["name"]], shapes[row["name"]])
        if wrong:
            raise RecipeError(f"{len(wrong)} mistake(s): {offenders(wrong)}. Mend or remove them.")
        try:
            return cls._made(data, rows, planned, shapes)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise RecipeError(f"it is damaged ({error}). Write it anew with --dry-run.") from error

    @classmethod
    def _made(
        cls, data: Any, rows: list[Any], planned: Mapping[str, LayerFormat], shapes: Mapping[str, Shape]
    ) -> BitPlan:
        by_name = {row["name"]: _planned_layer(row, form, shapes) for row in rows if (form := planned.get(row["name"]))}
        layers = tuple(by_name[name] for name in planned)
        edited = any(row["stored_bits"] != by_name[row["name"]].stored_bits for row in rows if "stored_bits" in row)
        target, rest = data.get("target") or {}, data.get("rest") or {}
        made = cls(
            data["scheme"], layers, str(data.get("grade", "none")), target.get("bits_per_weight"), target.get("bytes"),
            (int(rest.get("stored_bits", 0)), int(rest.get("weights", 0))),
            None if edited else data.get("predicted_kl"), None if edited else data.get("measured_kl"),
            data.get("model_sha256"), tuple(data.get("notes", ())),
            tuple((float(total), float(joint)) for total, joint in data.get("joint_curve", ())),
        )  # fmt: skip
        require_types(replace(made, layers=()))
        return made


def rest_of(
    parameters: Iterable[tuple[str, int]], plan: LayerPlan, shapes: Mapping[str, Shape], linears: Collection[str],
    storage_bits: int,
) -> tuple[int, int]:  # fmt: skip
    """Return stored bits and weights of all that is not a planned linear.

    `parameters` are (name, numel) of every stored tensor, tied ones once; `storage_bits` is the width of a float.
    """
    formats = plan.formats
    bits = count = 0
    for name, numel in parameters:
        module = name.removesuffix(".weight")
        if module in formats and module in linears:
            continue
        bits += formats[module].stored_bits(shapes[module]) if module in formats else numel * storage_bits
        count += numel
    return bits, count


def _planned_layer(row: Mapping[str, Any], planned: LayerFormat, shapes: Mapping[str, Shape]) -> PlannedLayer:
    form = replace(planned, **{key: row[key] for key in _DECIDING if key in row})
    choices = tuple(
        Choice(int(a["stored_bits"]), float(a["predicted_kl"]), int(a["bits"]), int(a["group_size"]))
        for a in row.get("alternatives", ())
    )
    known = {(choice.bits, choice.group_size): choice.cost for choice in choices}
    predicted = known.get((form.bits, form.group_size)) if row.get("predicted_kl") is not None else None
    return PlannedLayer(form, shapes[form.name], predicted, choices)


def _wrong_whole(data: Any, planned: Mapping[str, LayerFormat]) -> list[str]:
    if not isinstance(data, dict):
        return [f"it is no JSON object but {type(data).__name__}"]
    wrong = []
    if data.get("schema") != SCHEMA:
        wrong.append(f"schema is {data.get('schema')!r} (needed: {SCHEMA})")
    scheme = next(iter(planned.values())).scheme
    if data.get("scheme") != scheme:
        wrong.append(f"scheme is {data.get('scheme')!r} (needed: {scheme!r}, what the options say)")
    if not isinstance(data.get("layers"), list):
        wrong.append("layers is not a list")
    curve = data.get("joint_curve", [])
    if not isinstance(curve, list) or not all(_is_anchor(point) for point in curve):
        wrong.append("joint_curve is not a list of [sum, joint] pairs of positive numbers")
    return wrong


def _is_anchor(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(x, int | float) and x > 0 for x in point)


def _wrong_names(rows: list[Any], planned: Mapping[str, LayerFormat]) -> list[str]:
    names = [row.get("name") if isinstance(row, dict) else None for row in rows]
    wrong = [f"layer number {number} has no name" for number, name in enumerate(names) if not isinstance(name, str)]
    known = [name for name in names if isinstance(name, str)]
    wrong += [f"{name} is not a linear that is quantized{did_you_mean(name, planned)}"
              for name in dict.fromkeys(known) if name not in planned]  # fmt: skip
    wrong += [
        f"{name} stands there {known.count(name)} times" for name in dict.fromkeys(known) if known.count(name) > 1
    ]
    missing = [name for name in planned if name not in known]
    return [*wrong, f"{len(missing)} layers are missing: {offenders(missing)}"] if missing and rows else wrong


def _wrong_format(row: Mapping[str, Any], planned: LayerFormat, shape: Shape) -> list[str]:
    name, wrong = planned.name, []
    palettes = planned.scheme == "palettize"
    allowed = PALETTE_BITS if palettes else INTEGER_BITS
    bits, group = row.get("bits"), row.get("group_size", planned.group_size)
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        wrong.append(f"{name}: bits is {bits!r} (needed: {', '.join(map(str, allowed))})")
    extent, what = (shape[0], "output rows") if palettes else (shape[1], "inputs")
    if not isinstance(group, int) or isinstance(group, bool) or group < 1 or extent % group:
        wrong.append(f"{name}: group_size is {group!r} (needed: a divisor of its {extent:,} {what})")
    for key, fixed in (("symmetric", palettes), ("row_scales", not palettes)):
        value = row.get(key, getattr(planned, key))
        if not isinstance(value, bool):
            wrong.append(f"{name}: {key} is {value!r} (needed: true or false)")
        elif fixed and value != (key == "symmetric"):
            wrong.append(f"{name}: {key} is {str(value).lower()}, which {planned.scheme} does not have")
    return wrong
