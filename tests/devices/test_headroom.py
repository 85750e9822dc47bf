"""Budgets solved for a model's costs agree with the estimates that they are solved from."""

from __future__ import annotations

import dataclasses
import random

import pytest

from dwindle.devices import DeviceProfile, LayerLoad, Workload, estimate, load_profile, parse_budgets
from dwindle.devices.headroom import Cost, End, Place, headroom
from dwindle.devices.quantity import Quantity
from dwindle.errors import RecipeError

LINES = {
    "tokens_per_second >= {}": "",
    "tokens_per_second_sustained >= {}": "",
    "ttft <= {}s": "time_to_first_token_seconds",
    "load_seconds <= {}s": "load_seconds",
    "memory <= {}bytes": "peak_memory_bytes",
    "package <= {}bytes": "package_bytes",
}


def random_workload(rng: random.Random, packed: bool, static: bool) -> Workload:
    weights, table = rng.randrange(10**6, 3 * 10**9), rng.randrange(10**4, 10**8)
    layers = (
        LayerLoad("linears", weights, weights // 2 if packed else 2 * weights, format="int4" if packed else "float16"),
        LayerLoad("norms", 4000, 8000, format="float16"),
        LayerLoad("embed_tokens", table, table if packed else 2 * table, False, "int8" if packed else "float16"),
        LayerLoad("lm_head", table, table if packed else 2 * table, True, "int8" if packed else "float16"),
    )
    return Workload(layers, rng.randrange(100, 10**5), 2048, 32_000, sum(layer.bytes for layer in layers),
                    attention_width=rng.randrange(10**4, 10**5), depth=rng.randrange(40), static_shapes=static)  # fmt: skip


def cost_of(workload: Workload, loaded: Workload) -> Cost:
    linears, norms, embedding, head = loaded.layers
    return Cost(
        workload.weight_bytes, linears.bytes, linears.parameters, head.bytes, head.parameters, embedding.bytes,
        norms.bytes, norms.parameters, workload.kv_bytes_per_token, workload.attention_width, workload.depth,
    )  # fmt: skip


def _place(runtime: str, prompt: int, context: int, packed: bool, static: bool, end: End) -> Place:
    formats = ("int4", "int8") if packed else ("float16", "float16")
    return Place(runtime, 32_000, prompt, context, packed, static, end, *formats)


def _phone(known: bool) -> DeviceProfile:
    """The phone, or one of which attention and layers are known, too: attention is the slower end for some models."""
    profile = load_profile("iphone-15-pro")
    if not known:
        return profile
    attention = Quantity(0.5, "GFLOP/s", "compute", "a test", "2026-11", "derived")
    layer = Quantity(0.2, "ms", "time", "a test", "2026-11", "derived")
    units = {
        name: dataclasses.replace(unit, attention_compute=attention, layer_overhead=layer)
        for name, unit in profile.compute_units.items()
    }
    return dataclasses.replace(profile, compute_units=units)


@pytest.mark.parametrize("known", [False, True], ids=["", "attention and layers"])
@pytest.mark.parametrize("end", ["value", "low"])
@pytest.mark.parametrize("runtime", ["coreml", "onnx"])
@pytest.mark.parametrize("line", LINES)
def test_lines_hold_exactly_where_the_estimate_does(line: str, runtime: str, end: End, known: bool) -> None:
    rng = random.Random(f"{line}{runtime}{end}")
    profile = _phone(known)
    seen = set()
    for _ in range(300):
        packed, static = rng.random() < 0.7, rng.random() < 0.3
        workload = random_workload(rng, packed, static)
        prompt, context = rng.choice([1, 100, 3000]), rng.choice([256, 2048])
        metrics = estimate(profile, workload, prompt, context, runtime).metrics
        found = metrics[LINES[line] or line.split()[0]]
        worst = found.low if found.name.startswith("tokens") else found.high
        judged = found.value if end == "value" or worst is None else worst
        assert judged is not None
        (budget,) = parse_budgets([line.format(f"{judged * rng.uniform(0.7, 1.4):.9f}")])
        loaded = workload.with_float32_weights() if runtime == "onnx" else workload
        place = _place(runtime, prompt, context, packed, static, end)
        limits = headroom(profile, [budget], dataclasses.replace(place, apart=workload.weights_apart))
        held = all(limit.of(cost_of(workload, loaded)) <= limit.bound for limit in limits)
        assert held == budget.holds(judged), (budget, judged)
        seen.add(held)
    assert len(seen) == 2


def test_a_device_says_nothing_about_quality() -> None:
    budgets = parse_budgets(["kl_nats_per_token <= 0.1"])
    with pytest.raises(RecipeError, match="a device says nothing about quality"):
        headroom(load_profile("iphone-15-pro"), budgets, Place("coreml", 32_000, 128, 2048))


def test_loading_needs_a_known_storage() -> None:
    profile = dataclasses.replace(load_profile("iphone-15-pro"), storage=None)
    with pytest.raises(RecipeError, match="has no storage"):
        headroom(profile, parse_budgets(["load_seconds <= 2s"]), Place("coreml", 32_000, 128, 2048))
