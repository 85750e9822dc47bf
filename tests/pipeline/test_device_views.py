from __future__ import annotations

from dataclasses import replace

import pytest

from dwindle.devices import Workload, estimate, load_profile
from dwindle.pipeline.device_views import device_views
from dwindle.report import Artifact, Report, TargetVerdict

LAYERS = {
    "model.embed_tokens": {"bits": 8, "bytes": 20_000, "parameters": 20_000, "format": "int8"},
    "model.layers.0.self_attn.q_proj": {"bits": 4.5, "bytes": 5_625_000, "parameters": 10_000_000, "format": "int4"},
    "model.norm": {"bits": 16, "bytes": 200_000, "parameters": 100_000, "format": "float16"},
}
ARTIFACT = Artifact("onnx", "export/onnx", 6_000_000, "ab" * 32, None, "onnx", details={
    "layers": LAYERS, "context_length": 300, "vocabulary": 200, "kv_bytes_per_token": 4096, "tied": False})  # fmt: skip


def report(*names: str) -> Report:
    return Report(artifacts=(ARTIFACT,), targets=tuple(TargetVerdict(name, ()) for name in names))


def test_a_split_sums_to_the_estimate() -> None:
    views = device_views(report("pixel-9", "raspberry-pi-5"))
    for split, name in zip(views.splits, ("pixel-9", "raspberry-pi-5"), strict=True):
        rate = estimate(load_profile(name), Workload.from_artifact(ARTIFACT)).metrics["tokens_per_second"].value
        assert split.total == pytest.approx(1 / rate)
        assert min(split.weights, split.unpacking, split.cache, split.overhead) >= 0
        assert split.label == f"{load_profile(name).title}, onnx (onnx)"
    assert views.splits[0].unpacking == 0
    slow = dict(LAYERS, big={"bits": 0.8, "bytes": 1_000_000, "parameters": 10_000_000, "format": "int2"})
    unpacked = replace(ARTIFACT, details={**ARTIFACT.details, "layers": slow})
    assert device_views(replace(report("pixel-9"), artifacts=(unpacked,))).splits[0].unpacking > 0


def test_memory_is_the_estimate_at_each_context() -> None:
    views = device_views(report("pixel-9"))
    (curve,) = views.curves
    assert [point[0] for point in curve.points] == [64, 128, 256, 300]
    for tokens, low, value, high in curve.points:
        held = estimate(load_profile("pixel-9"), Workload.from_artifact(ARTIFACT), context=tokens).metrics
        assert value == held["peak_memory_bytes"].value
        assert low < value < high
    assert views.limits[0].bytes == 6e9


def test_what_cannot_be_estimated_is_said_and_host_is_not_measured() -> None:
    views = device_views(report("host", "my-own-phone"))
    assert views.splits == views.curves == views.limits == ()
    assert views.left_out == ("host: measured, not estimated", "my-own-phone: the profile is not known here")
    bare = replace(report("pixel-9"), artifacts=(replace(ARTIFACT, details={}),))
    assert device_views(bare).splits == ()
