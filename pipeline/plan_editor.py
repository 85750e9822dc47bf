"""The data of the report's plan editor: what each width would make of each layer, counted before a page is opened.

The page adds up and compares; it estimates nothing. Every number it adds comes from the functions that the rest of the
line uses, made into tables here:

    size        `LayerFormat.stored_bits` of each layer shape at each width
    speed       `devices.estimate`'s seconds of each such layer on each device and runtime, with low and high
    KL          the plan's own costs per layer and width, and the curve that their sum follows (`BitPlan.expected_kl`)
    memory      the peak with no planned layer, in one file or with the weights apart, and the copies of a linear
                (`memory_cost.memory_cost`, as `resident_weight_bytes` counts them)
    legality    `quantize.formats`, and the formats that the device's profile lists

Layers of one shape and group size share a table, so a page of 32 layers stays small. What cannot be known is null: the
KL of a width that was not measured, the seconds of a format that a device refuses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dwindle.devices.cost_model import LayerTime, estimate
from dwindle.devices.device_profile import HOST, DeviceProfile, list_profiles
from dwindle.devices.memory_cost import memory_cost
from dwindle.devices.workload import WEIGHTS_APART_ABOVE_BYTES, LayerLoad, Workload
from dwindle.errors import DwindleError
from dwindle.pipeline.device_views import known_profile
from dwindle.quantize.device_target import format_name
from dwindle.quantize.formats import RUNTIMES, embedding_problems, linear_problems
from dwindle.quantize.options import INTEGER_BITS, PALETTE_BITS, QuantizeOptions
from dwindle.report import Artifact, Report, StepRecord

__all__ = ["EDITOR_CONTEXT", "plan_editor", "plan_workload"]

EDITOR_CONTEXT = 4096
"""Tokens the KV cache is sized for, fewer where the model takes fewer."""
_PREFIX = {"palettize": "palette", "integer": "int"}
_WIDTHS = {"palettize": PALETTE_BITS, "integer": INTEGER_BITS}
_FP16_BYTES = 2
_LOG = logging.getLogger("dwindle")


@dataclass(frozen=True)
class _Shape:
    """What layers share that are stored alike at every width."""

    rows: int
    columns: int
    group_size: int
    symmetric: bool
    row_scales: bool

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Shape:
        outputs, inputs = row["shape"]
        return cls(outputs, inputs, row["group_size"], row["symmetric"], row["row_scales"])

    def options(self, scheme: Any, bits: int) -> QuantizeOptions:
        """Return the options that make such a layer."""
        whole = ("tensor", self.rows) if scheme == "palettize" else ("channel", self.columns)
        group = whole[0] if self.group_size == whole[1] else self.group_size
        return QuantizeOptions(
            scheme=scheme, bits=bits, group_size=group, symmetric=self.symmetric, row_scales=self.row_scales
        )

    def stored_bits(self, scheme: Any, bits: int) -> int:
        from dwindle.quantize.layer_plan import LayerFormat

        form = LayerFormat("", scheme, bits, self.group_size, self.symmetric, self.row_scales)
        return form.stored_bits((self.rows, self.columns))


def plan_editor(step: StepRecord, report: Report) -> dict[str, Any] | None:
    """Return the editor's data of a quantize step, ready for JSON; None where its record holds no plan.

    Nor is there an editor where the record or an artifact is not as this version writes it.
    """
    plan = step.details.get("plan")
    if not isinstance(plan, Mapping) or not _is_bit_plan(plan):
        return None
    try:
        return _editor(step, report, plan)
    except (DwindleError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        _LOG.warning("no plan editor for %s: its record cannot be read (%s)", step.name, error)
        return None


def _editor(step: StepRecord, report: Report, plan: Mapping[str, Any]) -> dict[str, Any]:
    scheme, rows = plan["scheme"], plan["layers"]
    shapes = list(dict.fromkeys(_Shape.of(row) for row in rows))
    widths = _WIDTHS[scheme]
    fixed = _fixed_layers(step, report)
    machines, tables = _machines(step, report, shapes, widths, fixed)
    return {
        "plan": {key: plan.get(key) for key in ("schema", "scheme", "grade", "target", "model_sha256", "rest")},
        "measured": {"predicted_kl": plan.get("predicted_kl"), "measured_kl": plan.get("measured_kl")},
        "curve": [list(point) for point in plan.get("joint_curve", ())],
        "widths": list(widths),
        "shapes": [
            {
                "shape": [shape.rows, shape.columns],
                "group_size": shape.group_size,
                "symmetric": shape.symmetric,
                "row_scales": shape.row_scales,
                "stored": {bits: shape.stored_bits(scheme, bits) for bits in widths},
                "refused": {bits: _refusals(shape.options(scheme, bits)) for bits in widths},
                "seconds": {bits: tables[shape, bits] for bits in widths},
            }
            for shape in shapes
        ],
        "layers": [_layer(row, shapes.index(_Shape.of(row))) for row in rows],
        "embedding_refused": _embedding_refusals(step),
        "runtimes": {name: runtime.name for name, runtime in RUNTIMES.items()},
        "machines": machines,
        "fixed_bytes": sum(layer.bytes for layer in fixed),
        "apart_above_bytes": WEIGHTS_APART_ABOVE_BYTES,
    }


def plan_workload(plan: Mapping[str, Any], step: StepRecord, report: Report, runtime: str) -> Workload:
    """Return what the cost model is asked for a plan (bits.json) of the model of `step`, in a runtime."""
    prefix = _PREFIX[plan["scheme"]]
    planned = tuple(
        LayerLoad(
            row["name"], math.prod(row["shape"]),
            -(-_Shape.of(row).stored_bits(plan["scheme"], row["bits"]) // 8), True, f"{prefix}{row['bits']}",
        )
        for row in plan["layers"]
    )  # fmt: skip
    return _with_layers(_frame(step, report, runtime), (*_fixed_layers(step, report), *planned))


def _is_bit_plan(plan: Mapping[str, Any]) -> bool:
    """Return whether a record's plan is one this version can edit."""
    needed = ("name", "bits", "group_size", "symmetric", "row_scales", "shape", "stored_bits")
    rows = plan.get("layers")
    return (
        plan.get("scheme") in _PREFIX
        and isinstance(plan.get("rest"), Mapping)
        and isinstance(rows, list)
        and len(rows) > 0
        and all(isinstance(row, Mapping) and all(key in row for key in needed) for row in rows)
        and all(row["bits"] in _WIDTHS[plan["scheme"]] for row in rows)
    )


def _layer(row: Mapping[str, Any], shape: int) -> dict[str, Any]:
    """Return a layer's own numbers: what other layers of its shape do not share."""
    known = {a["bits"]: a["predicted_kl"] for a in row.get("alternatives", ()) if a["group_size"] == row["group_size"]}
    if row.get("predicted_kl") is not None:
        known.setdefault(row["bits"], row["predicted_kl"])
    return {"name": row["name"], "shape": shape, "bits": row["bits"], "kl": known}


def _refusals(options: QuantizeOptions) -> dict[str, str]:
    """Return runtime -> why it cannot carry these linears."""
    return {name: "; ".join(wrong) for name in RUNTIMES if (wrong := linear_problems(options, name))}


def _embedding_refusals(step: StepRecord) -> dict[str, str]:
    rows = [row for row in _recorded(step) if row["name"] not in _planned_names(step)]
    found: dict[str, str] = {}
    for row in rows:
        scheme = "palettize" if "palett" in str(row.get("kind")) else "integer"
        try:
            options = QuantizeOptions(embedding_scheme=scheme, embedding_bits=row["bits"])  # type: ignore[arg-type]
        except (DwindleError, KeyError):
            continue
        found |= {name: "; ".join(wrong) for name in RUNTIMES if (wrong := embedding_problems(options, name))}
    return found


def _planned_names(step: StepRecord) -> set[str]:
    return {row["name"] for row in step.details["plan"]["layers"]}


def _recorded(step: StepRecord) -> list[Mapping[str, Any]]:
    rows = step.details.get("layers")
    return [r for r in rows if isinstance(r, Mapping) and "name" in r] if isinstance(rows, list | tuple) else []


def _artifact(step: StepRecord, report: Report, runtime: str | None = None) -> Artifact | None:
    """Return an artifact of the step's variant that tells its layers, in a runtime if one is named."""
    found = [a for a in report.artifacts if a.details.get("layers") and runtime in (None, a.format)]
    own = [a for a in found if a.variant == step.variant]
    return next(iter(own or (found if runtime else [])), None)


def _fixed_layers(step: StepRecord, report: Report) -> tuple[LayerLoad, ...]:
    """Return what a plan does not decide: embedding, head, norms, linears kept float."""
    planned = _planned_names(step)
    artifact = _artifact(step, report)
    if artifact is not None:
        return tuple(x for x in Workload.from_artifact(artifact).layers if x.name not in planned)
    loads = [
        LayerLoad(row["name"], math.prod(row["shape"]), int(row["bytes"]), True,
                  f"{'palette' if 'palett' in row['kind'] else 'int'}{row['bits']}")
        for row in _recorded(step)
        if row["name"] not in planned and all(key in row for key in ("shape", "bytes", "kind", "bits"))
    ]  # fmt: skip
    if len(loads) > 1:  # an embedding beside a head of its own is looked up, not read
        loads[0] = replace(loads[0], streamed=False)
    rest = step.details["plan"]["rest"]
    bits = rest["stored_bits"] - 8 * sum(load.bytes for load in loads)
    weights = rest["weights"] - sum(load.parameters for load in loads)
    if weights > 0 and bits > 0:
        wide = "float32" if bits > 24 * weights else "float16"
        loads.append(LayerLoad("norms and other floats", weights, -(-bits // 8), True, wide))
    return tuple(loads)


def _frame(step: StepRecord, report: Report, runtime: str) -> Workload:
    """Return the workload without layers: cache, context and vocabulary, from an artifact of this runtime if any."""
    artifact = _artifact(step, report, runtime)
    if artifact is not None:
        return replace(Workload.from_artifact(artifact), layers=(), package_bytes=0)
    any_artifact = _artifact(step, report)
    rows = step.details["plan"]["layers"]

    def outputs(*parts: str) -> int:
        return sum(int(row["shape"][0]) for row in rows if row["name"].rpartition(".")[2] in parts)

    tables = [row["shape"][0] for row in _recorded(step) if row["name"] not in _planned_names(step) and "shape" in row]
    context = int(any_artifact.details.get("context_length", 0)) if any_artifact else 0
    depth = sum(row["name"].rpartition(".")[2] == "q_proj" for row in rows)
    return Workload((), _FP16_BYTES * outputs("k_proj", "v_proj"), context, max(tables, default=0), 0, runtime,
                    outputs("q_proj"), depth)  # fmt: skip


def _with_layers(frame: Workload, layers: Sequence[LayerLoad], apart: bool | None = None) -> Workload:
    return replace(frame, layers=tuple(layers), package_bytes=sum(layer.bytes for layer in layers), apart=apart)


def _machines(
    step: StepRecord, report: Report, shapes: Sequence[_Shape], widths: Sequence[int], fixed: tuple[LayerLoad, ...]
) -> tuple[list[dict[str, Any]], dict[tuple[_Shape, int], list[list[float] | None]]]:
    """Return every device and runtime that takes some width, and per shape and width its seconds on each of them."""
    scheme = step.details["plan"]["scheme"]
    tables: dict[tuple[_Shape, int], list[list[float] | None]] = {(s, b): [] for s in shapes for b in widths}
    candidates = {
        (shape, bits): LayerLoad(
            f"{number}-{bits}", shape.rows * shape.columns, -(-shape.stored_bits(scheme, bits) // 8), True,
            f"{_PREFIX[scheme]}{bits}",
        )
        for number, shape in enumerate(shapes)
        for bits in widths
    }  # fmt: skip
    refused = {(s, b): _refusals(s.options(scheme, b)) for s, b in candidates}
    machines = []
    for profile, runtime in _places(report):
        engine = format_name(profile, runtime)
        listed = profile.runtimes[runtime].weight_formats
        loads = {key: load for key, load in candidates.items() if load.format in listed and engine not in refused[key]}
        frame = _frame(step, report, runtime)
        context = min(EDITOR_CONTEXT, frame.context_length or EDITOR_CONTEXT)
        found = estimate(profile, _with_layers(frame, (*fixed, *loads.values())), context=context, runtime=runtime)
        bare = estimate(profile, _with_layers(frame, fixed, False), context=context, runtime=runtime)
        if not loads or found.runtime is None or bare.cache is None or bare.overhead is None:
            continue
        times = dict(zip(loads, found.layers[len(fixed) :], strict=True))
        for key, column in tables.items():
            column.append(_ends([times[key]]) if key in times else None)
        large = estimate(profile, _with_layers(frame, fixed, True), context=context, runtime=runtime)
        peaks = [one.metrics["peak_memory_bytes"].value for one in (bare, large)]
        machines.append(
            {
                "device": profile.name,
                "title": profile.title,
                "runtime": runtime,
                "unit": found.unit,
                "context": context,
                "fixed": _ends([*bare.layers, bare.cache, bare.overhead]),
                "memory": peaks,
                "copies": memory_cost(runtime).weight_copies("linear", packed=True)[1],
                "limit": profile.memory.default.at(),
            }
        )
    return machines, tables


def _places(report: Report) -> Iterator[tuple[DeviceProfile, str]]:
    """Yield the run's targets first, then every other known device, with each of its runtimes."""
    own = [target.profile for target in report.targets]
    for name in dict.fromkeys([*own, *(n for n in list_profiles() if n != HOST)]):
        profile = known_profile(name)
        if profile is not None:
            for runtime in profile.runtimes:
                yield profile, runtime


def _ends(times: Sequence[LayerTime]) -> list[float]:
    """Return seconds, low and high of what runs one after another."""
    sums = (sum(getattr(time, end) for time in times) for end in ("seconds", "low", "high"))
    return [float(f"{value:.9g}") for value in sums]
