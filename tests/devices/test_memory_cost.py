"""How often a runtime holds a weight, and what the peak is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dwindle.devices.cost_model import estimate
from dwindle.devices.device_profile import load_profile
from dwindle.devices.memory_cost import MEMORY_COSTS, resident_weight_bytes
from dwindle.devices.workload import WEIGHTS_APART_ABOVE_BYTES, LayerLoad, Workload


def _weights(tied: bool, form: str, apart: bool | None = None) -> Workload:
    """A million weights in linears, half as many in an embedding and, where it is not tied, in a head."""
    each = {"int4": 0.5, "float16": 2, "float32": 4}[form]
    table = LayerLoad("model.embed_tokens", 500_000, int(500_000 * each), tied, form)
    ends = (table,) if tied else (table, replace(table, name="lm_head", streamed=True))
    linears = LayerLoad("model.layers.0.mlp.up_proj", 10**6, int(10**6 * each), format=form)
    return Workload((linears, *ends), 0, 64, 10, 1, "onnx", apart=apart)


def test_weights_are_held_as_often_as_their_use_has_it() -> None:
    cost = MEMORY_COSTS["onnx"]
    for form, wide, running, loading in (("int4", 0.5, cost.packed, cost.packed),
                                         ("float16", 4, cost.floats, cost.floats_loading)):  # fmt: skip
        for tied, ends in ((True, ("shared",)), (False, ("embedding", "head"))):
            held = resident_weight_bytes(_weights(tied, form), "onnx")
            for found, copies in ((held.running, running), (held.loading, loading)):
                tables = [sum(copies[use][end] for use in ends) for end in range(3)]
                wanted = [wide * (10**6 * copies["linear"][end] + 500_000 * tables[end]) for end in range(3)]
                assert found == pytest.approx(wanted), (form, tied)
    mapped = resident_weight_bytes(_weights(True, "float16", apart=True), "onnx")
    assert mapped.loading == mapped.running
    assert resident_weight_bytes(_weights(False, "float16"), "coreml").running[1] == pytest.approx(1.25 * 4e6)


def test_logits_find_their_place_in_what_loading_frees() -> None:
    """Floats of the graph's file peak while they are loaded; logits count only once they are more than is freed."""
    workload = replace(_weights(True, "float16"), vocabulary=1000, context_length=4096)
    peaks = [
        estimate(load_profile("laptop-ddr5"), workload, tokens).metrics["peak_memory_bytes"].value or 0
        for tokens in (1, 100, 1000)
    ]
    held = resident_weight_bytes(workload, "onnx")
    assert peaks[0] == peaks[1] == pytest.approx(held.loading[1] + 14e6)
    assert peaks[2] == pytest.approx(held.running[1] + 2 * 4 * 1000 * 1000 + 14e6)


def test_weights_lie_apart_from_the_size_on_that_the_exporter_has() -> None:
    from dwindle.export import ExportOptions

    assert ExportOptions().external_data_above_bytes == WEIGHTS_APART_ABOVE_BYTES
    large = LayerLoad("a", 10**9, WEIGHTS_APART_ABOVE_BYTES + 1)
    assert Workload((large,), 0, 64, 10, 1).weights_apart
    assert not Workload((replace(large, bytes=WEIGHTS_APART_ABOVE_BYTES),), 0, 64, 10, 1).weights_apart
    assert not Workload((large,), 0, 64, 10, 1, apart=False).weights_apart
