"""The search is exact, its plans hold, its predictions are those of the model that is then made."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle import prune, quantize
from dwindle.anatomy import anatomy_of
from dwindle.devices import DeviceProfile, Workload, estimate, load_profile
from dwindle.errors import DoesNotFit, RecipeError, UnsupportedModel
from dwindle.export.artefact import model_facts
from dwindle.prune.capacity import effective_parameters
from dwindle.prune.fit import fit
from dwindle.prune.fit_options import FitOptions
from dwindle.prune.fit_plan import FitPlan, worth
from dwindle.prune.fit_table import fit_table
from dwindle.prune.shape import Shape, shape_refusals
from dwindle.prune.stored_choices import storages
from dwindle.prune.stored_size import Storage, model_bytes, planned_workload
from dwindle.quantize.layer_plan import ModelShapes, plan_layers
from dwindle.report import Artifact
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

SMALL = {"vocab_size": 272, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 64,
         "tie_word_embeddings": True}  # fmt: skip


def config_of(model_type: str = "llama", **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**{**SMALL, "pad_token_id": None, **changes})


@pytest.fixture(scope="module")
def slow_phone() -> DeviceProfile:
    """An iPhone with a memory so slow that a model of 1 MB does 20 tokens/s."""
    profile = load_profile("iphone-15-pro")
    narrow = dataclasses.replace(profile.bandwidth, value=0.02, low=0.015, high=0.03)
    return dataclasses.replace(profile, bandwidth=narrow)


def planned(profile: DeviceProfile, budgets: dict[str, Any], config: Any = None, **options: Any) -> FitPlan:
    config = config_of() if config is None else config
    made = FitOptions("iphone-15-pro", budgets, **options)
    return fit(anatomy_of(config), config, profile, made, model="small", float_bits=32)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "gemma2", "olmo2"])
@pytest.mark.parametrize(
    "storage", [Storage("palettize", 4, 16), Storage("palettize", 2, 16), Storage("integer", 4, 32)]
)
@pytest.mark.parametrize("sizes", [(128, 320), (96, 172), (84, 100), (72, 1376)])
def test_stored_bytes_are_those_that_quantize_plans(model_type: str, storage: Storage, sizes: tuple[int, int]) -> None:
    config = config_of(model_type, hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=4,
                       tie_word_embeddings=model_type != "olmo2")  # fmt: skip
    anatomy = anatomy_of(config)
    shapes = ModelShapes.from_anatomy(anatomy, torch.float32 if storage.float_bits == 32 else torch.float16)
    scheme: Any = storage.scheme
    plan = plan_layers(shapes, quantize.QuantizeOptions(scheme=scheme, bits=int(storage.bits)))
    coded = sum(one.stored_bits(shapes.shapes[one.name]) for one in plan.layers)
    weights = sum(shapes.shapes[one.name][0] * shapes.shapes[one.name][1] for one in plan.layers)
    shape = Shape.of(anatomy)
    floats = (shape.parameters - weights) * storage.float_bits
    assert model_bytes(shape, storage) == -(-(coded + floats) // 8)


BUDGETS = [
    {"tokens_per_second": 20},
    {"tokens_per_second": 30, "package": "400KB"},
    {"package": "220KB"},
    {"tokens_per_second_sustained": 11, "memory": "45MB"},
    {"ttft": "60ms", "load_seconds": "0.6s"},
]


def every_shape(config: Any, options: FitOptions) -> list[tuple[Shape, bool]]:
    """All legal shapes, each with whether its width is turned; written without a look at the search."""
    full = Shape.of(anatomy_of(config))
    found = []
    for ffn, width, groups, layers in itertools.product(
        [*range(32, full.ffn_width, 32), full.ffn_width], [*range(32, full.width, 32), full.width],
        range(1, full.kv_heads + 1), range(1, full.layers + 1),
    ):  # fmt: skip
        turned = width < full.width and options.rotate is not False
        shape = dataclasses.replace(full, ffn_width=ffn, width=width, kv_heads=groups, heads=groups * 2, layers=layers,
                                    tied=full.tied and not turned)  # fmt: skip
        legal = (width, groups) == (full.width, full.kv_heads) or not shape_refusals(shape, config)
        if legal and (not turned or shape.parameters <= full.parameters):
            found.append((shape, turned))
    return found


@pytest.mark.parametrize("pessimistic", [False, True])
@pytest.mark.parametrize("runtime", ["coreml", "onnx"])
@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_the_search_finds_the_best_of_all_shapes(
    slow_phone: DeviceProfile, budgets: dict[str, Any], runtime: str, pessimistic: bool
) -> None:
    config = config_of(intermediate_size=300, num_hidden_layers=3)
    options = FitOptions("iphone-15-pro", budgets, runtime=runtime, pessimistic=pessimistic)
    limits = options.parsed_budgets()
    full = Shape.of(anatomy_of(config))
    best, fitting = 0.0, 0
    for storage in storages(slow_phone, runtime, None, 32):
        for shape, _ in every_shape(config, options):
            workload = planned_workload(shape, storage, 64, 4 if runtime == "onnx" else 2, False)
            metrics = estimate(slow_phone, workload, 64, 64, runtime).metrics
            if all(limit.holds(worth(metrics[limit.metric], pessimistic)) for limit in limits):
                fitting += 1
                best = max(best, effective_parameters(shape, full, storage.code_bits))
    assert fitting
    plan = planned(slow_phone, budgets, config, runtime=runtime, pessimistic=pessimistic, prompt_tokens=64)
    assert plan.chosen.effective_parameters == pytest.approx(best, rel=1e-12)
    assert all(candidate.holds for candidate in plan.candidates)


@pytest.mark.parametrize("memory", ["14.9MB", "15.05MB"])
def test_the_best_is_found_on_either_side_of_weights_apart(
    slow_phone: DeviceProfile, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats that lie apart load in less memory: a model just above that size may fit where a smaller one does not."""
    above = 700_000
    for module in ("dwindle.devices.workload", "dwindle.prune.fit"):
        monkeypatch.setattr(f"{module}.WEIGHTS_APART_ABOVE_BYTES", above)
    config = config_of(intermediate_size=300, num_hidden_layers=3)
    options = FitOptions("iphone-15-pro", {"memory": memory}, runtime="onnx")
    (limit,) = options.parsed_budgets()
    full = Shape.of(anatomy_of(config))
    monkeypatch.setattr("dwindle.prune.fit.storages", lambda *_: (Storage("float", 32, 32),))
    worths, refused = {}, []
    for shape, _ in every_shape(config, options):
        workload = planned_workload(shape, Storage("float", 32, 32), 64, 4, False)
        peak = estimate(slow_phone, workload, 64, 64, "onnx").metrics["peak_memory_bytes"].value or 0
        if limit.holds(peak):
            worths[effective_parameters(shape, full, 32)] = workload.weights_apart
        elif not workload.weights_apart:
            refused.append(workload.weight_bytes)
    plan = planned(slow_phone, {"memory": memory}, config, runtime="onnx", prompt_tokens=64)
    assert plan.chosen.effective_parameters == pytest.approx(max(worths), rel=1e-12)
    assert refused
    assert worths[max(worths)] == (memory == "15.05MB")


def test_a_narrower_space_is_searched_exactly_too(slow_phone: DeviceProfile) -> None:
    plan = planned(slow_phone, {"package": "300KB"}, axes=("ffn", "layers"), bits=4)
    full = plan.full
    fitting = [
        effective_parameters(shape, full, 4)
        for ffn, layers in itertools.product(range(32, 321, 32), range(1, 5))
        for shape in [dataclasses.replace(full, ffn_width=ffn, layers=layers)]
        if model_bytes(shape, Storage("palettize", 4, 32)) <= 300_000
    ]
    assert plan.chosen.effective_parameters == pytest.approx(max(fitting))
    assert (plan.chosen.shape.width, plan.chosen.shape.kv_heads) == (full.width, full.kv_heads)


def test_runners_up_are_of_other_kinds(slow_phone: DeviceProfile) -> None:
    plan = planned(slow_phone, {"package": "300KB"})
    kinds = [candidate.kind for candidate in plan.candidates]
    assert kinds[0] == "best"
    assert len(set(kinds)) == len(kinds) == 6
    assert len({(c.shape, c.storage) for c in plan.candidates}) == 6
    assert all(c.effective_parameters <= plan.chosen.effective_parameters for c in plan.runners_up)
    assert "FFN alone" in kinds
    assert len(planned(slow_phone, {"package": "300KB"}, runners_up=1).runners_up) == 1


def test_the_same_question_has_the_same_answer(slow_phone: DeviceProfile) -> None:
    plans = [planned(slow_phone, {"package": "300KB"}).to_json() for _ in range(2)]
    assert json.dumps(plans[0]) == json.dumps(plans[1])


def calibration_of(bundle: Any) -> TokenSet:
    ids = torch.randint(0, 256, (6, 17), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


@pytest.mark.parametrize(
    ("model_type", "budgets", "options"),
    [
        ("llama", {"package": "300KB"}, {}),
        ("llama", {"package": "300KB"}, {"rotate": False, "bits": 8}),
        ("qwen3", {"tokens_per_second": 40}, {"bits": 8, "axes": ("ffn", "heads", "layers")}),
        ("gemma2", {"memory": "15.5MB", "package": "110KB"}, {"bits": 2.5}),
        ("olmo2", {"package": "200KB"}, {"runtime": "onnx", "axes": ("ffn", "width")}),
        ("phi3", {"package": "1.2MB"}, {"bits": 32}),
    ],
)
def test_the_model_that_is_made_is_the_one_that_was_predicted(
    tiny_bundle: Callable[..., Any], slow_phone: DeviceProfile, model_type: str, budgets: dict[str, Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    extra = {"query_pre_attn_scalar": 32, "sliding_window": 8} if model_type == "gemma2" else {}
    bundle = tiny_bundle(model_type, **{**SMALL, **extra, "head_dim": 16, "num_hidden_layers": 3})
    made = FitOptions("iphone-15-pro", budgets, **options)
    plan = fit(bundle.anatomy, bundle.model.config, slow_phone, made, model="small", float_bits=32)
    best = plan.chosen
    cut = best.prune_options(plan.full, plan.multiple)
    assert cut is not None
    small, _ = prune.run(bundle, prune.PruneOptions(**cut), calibration_of(bundle))
    assert small.size().parameters == best.shape.parameters
    assert dataclasses.replace(Shape.of(small.anatomy), model_type=best.shape.model_type) == best.shape
    stored = best.quantize_options(plan.runtime, plan.unit)
    if stored is not None:
        small, _ = quantize.run(small, quantize.QuantizeOptions(**stored))
    exact = not best.storage.mixed
    assert small.size().bytes == (best.bytes if exact else pytest.approx(best.bytes, rel=0.02))
    assert small.size().bytes <= best.bytes
    facts = model_facts(small, plan.context, 4 if plan.runtime == "onnx" else 2)
    workload = Workload.from_artifact(Artifact(plan.runtime, "small", small.size().bytes, "", details=facts))
    found = estimate(slow_phone, workload, plan.prompt_tokens, plan.context).metrics
    for name, metric in best.metrics.items():
        assert found[name].value == pytest.approx(metric.value, rel=1e-4 if exact else 0.02), name
    for budget in plan.budgets:
        assert budget.holds(found[budget.metric].value or 0), budget


@pytest.mark.parametrize("size", [32, 100, 172, 768, 1376, 11008, 23296])
def test_shares_name_every_size_exactly(slow_phone: DeviceProfile, size: int) -> None:
    plan = planned(slow_phone, {"package": "300KB"})
    full = dataclasses.replace(plan.full, ffn_width=size, width=size, kv_heads=8, heads=16, layers=size // 4)
    options = prune.PruneOptions()
    for kept in range(32, size, 32):
        shape = dataclasses.replace(full, ffn_width=kept, width=kept, kv_heads=1 + kept % 8, layers=1 + kept // 5)
        shares = dataclasses.replace(plan.chosen, shape=shape).prune_options(full, 32) or {}
        assert options.rounded(shares["ffn_keep"], size) == kept
        assert options.rounded(shares["width_keep"], size) == kept
        assert options.counted(shares.get("heads_keep", 1), 8) == shape.kv_heads
        assert options.counted(shares["layers_keep"], full.layers) == shape.layers


def test_a_model_that_fits_is_left_alone() -> None:
    plan = planned(load_profile("iphone-15-pro"), {"tokens_per_second": 30})
    assert plan.chosen.shape == plan.full
    assert plan.chosen.storage.scheme == "float"
    told = plan.to_json()
    assert (told["chosen"]["prune"], told["chosen"]["quantize"]) == (None, None)
    assert [next(iter(step)) for step in told["recipe"]["steps"]] == ["export", "validate"]


def test_memory_is_limited_to_what_an_app_may_use() -> None:
    plan = planned(load_profile("iphone-15-pro"), {"tokens_per_second": 30})
    assert {b.metric: b.limit for b in plan.budgets}["peak_memory_bytes"] == 3.5e9
    noted = planned(load_profile("iphone-15-pro"), {"memory": "4GB"})
    assert "more than the 3.50 GB" in noted.notes[0]
    assert "Note: peak_memory_bytes" in fit_table(noted)


def test_sizes_of_states_are_told_or_refused(slow_phone: DeviceProfile) -> None:
    odd = config_of(head_dim=16)
    assert "head_dim=16" in planned(slow_phone, {"package": "300KB"}, odd).notes[0]
    assert not planned(slow_phone, {"package": "300KB"}, odd, runtime="onnx").notes
    assert planned(slow_phone, {"package": "300KB"}, config_of(max_position_embeddings=100)).context == 96
    with pytest.raises(RecipeError, match="nearest: 32"):
        planned(slow_phone, {"package": "300KB"}, context=33)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_shapes_that_transformers_refuses_are_left_out(slow_phone: DeviceProfile, model_type: str) -> None:
    config = config_of(model_type, hidden_size=192, num_attention_heads=6, num_key_value_heads=6)
    for package in ("150KB", "250KB", "350KB"):
        for candidate in planned(slow_phone, {"package": package}, config).candidates:
            assert candidate.shape.width % candidate.shape.heads == 0


def test_the_table_says_what_binds(slow_phone: DeviceProfile) -> None:
    text = fit_table(planned(slow_phone, {"tokens_per_second": 30, "package": "9MB"}))
    (line,) = [line for line in text.splitlines() if "this one binds" in line]
    assert line.startswith("  tokens_per_second 30.")
    assert "a token reads" in line
    assert "bits" in text


def test_out_of_reach_names_the_smallest_and_what_it_misses(slow_phone: DeviceProfile) -> None:
    with pytest.raises(DoesNotFit, match=r"smallest reachable has [\d,]+ parameters .* misses tokens_per_second \d+"):
        planned(slow_phone, {"tokens_per_second": 490})
    with pytest.raises(DoesNotFit, match=r"4 layers, width 128, FFN 32, 4 KV groups.*package_bytes"):
        planned(slow_phone, {"package": "50KB"}, axes=("ffn",))


def test_a_mixture_of_experts_is_refused(slow_phone: DeviceProfile) -> None:
    config = config_of("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    with pytest.raises(UnsupportedModel, match="mixture of 4 experts"):
        planned(slow_phone, {"package": "300KB"}, config)


@pytest.mark.parametrize(
    ("budgets", "options", "match"),
    [
        ({}, {}, "no target is given"),
        ({"speed": 3}, {}, "speed is no metric"),
        ({"tokens_per_second": 0}, {}, "needed: a limit above 0"),
        ({"memory": "1GB"}, {"axes": ("depth",)}, "axis 'depth' is unknown"),
        ({"memory": "1GB"}, {"axes": ()}, "no axis may be cut"),
        ({"memory": "1GB"}, {"bits": -1}, "bits=-1"),
        ({"memory": "1GB"}, {"bits": 5}, None),
        ({"memory": "1GB"}, {"bits": 9}, "bits=9: coreml on iPhone 15 Pro .A17 Pro. carries 1, 2, 3, 4, 6, 8 bits"),
        ({"memory": "1GB"}, {"bits": 1.01}, "bits=1.01"),
        ({"memory": "1GB"}, {"bits": 3, "runtime": "coreai"}, None),
        ({"memory": "1GB"}, {"bits": 2.3, "runtime": "onnx"}, "carries 2, 4, 8 bits"),
        ({"memory": "1GB"}, {"runtime": "tflite"}, "no runtime 'tflite'"),
        ({"memory": "1GB"}, {"multiple": 24}, "multiple=24"),
        ({"memory": "1GB"}, {"context": 128}, "more than the 64 tokens"),
        ({"memory": "1GB"}, {"prompt_tokens": 0, "candidates": 0}, "prompt_tokens=0.*candidates=0"),
        ({"memory": "1GB"}, {"vocabulary": 272}, "cuts nothing"),
    ],
)
def test_bad_input(slow_phone: DeviceProfile, budgets: Any, options: dict[str, Any], match: str | None) -> None:
    if match is None:
        assert planned(slow_phone, budgets, **options).chosen.storage.mixed
        return
    with pytest.raises(RecipeError, match=match):
        planned(slow_phone, budgets, **options)


def test_a_family_that_cannot_be_turned_is_refused_or_cut_by_channels(slow_phone: DeviceProfile) -> None:
    config = config_of("gemma2")
    with pytest.raises(RecipeError, match="rotate cannot turn"):
        planned(slow_phone, {"package": "200KB"}, config, rotate=True)
    assert not any(c.rotated for c in planned(slow_phone, {"package": "200KB"}, config).candidates)


def test_a_runtime_without_8_bit_embeddings_stays_float(slow_phone: DeviceProfile) -> None:
    runtimes = {"coreml": dataclasses.replace(slow_phone.runtimes["coreml"], weight_formats=("float16", "palette4"))}
    profile = dataclasses.replace(slow_phone, runtimes=runtimes)
    assert {one.scheme for one in storages(profile, "coreml", None, 16)} == {"float"}
    with pytest.raises(RecipeError, match="no quantized weights, or 16"):
        storages(profile, "coreml", 4, 16)


@pytest.mark.slow
def test_a_large_teacher_is_planned_in_seconds() -> None:
    config = config_of(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                       num_key_value_heads=8, head_dim=128, vocab_size=128_256, max_position_embeddings=8192)  # fmt: skip
    start = time.process_time()
    plan = planned(load_profile("iphone-15-pro"), {"tokens_per_second": 10}, config)
    assert time.process_time() - start < (60 if sys.gettrace() is None else 600)  # coverage traces every line
    assert plan.chosen.holds
