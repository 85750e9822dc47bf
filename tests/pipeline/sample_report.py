"""A report with everything in it: variants, a parity miss on request, estimates and measurements, layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dwindle.report import Artifact, Measurement, Metric, Parity, Report, Skipped, StepRecord, TargetVerdict


def measurement(parameters: int, stored: int, nats: float | None, agreement: float | None = None) -> Measurement:
    return Measurement(
        parameters, stored, 8 * stored / parameters, 4.0, 8.0, nats, nats and nats / 2, nats and 0.1, agreement
    )


TEACHER = measurement(4_000_000, 8_000_000, 1.4, 1.0)
PRUNED = measurement(2_500_000, 5_000_000, 2.5, 0.5)
DISTILLED = measurement(2_500_000, 5_000_000, 1.5, 0.92)
PALETTES = measurement(2_500_000, 1_300_000, 1.52, 0.89)
INTEGERS = measurement(2_500_000, 1_400_000, 1.53, 0.91)
LAYERS = {
    f"model.layers.{i}.mlp.{part}_proj": {"bits": 4.5, "bytes": 4500, "parameters": 8000, "format": "int4"}
    for i in range(2)
    for part in ("gate", "up", "down")
}


def sample_report(*, passed: bool = True, name: str = "prune", speed: float = 800.0) -> Report:
    steps = (
        StepRecord(name, TEACHER, PRUNED, None, 4.2, 800_000_000),
        StepRecord("distill", PRUNED, DISTILLED, None, 184.0, 900_000_000),
        StepRecord("quantize", DISTILLED, PALETTES, "apple", 12.0, 900_000_000, {"layers": LAYERS}),
        StepRecord("quantize", DISTILLED, INTEGERS, "onnx", 3.0, 900_000_000, {"layers": LAYERS}),
    )
    parity = Parity(3e-5 if passed else 2.0, 1e-9, 1.0, 160, "onnxruntime 1.31", passed)
    onnx = Artifact(
        "onnx", "export/onnx", 1_500_000, "ab" * 32, parity, "onnx", {"onnx": "1.23"}, "any", {"layers": LAYERS}
    )
    coreml = Artifact("coreml", "export/coreml", 1_400_000, "cd" * 32, None, "apple", minimum_os="iOS 18")
    estimated = (
        Metric("tokens_per_second", 400.0, "tokens/s", "estimated", ">= 30 tokens/s", True, 200.0, 600.0),
        Metric("peak_memory_bytes", 26e6, "bytes", "estimated", None, None, 10e6, 50e6),
        Metric("battery_share", None, "share", "published"),
    )
    measured = (
        Metric("tokens_per_second", speed, "tokens/s", "measured", ">= 30 tokens/s", speed >= 30, speed, speed),
        Metric("time_to_first_token_seconds", 0.021, "seconds", "measured"),
    )
    targets = (
        TargetVerdict("iphone-15-pro", estimated, "apple", "export/coreml"),
        TargetVerdict("host", measured, "onnx", "export/onnx"),
    )
    inputs = {
        "teacher": {"model": "org/teacher-4m", "sha256": "ef" * 32},
        "data": {"train": {"source": "/home/someone/stories.txt", "tokens": 12_000_000, "licence": "CC-BY-4.0"},
                 "evaluation": {"source": "org/held-out", "tokens": 120_000, "licence": None}},
        "seed": 0,
    }  # fmt: skip
    skipped = (Skipped("coreml on host", "no runtime"),)
    return Report(steps, (onnx, coreml), targets, skipped, {"dwindle": "0.1.0", "packages": {"torch": "2.13"}}, inputs)


def adapted_report(exact_match: float = 0.75) -> Report:
    """The sample report with a recovery adapter on each variant and a task's adapter on one."""
    report = sample_report()
    recovered = replace(INTEGERS, bytes=1_420_000, nats_per_token=1.51, kl_nats_per_token=0.04)
    recover = StepRecord("recover", INTEGERS, recovered, "onnx", 60.0, 900_000_000, {
        "rank": 16, "adapter_bytes": 20_000, "tokens": 500_000, "gap": {"kl_before": 0.1, "kl_closed": 0.6}})  # fmt: skip
    spoilt = replace(recovered, nats_per_token=2.2)
    adapt = StepRecord("adapt", recovered, spoilt, "onnx", 30.0, 900_000_000, {
        "task": "titles", "rank": 8, "adapter_bytes": 10_000, "records": 1200, "started_from": "recovery",
        "metrics_before": {"exact_match": 0.1}, "metrics_after": {"exact_match": exact_match, "general_kl": 0.3},
    })  # fmt: skip
    return replace(report, steps=(*report.steps, recover, adapt))


def planned_step(
    blocks: int = 2, width: int = 64, scheme: Any = "palettize", prefix: str = "model.layers"
) -> StepRecord:
    """A quantize step with a mixed plan: costs that fall with the bits, known for 2, 3 and 4 of them."""
    from dwindle.quantize.allocation import Choice
    from dwindle.quantize.bit_plan import BitPlan, PlannedLayer
    from dwindle.quantize.layer_plan import LayerFormat, group_size_for

    shapes = {
        f"{prefix}.{i}.{part}": shape
        for i in range(blocks)
        for part, shape in {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (width // 2, width),
            "self_attn.v_proj": (width // 2, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (3 * width, width), "mlp.up_proj": (3 * width, width), "mlp.down_proj": (width, 3 * width),
        }.items()
    }  # fmt: skip
    layers = []
    for number, (name, shape) in enumerate(shapes.items()):
        group = group_size_for(scheme, shape)
        forms = {bits: LayerFormat(name, scheme, bits, group) for bits in (2, 3, 4)}
        costs = {bits: (1 + number % 9) * 0.001 * 4.0**-bits for bits in forms}
        choices = tuple(Choice(forms[b].stored_bits(shape), costs[b], b, group) for b in forms)
        chosen = (4, 3, 4, 2)[number % 4] if scheme == "palettize" else 4
        layers.append(PlannedLayer(forms[chosen], shape, costs[chosen], choices))
    table = 20 * width * width
    plan = BitPlan(scheme, tuple(layers), "kl", 3.5, None, (8 * table + 16 * 20 * width + 32 * width, table + 2 * width),
                   0.0031, 0.0029, joint_curve=((0.0001, 0.00012), (0.1, 0.2)))  # fmt: skip
    kind = "palettized" if scheme == "palettize" else "affine"
    rows = [
        {"name": x.format.name, "kind": kind, "bits": x.format.bits, "group_size": x.format.group_size,
         "shape": list(x.shape), "bytes": x.stored_bits // 8, "bits_per_weight": x.stored_bits / x.weights,
         "relative_mse": 0.01 / x.format.bits}
        for x in layers
    ]  # fmt: skip
    rows.append({"name": "model.embed_tokens", "kind": "affine", "bits": 8, "group_size": width,
                 "shape": [20 * width, width], "bytes": table + 2 * 20 * width, "bits_per_weight": 8.1,
                 "relative_mse": 0.0001})  # fmt: skip
    details = {"scheme": scheme, "method": "lnq", "plan": plan.to_json(), "layers": rows}
    return StepRecord("quantize", DISTILLED, PALETTES, "apple", 12.0, 900_000_000, details)


def planned_report(blocks: int = 2, width: int = 64, scheme: Any = "palettize", **changes: Any) -> Report:
    """The sample report with a mixed plan in place of its quantize steps, and no artifact that tells its layers."""
    report = sample_report()
    steps = (*report.steps[:2], planned_step(blocks, width, scheme, **changes))
    return replace(report, steps=steps, artifacts=report.artifacts[1:])
