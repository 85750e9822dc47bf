from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dwindle.devices.cost_model import METRIC_UNITS, estimate
from dwindle.devices.device_profile import load_profile
from dwindle.devices.memory_cost import MEMORY_COSTS, resident_weight_bytes
from dwindle.devices.workload import LayerLoad, Workload
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.report import Artifact

LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
         "tie_word_embeddings": False}  # fmt: skip


def test_roofline_by_hand(toaster: Path, artifact: Artifact) -> None:
    """10 MB, and 100 kB of cache, at half of 10 GB/s, and 1 ms."""
    metrics = estimate(load_profile(toaster), Workload.from_artifact(artifact), prompt_tokens=100).metrics
    seconds = 10.1e6 / 5e9 + 1e-3
    assert metrics["tokens_per_second"].value == pytest.approx(1 / seconds)
    assert metrics["tokens_per_second_sustained"].value == pytest.approx(0.5 / seconds)
    assert metrics["time_to_first_token_seconds"].value == pytest.approx(2 * 16.5e6 * 100 / 100e9 + 1e-3)
    held = resident_weight_bytes(Workload.from_artifact(artifact), "onnx")
    memory = max(held.loading[1], held.running[1] + 2 * 4 * 100 * 1000) + 512 * 1000 + 14e6
    assert metrics["peak_memory_bytes"].value == pytest.approx(memory)
    assert metrics["package_bytes"].value == 10_100_000
    assert metrics["package_bytes"].basis == "measured"
    assert set(metrics) == set(METRIC_UNITS)
    assert metrics["load_seconds"].value is None
    for name, metric in metrics.items():
        if name not in ("package_bytes", "load_seconds"):
            assert metric.basis == "estimated"
            assert metric.low is not None
            assert metric.high is not None
            assert metric.value is not None
            assert metric.low < metric.value < metric.high, name


def test_a_short_prompt_still_streams_the_weights(toaster: Path, artifact: Artifact) -> None:
    metrics = estimate(load_profile(toaster), Workload.from_artifact(artifact), prompt_tokens=1).metrics
    assert metrics["time_to_first_token_seconds"].value == pytest.approx(10e6 / 5e9 + 1e-3)


@pytest.mark.parametrize(
    ("device", "low", "high"),
    [("iphone-15-pro", 57 * 0.85, 57 * 1.15), ("raspberry-pi-5", 8, 12)],
    ids=["TinyLlama on A17 Pro, published 57", "TinyLlama on Pi 5, published 8 to 12"],
)
def test_published_rates(device: str, low: float, high: float) -> None:
    workload = Workload.from_config(LLAMA, 4.64)
    assert workload.weight_bytes == pytest.approx(0.637e9, rel=0.01)
    value = estimate(load_profile(device), workload).metrics["tokens_per_second"].value
    assert value is not None
    assert low < value < high


def test_untied_embedding_is_looked_up(artifact: Artifact) -> None:
    tied = Workload.from_artifact(artifact)
    assert tied.streamed_bytes == 10_000_000
    layers = {**artifact.details["layers"], "lm_head": {"bits": 4, "bytes": 250_000, "parameters": 500_000}}
    untied = Workload.from_artifact(replace(artifact, details={**artifact.details, "layers": layers}))
    assert untied.streamed_bytes == 8_250_000
    assert untied.weight_bytes == 10_250_000
    assert untied.multiply_accumulates == 16_500_000


def test_core_ml_is_not_estimated_for_android(artifact: Artifact) -> None:
    found = estimate(load_profile("pixel-9"), Workload.from_artifact(replace(artifact, format="coreml")))
    assert found.metrics["tokens_per_second"].value is None
    assert found.metrics["package_bytes"].value == 10_100_000
    assert found.runtime is None
    assert "runs onnx, not coreml" in found.skipped[0].why


def test_onnx_reads_half_floats_as_float32(toaster: Path, artifact: Artifact) -> None:
    rows = {"w": {"bits": 16, "bytes": 2_000_000, "parameters": 1_000_000, "format": "float16"}}
    workload = Workload.from_artifact(replace(artifact, details={"layers": rows}))
    found = estimate(load_profile(toaster), workload, prompt_tokens=1).metrics
    assert found["tokens_per_second"].value == pytest.approx(1 / (4e6 / 5e9 + 1e-3))
    copies = MEMORY_COSTS["onnx"].floats_loading["linear"][1]
    assert found["peak_memory_bytes"].value == pytest.approx(copies * 4e6 + 14e6)
    phone = load_profile("iphone-15-pro")
    as_onnx = estimate(phone, workload, prompt_tokens=1).metrics["peak_memory_bytes"].low or 0
    as_core_ml = estimate(phone, replace(workload, format="coreml"), prompt_tokens=1).metrics["peak_memory_bytes"].low
    assert as_onnx - (as_core_ml or 0) == pytest.approx(MEMORY_COSTS["onnx"].floats_loading["linear"][0] * 4e6 - 2e6)


def test_any_float_is_converted_on_export(artifact: Artifact) -> None:
    """Norms of a bfloat16 checkpoint are no reason to refuse."""
    rows = {"model.norm": {"bits": 16, "bytes": 2, "parameters": 1, "format": "bfloat16"}}
    workload = Workload.from_artifact(replace(artifact, format="coreml", details={"layers": rows}))
    assert estimate(load_profile("iphone-15-pro"), workload).runtime == "coreml"


def test_refused_weight_formats_are_named(artifact: Artifact) -> None:
    palettes = {"a": {"bits": 4, "bytes": 1, "parameters": 2, "format": "palette4"}}
    workload = Workload.from_artifact(replace(artifact, details={"layers": palettes}))
    found = estimate(load_profile("pixel-9"), workload)
    assert "palette4: a" in found.skipped[0].why
    assert estimate(load_profile("iphone-15-pro"), replace(workload, format="coreml")).runtime == "coreml"
    assert (
        "palette3"
        in estimate(
            load_profile("iphone-15-pro"),
            Workload((LayerLoad("a", 8, 3, format="palette3"),), 0, 8, 8, 3, "coreai"),
        )
        .skipped[0]
        .why
    )


def test_onnx_on_an_iphone_runs_on_its_cpu(artifact: Artifact) -> None:
    found = estimate(load_profile("iphone-15-pro"), Workload.from_artifact(artifact))
    assert (found.runtime, found.unit) == ("onnx", "cpu")


def test_impossible_lengths(artifact: Artifact) -> None:
    workload, device = Workload.from_artifact(artifact), load_profile("pixel-9")
    with pytest.raises(RecipeError, match="at least 1"):
        estimate(device, workload, prompt_tokens=0)
    with pytest.raises(RecipeError, match="more than the 512"):
        estimate(device, workload, context=513)


def test_details_without_layers(artifact: Artifact) -> None:
    with pytest.raises(RecipeError, match="name no layers"):
        Workload.from_artifact(replace(artifact, details={}))
    with pytest.raises(RecipeError, match=r"a \(bytes\), b \(parameters\)"):
        Workload.from_artifact(replace(artifact, details={"layers": {"a": {"parameters": 1}, "b": {"bytes": 1}}}))


def test_config_that_is_no_decoder() -> None:
    with pytest.raises(UnsupportedModel, match="missing hidden_size, vocab_size"):
        Workload.from_config({k: v for k, v in LLAMA.items() if k not in ("hidden_size", "vocab_size")})
    with pytest.raises(UnsupportedModel, match="1 FFN widths for 22 layers"):
        Workload.from_config(LLAMA | {"intermediate_size": [4]})


def test_config_with_a_width_per_layer_and_tied_default() -> None:
    even = Workload.from_config(LLAMA)
    uneven = Workload.from_config(LLAMA | {"intermediate_size": [5632] * 21 + [32]})
    assert even.weight_bytes - uneven.weight_bytes == 2 * 3 * 2048 * 5600
    gemma = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"} | {"model_type": "gemma2"}
    assert not any(layer.name == "lm_head" for layer in Workload.from_config(gemma).layers)


UNPACKING = "{value: 20, unit: GFLOP/s, source: a test, date: 2026-11, trust: measured}"
STORAGE = "{value: 1, unit: GB/s, source: a test, date: 2026-11, trust: measured}"


@pytest.fixture
def slow_toaster(toaster: Path) -> Path:
    """The toaster with a disk of 1 GB/s, that unpacks 10 billion weights a second."""
    text = toaster.read_text().replace("    overhead:", f"    decode_compute: {UNPACKING}\n    overhead:")
    toaster.write_text(text.replace("compute_units:", f"storage: {STORAGE}\ncompute_units:"))
    return toaster


def test_unpacking_is_a_floor_under_decode(slow_toaster: Path, artifact: Artifact) -> None:
    """16 million int4 weights at 10 billion a second and their 8 MB at 5 GB/s take 1.6 ms; at half that rate, 3.2."""
    workload = Workload.from_artifact(artifact)
    unit = load_profile(slow_toaster).compute_units["cpu"].decode_compute
    assert unit is not None
    reading = estimate(load_profile(slow_toaster), workload, prompt_tokens=1)
    assert reading.metrics["tokens_per_second"].value == pytest.approx(1 / (10e6 / 5e9 + 1e3 / 5e9 + 1e-3))
    text = slow_toaster.read_text().replace("{value: 20, unit: GFLOP/s", "{value: 10, unit: GFLOP/s")
    slow_toaster.write_text(text)
    unpacking = estimate(load_profile(slow_toaster), workload, prompt_tokens=1)
    assert unpacking.metrics["tokens_per_second"].value == pytest.approx(1 / (3.6e-3 + 1e3 / 5e9 + 1e-3))
    assert unpacking.metrics["time_to_first_token_seconds"].value == pytest.approx(3.6e-3 + 1e-3)
    assert [layer.seconds for layer in unpacking.layers] == pytest.approx([3.2e-3, 2e6 / 5e9])
    assert [layer.seconds for layer in reading.layers] == pytest.approx([8e6 / 5e9, 2e6 / 5e9])


def test_a_plain_graph_copies_its_cache(toaster: Path, artifact: Artifact) -> None:
    """Past read, present written, present read: three times 100 kB; and it holds two of them."""
    plain = replace(artifact, details={**artifact.details, "runtime": {"operators": "plain"}})
    metrics = estimate(load_profile(toaster), Workload.from_artifact(plain), prompt_tokens=100).metrics
    assert metrics["tokens_per_second"].value == pytest.approx(1 / (10.3e6 / 5e9 + 1e-3))
    fused = estimate(load_profile(toaster), Workload.from_artifact(artifact), prompt_tokens=100).metrics
    more = (metrics["peak_memory_bytes"].value or 0) - (fused["peak_memory_bytes"].value or 0)
    assert more == pytest.approx(512 * 1000)


def test_eight_bits_are_two_products_of_four(slow_toaster: Path) -> None:
    """16 million int8 weights: twice 1.6 ms of unpacking, and two more sets of logits than one product makes."""
    layers = {"lm_head": {"bits": 8, "bytes": 16_000_000, "parameters": 16_000_000, "format": "int8"}}
    text = (
        slow_toaster.read_text()
        .replace("[float32, int4]", "[float32, int4, int8]")
        .replace("value: 10, unit: GB/s", "value: 99, unit: GB/s")
    )
    slow_toaster.write_text(text)
    details = {"layers": layers, "context_length": 512, "vocabulary": 1000}
    artifact = Artifact("onnx", "export/onnx", 16_000_000, "0" * 64, details=details)
    found = estimate(load_profile(slow_toaster), Workload.from_artifact(artifact), prompt_tokens=100)
    assert found.layers[0].seconds == pytest.approx(3.2e-3)
    assert found.metrics["peak_memory_bytes"].value == pytest.approx(
        MEMORY_COSTS["onnx"].packed["head"][1] * 16e6 + 3 * 4 * 100 * 1000 + 14e6
    )
    rounded = replace(artifact, details={**details, "runtime": {"activations": "int8"}})
    found = estimate(load_profile(slow_toaster), Workload.from_artifact(rounded), prompt_tokens=100)
    assert found.layers[0].seconds == pytest.approx(1.6e-3)


def test_floats_are_not_unpacked() -> None:
    assert LayerLoad("a", 100, 400, format="float32").packed_parameters == 0
    assert LayerLoad("a", 100, 50, format="palette4").packed_parameters == 100
    assert LayerLoad("a", 100, 50, streamed=False, format="palette4").packed_parameters == 0
    assert (LayerLoad("a", 100, 200).packed_parameters, LayerLoad("a", 100, 60).packed_parameters) == (0, 100)


@pytest.mark.parametrize("device", ["iphone-15-pro", "pixel-9", "mac-m4"])
def test_layers_cache_and_overhead_sum_to_a_token(device: str) -> None:
    found = estimate(load_profile(device), Workload.from_config(LLAMA, 4.5), prompt_tokens=512)
    assert len(found.layers) == 24
    assert found.cache is not None
    assert found.overhead is not None
    parts = (*found.layers, found.cache, found.overhead)
    rate = found.metrics["tokens_per_second"]
    for end, whole in (("seconds", rate.value), ("low", rate.high), ("high", rate.low)):
        assert sum(getattr(part, end) for part in parts) == pytest.approx(1 / (whole or 0)), end
    assert all(part.low < part.seconds < part.high for part in parts if part.name != "model.embed_tokens")
    looked_up = next(layer for layer in found.layers if layer.name == "model.embed_tokens")
    assert looked_up.seconds == 0


def test_load_time_is_package_then_copies(slow_toaster: Path, artifact: Artifact) -> None:
    """10.1 MB from a disk of 1 GB/s, what is held of 10 MB at 5 GB/s, 0.1 s for the runtime."""
    held = resident_weight_bytes(Workload.from_artifact(artifact), "onnx").loading[1]
    load = estimate(load_profile(slow_toaster), Workload.from_artifact(artifact)).metrics["load_seconds"]
    assert load.value == pytest.approx(10.1e6 / 1e9 + held / 5e9 + 0.1)
    assert (load.low or 0) < (load.value or 0) < (load.high or 0)


def test_attention_counts_in_a_long_prompt(toaster: Path) -> None:
    workload = Workload((LayerLoad("a", 10**6, 4 * 10**6, format="float32"),), 0, 8192, 10, 1, "onnx", 4096)
    short, long = (
        estimate(load_profile(toaster), workload, prompt_tokens=n).metrics["time_to_first_token_seconds"].value
        for n in (1000, 4000)
    )
    assert short == pytest.approx((2 * 1e6 * 1000 + 2 * 1000**2 * 4096) / 100e9 + 1e-3)
    assert long == pytest.approx((2 * 1e6 * 4000 + 2 * 4000**2 * 4096) / 100e9 + 1e-3)
    assert Workload.from_config(LLAMA).attention_width == 22 * 2048


def test_attention_width_is_read_off_the_query_projections(artifact: Artifact) -> None:
    rows = {
        **artifact.details["layers"],
        "model.layers.0.self_attn.q_proj": {"bits": 4, "bytes": 125_000, "parameters": 250_000, "format": "int4"},
    }
    assert Workload.from_artifact(artifact).attention_width == 0
    found = Workload.from_artifact(replace(artifact, details={**artifact.details, "layers": rows}))
    assert found.attention_width == 500
    told = replace(artifact, details={**artifact.details, "attention_width": 7})
    assert Workload.from_artifact(told).attention_width == 7


def test_static_shapes_read_the_whole_cache(artifact: Artifact) -> None:
    fixed = replace(artifact, details={**artifact.details, "runtime": {"shapes": "static"}})
    profile = load_profile("pixel-9")
    free, static = (estimate(profile, Workload.from_artifact(a), prompt_tokens=8).cache for a in (artifact, fixed))
    assert free is not None
    assert static is not None
    assert (free.bytes, static.bytes) == (8_000, 512_000)


def _with(toaster: Path, lines: str) -> Path:
    """The toaster, of whose processor more is known."""
    toaster.write_text(toaster.read_text().replace("    overhead:", f"{lines}    overhead:"))
    return toaster


def _known(name: str, value: float, unit: str, more: str = "") -> str:
    return f"    {name}: {{value: {value}, unit: {unit}, source: a test, date: 2026-11, trust: measured{more}}}\n"


def test_attention_is_a_floor_under_the_cache(toaster: Path, artifact: Artifact) -> None:
    """100 tokens x 4 x 3,000 operations at 0.6 GFLOP/s take 2 ms, their 100 kB at 5 GB/s only 20 us."""
    workload = replace(Workload.from_artifact(artifact), attention_width=3000)
    profile = load_profile(_with(toaster, _known("attention_compute", 0.6, "GFLOP/s")))
    slow = estimate(profile, workload, prompt_tokens=100)
    assert slow.cache is not None
    assert slow.cache.seconds == pytest.approx(2e-3)
    assert slow.metrics["tokens_per_second"].value == pytest.approx(1 / (10e6 / 5e9 + 2e-3 + 1e-3))
    unknown = estimate(profile, replace(workload, attention_width=0), prompt_tokens=100)
    assert unknown.cache is not None
    assert unknown.cache.seconds == pytest.approx(0.1e6 / 5e9)


def test_each_layer_adds_its_overhead(toaster: Path) -> None:
    """22 layers of 0.1 ms on top of 1 ms: on every token, the first one, too."""
    profile = load_profile(_with(toaster, _known("layer_overhead", 0.1, "ms")))
    workload = replace(Workload.from_config(LLAMA), depth=0)
    assert Workload.from_config(LLAMA).depth == 22
    found, flat = (estimate(profile, w, prompt_tokens=100) for w in (replace(workload, depth=22), workload))
    assert found.overhead is not None
    assert (found.overhead.seconds, found.overhead.high) == pytest.approx((3.2e-3, 3.2e-3 * 1.1))
    for name in ("tokens_per_second", "time_to_first_token_seconds"):
        ours, theirs = (e.metrics[name].value or 0 for e in (found, flat))
        spent = 1 / ours - 1 / theirs if name == "tokens_per_second" else ours - theirs
        assert spent == pytest.approx(2.2e-3), name


def test_weights_that_a_cache_holds_are_read_at_its_rate(toaster: Path) -> None:
    """Ten million float32 weights fit into 50 MB and are read at 20 GB/s; twenty million are read at half of 10."""
    cache = _known("cache", 50, "MB", ", low: 30, high: 100") + _known("cache_bandwidth", 20, "GB/s")
    profile = load_profile(_with(toaster, cache))

    def read(weights: int) -> tuple[float, float, float, float]:
        layer = LayerLoad("a", weights, 4 * weights, format="float32")
        found = estimate(profile, Workload((layer,), 0, 64, 10, 1, "onnx"), prompt_tokens=1)
        (time,) = found.layers
        return time.seconds, time.low, time.high, found.reading_seconds

    assert read(10**7) == pytest.approx((40e6 / 20e9, 40e6 / 22e9, 40e6 / (5e9 * 0.81), 40e6 / 20e9))
    assert read(2 * 10**7) == pytest.approx((80e6 / 5e9, 80e6 / 22e9, 80e6 / (5e9 * 0.81), 80e6 / 5e9))


def test_depth_is_read_off_the_names(artifact: Artifact) -> None:
    assert Workload.from_artifact(artifact).depth == 1
    told = replace(artifact, details={**artifact.details, "depth": 7})
    assert Workload.from_artifact(told).depth == 7
