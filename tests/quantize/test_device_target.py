from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dwindle.devices import LayerLoad, Workload, estimate, load_profile
from dwindle.errors import DoesNotFit, RecipeError
from dwindle.quantize.device_target import CONTEXT_TOKENS, device_target
from dwindle.quantize.options import QuantizeOptions


@pytest.fixture
def anatomy(tiny_bundle: Callable[..., Any]) -> Any:
    return replace(tiny_bundle().anatomy, layers=26, kv_heads=8, head_dim=128, vocab=49_152, context=8192)


@pytest.mark.parametrize(("name", "scheme"), [("iphone-15-pro", "palettize"), ("pixel-9", "integer")])
def test_a_model_of_the_target_peaks_at_the_memory_of_an_app(name: str, scheme: Any, anatomy: Any) -> None:
    profile = load_profile(name)
    found = device_target(profile, anatomy, QuantizeOptions(scheme=scheme), context=2048)
    kv_bytes = 2 * anatomy.layers * anatomy.kv_heads * anatomy.head_dim * 2
    weights = anatomy.vocab * anatomy.width
    table = LayerLoad("model.embed_tokens", weights, weights + 2 * anatomy.vocab, anatomy.tied, "int8")
    ends = (table,) if anatomy.tied else (table, replace(table, name="lm_head", streamed=True))
    rest = found.target_bytes - sum(end.bytes for end in ends)
    linears = LayerLoad("decoder", 2 * rest, rest, format="palette4" if scheme == "palettize" else "int4")
    workload = Workload((linears, *ends), kv_bytes, anatomy.context, anatomy.vocab, found.target_bytes)
    peak = estimate(profile, workload, context=2048, runtime=found.runtimes[0]).metrics["peak_memory_bytes"].value
    assert peak == pytest.approx(profile.memory.default.at(), rel=1e-6)


def test_bits_are_those_of_runtime_and_device(anatomy: Any) -> None:
    phone = load_profile("iphone-15-pro")
    assert device_target(phone, anatomy, QuantizeOptions()).allowed_bits == (1, 2, 3, 4, 6, 8)
    assert device_target(phone, anatomy, QuantizeOptions(allowed_bits=(2, 3))).allowed_bits == (2, 3)
    assert device_target(phone, anatomy, QuantizeOptions(scheme="integer")).allowed_bits == (4, 8)
    both = device_target(phone, anatomy, QuantizeOptions(runtimes=("coreml", "coreai-engine")))
    assert (both.runtimes, both.allowed_bits) == (("coreml", "coreai-engine"), (2, 4, 6, 8))


def test_the_explanation_adds_up_and_the_context_is_stated(anatomy: Any) -> None:
    phone = load_profile("iphone-15-pro")
    lines = "\n".join(device_target(phone, anatomy, QuantizeOptions()).explanation)
    for said in ("iPhone 15 Pro", "3.50 GB that one app may use", f"KV cache of {CONTEXT_TOKENS:,} tokens", "between"):
        assert said in lines
    short = device_target(phone, replace(anatomy, context=512), QuantizeOptions())
    assert "KV cache of 512 tokens" in "\n".join(short.explanation)


def test_a_scheme_the_device_does_not_run_is_refused(anatomy: Any) -> None:
    with pytest.raises(RecipeError, match=r"Raspberry Pi 5.* cannot carry scheme=palettize: onnx takes .*int4"):
        device_target(load_profile("raspberry-pi-5"), anatomy, QuantizeOptions())
    with pytest.raises(RecipeError, match=r"coreml does not run there\. It runs onnx"):
        device_target(load_profile("pixel-9"), anatomy, QuantizeOptions(runtimes=("coreml",)))
    with pytest.raises(RecipeError, match=r"allowed_bits=\[3\]"):
        device_target(load_profile("pixel-9"), anatomy, QuantizeOptions(scheme="integer", allowed_bits=(3,)))


def test_runtimes_without_common_bits_are_refused(anatomy: Any) -> None:
    phone = load_profile("iphone-15-pro")
    only = {**phone.runtimes, "coreai": replace(phone.runtimes["coreai"], weight_formats=("palette2", "palette4"))}
    narrow = {**only, "coreml": replace(phone.runtimes["coreml"], weight_formats=("palette3",))}
    with pytest.raises(RecipeError, match=r"no bits are carried by all runtimes .*coreml takes 3; coreai takes 2, 4"):
        device_target(replace(phone, runtimes=narrow), anatomy, QuantizeOptions(runtimes=("coreml", "coreai-engine")))


def test_a_cache_that_fills_the_memory_does_not_fit(anatomy: Any) -> None:
    with pytest.raises(DoesNotFit, match=r"leaves no memory for weights.* Lower the context"):
        device_target(load_profile("iphone-15-pro"), replace(anatomy, context=10**6), QuantizeOptions(), 10**5)


@pytest.mark.parametrize("context", [0, 8193])
def test_a_context_the_model_does_not_take_is_refused(context: int, anatomy: Any) -> None:
    with pytest.raises(RecipeError, match="needed: 1 to 8,192"):
        device_target(load_profile("iphone-15-pro"), anatomy, QuantizeOptions(), context)
