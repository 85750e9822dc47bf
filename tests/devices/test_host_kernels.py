"""What this machine is measured with: models that are unlike a real one only in what is meant to be."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dwindle.devices import host_kernels
from dwindle.devices.board_runner import OnnxDecoder
from dwindle.devices.host_graphs import narrow_decoder, pairs, product_chain
from dwindle.devices.host_kernels import HostKernels, Reading, measure_kernels, taking_turns

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("level", [None, 1, 4], ids=["float", "4 bits", "4 bits, int8 activations"])
def test_no_two_matrices_are_alike_and_numbers_keep_their_size(level: int | None, tmp_path: Path) -> None:
    """Equal matrices would be packed once and shared; shrinking numbers would end as slow denormal ones."""
    import numpy as np

    graph = product_chain(pairs(64, 96, 12), level)
    tensors = [t for t in onnx.load_from_string(graph).graph.initializer if not t.name.endswith("scales")]
    assert len(tensors) == 24
    assert len({tensor.raw_data[:1024] for tensor in tensors}) == 24
    run = host_kernels._product(graph, 1)
    (y,) = run()
    assert y.shape == (1, 1, 64)
    assert 1e-3 < float(np.abs(y).mean()) < 1e3


def test_the_narrow_decoder_runs_as_artifacts_do(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(narrow_decoder(2))
    decoder = OnnxDecoder(tmp_path, 1, 40)
    assert decoder.shared
    first = decoder.step(list(range(32)))
    second = decoder.step([first])
    assert decoder.length == 33
    decoder.length = 32
    assert decoder.step([first]) == second
    decoder.reset()
    assert {decoder.step([i]) for i in range(20)} != {first}


def test_turns_are_fair_and_the_median_counts() -> None:
    """A clock of our own: one takes 3 s each time, one 1 s, but for a round in which everything takes 100 s."""
    now, calls = [0.0], {"slow": 0, "fast": 0}

    def work(name: str, seconds: float) -> Any:
        def once() -> None:
            calls[name] += 1
            now[0] += 100 if calls[name] == 4 else seconds

        return once

    found = taking_turns({"slow": work("slow", 3), "fast": work("fast", 1)}, lambda: now[0], block=0.0)
    assert found == {"slow": 3, "fast": 1}
    assert calls["slow"] == calls["fast"] == 2 + 2 * host_kernels._ROUNDS


def test_what_a_layer_and_a_token_of_the_cache_cost_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the seconds that a machine of known costs would take."""
    token, layer, each = 2e-3, 5e-4, 1e-6

    def took(works: dict[str, Any], clock: Any, **more: Any) -> dict[str, float]:
        shapes = {"shallow": (2, 16), "deep": (10, 16), "long": (10, 272)}
        known = {name: token + depth * (layer + length * each) for name, (depth, length) in shapes.items()}
        return {name: known.get(name, 0.5) for name in works}

    monkeypatch.setattr(host_kernels, "taking_turns", took)
    monkeypatch.setattr(host_kernels, "_product", lambda *given: None)
    monkeypatch.setattr(host_kernels, "product_chain", lambda *given: b"")
    found = measure_kernels(1)
    assert found is not None
    assert (found.token_seconds, found.layer_seconds) == pytest.approx((token, layer))
    assert found.attention_flops == pytest.approx(4 * 4 * 64 / each)
    assert [row.bytes for row in found.reading] == sorted(row.bytes for row in found.reading)
    assert found.read_bandwidth == found.reading[-1].bytes / 0.5
    assert found.cached() is None or found.reading[0].bytes_per_second > 1.3 * found.read_bandwidth


@pytest.mark.parametrize(
    ("rates", "fast", "between"),
    [((20, 22, 18, 12), 20, (3, 4)), ((30, 10, 10, 10), 30, (1, 2)), ((12, 12, 11, 11), None, None),
     ((9, 10, 12, 14), None, None)],
    ids=["a large cache", "a small one", "none that helps", "rates that rise"],
)  # fmt: skip
def test_a_cache_is_seen_by_what_is_read_faster(
    rates: tuple[float, ...], fast: float | None, between: tuple[float, float] | None
) -> None:
    reading = tuple(Reading(number, rate) for number, rate in enumerate(rates, 1))
    found = HostKernels(reading, 1, 1, 1, 1, 1, 1).cached()
    assert found == (None if fast is None else (fast, between))


def test_rates_in_any_order_name_no_size_that_was_not_measured() -> None:
    rng = random.Random(1)
    for _ in range(300):
        reading = tuple(Reading(number, rng.uniform(1, 3)) for number in range(1, 5))
        found = HostKernels(reading, 1, 1, 1, 1, 1, 1).cached()
        if found is not None:
            rate, (fitting, over) = found
            assert rate > reading[-1].bytes_per_second
            assert over == fitting + 1
