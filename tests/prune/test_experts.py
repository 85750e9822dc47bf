"""Mixtures of experts: every axis cut out is the full model with the same things masked, and loads in stock loaders."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import anatomy_of, module
from dwindle.bundle import ModelBundle
from dwindle.errors import DoesNotFit, RecipeError, UnsupportedModel
from dwindle.prune import KeepPlan, PruneOptions, plan, run
from dwindle.prune.gradient_scores import gradient_axis_scores
from dwindle.prune.mixture import mixtures_of
from dwindle.prune.plan_table import plan_table
from dwindle.prune.planning import plan_from_scores
from dwindle.prune.rotation import principal_axes
from dwindle.prune.scores import activation_axis_scores, magnitude_axis_scores
from dwindle.prune.shape import Shape
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))
NARROW: dict[str, Any] = {"width_keep": 0.75, "rotate": False}
HALF: dict[str, Any] = {"heads_keep": 0.5, "width_keep": 0.5, "rotate": False}
AXES: dict[str, dict[str, Any]] = {
    "experts": {"experts_keep": 0.5},
    "expert width": {"expert_width_keep": 0.5},
    "both": {"experts_keep": 0.67, "expert_width_keep": 0.25},
    "ffn": {"ffn_keep": 0.5},
    "heads": {"heads_keep": 0.5},
    "width": NARROW,
    "heads and width": HALF,
    "depth": {"layers_keep": 0.6},
    "all": {"experts_keep": 0.5, "expert_width_keep": 0.5, "layers_keep": 0.6, **HALF},
    "all with ffn": {"ffn_keep": 0.5, "experts_keep": 0.5, "expert_width_keep": 0.5, "layers_keep": 0.6, **HALF},
}
IMPOSSIBLE = {
    "mixtral": ("ffn", "all with ffn"), "qwen3_moe": ("ffn", "all with ffn"), "qwen2_moe": ("heads", "width"),
}  # fmt: skip
"""Mixtral and Qwen 3 have no other FFN than the experts; heads of qwen2_moe fill the width."""
CASES = [(family, axis) for family in FAMILIES for axis in AXES if axis not in IMPOSSIBLE[family]]


def three_layers(tiny_bundle: Any, family: str, **overrides: Any) -> Any:
    return tiny_bundle(family, num_hidden_layers=3, **overrides)


def calibration_of(bundle: Any, windows: int = 6, tokens: int = 16) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def block_of(bundle: Any, layer: int) -> Any:
    held = module(bundle.model, bundle.anatomy.layer_path(layer))
    return held.block_sparse_moe if hasattr(held, "block_sparse_moe") else held.mlp


def down_of(bundle: Any, layer: int, expert: int) -> torch.Tensor:
    """The weight [D, F] of an expert's down projection, as either version of transformers holds it."""
    experts = block_of(bundle, layer).experts
    if hasattr(experts, "gate_up_proj"):
        return experts.down_proj.data[expert]
    return (experts[expert].w2 if hasattr(experts[expert], "w2") else experts[expert].down_proj).weight.data


def masked_router(router: Any, allowed: torch.Tensor) -> Any:
    """A hook after which a router cannot choose the others: their scores are -inf before the softmax."""

    def change(_: Any, __: Any, given: Any) -> Any:
        if not isinstance(given, tuple):
            return given.masked_fill(~allowed, -torch.inf)
        scores = given[0].masked_fill(~allowed, -torch.inf)
        weights, chosen = scores.float().softmax(-1).topk(router.top_k, -1)
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return scores, weights, chosen

    return router.register_forward_hook(change)


def mask(size: int, indices: Any, each: int = 1) -> torch.Tensor:
    found = torch.zeros(size, each)
    found[list(range(size) if indices is None else indices)] = 1
    return found.flatten()


@contextlib.contextmanager
def masked(bundle: Any, keep: KeepPlan, axes: torch.Tensor | None = None) -> Iterator[None]:
    """The full model with everything that the plan cuts set to zero where it arises, or kept from being chosen."""
    anatomy, model, hooks, zeroed = bundle.anatomy, bundle.model, [], []
    kept = {one.layer: one for one in keep.layers}
    turn = torch.diag(mask(anatomy.width, keep.channels)) if axes is None else axes[:, : keep.width].float()

    def narrowed(_: Any, __: Any, given: Any) -> Any:
        if isinstance(given, tuple):
            return (given[0] @ turn @ turn.T, *given[1:])
        return given @ turn @ turn.T

    def passes_on(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    def on_input(name: str, by: torch.Tensor) -> None:
        hooks.append(module(model, name).register_forward_pre_hook(lambda _, given: (given[0] * by,)))

    hooks.append(module(model, anatomy.embedding).register_forward_hook(narrowed))
    for layer in range(anatomy.layers):
        if layer not in kept:
            path = anatomy.layer_path(layer)
            hooks.append(module(model, path).register_forward_hook(passes_on, with_kwargs=True))
            continue
        parts, one, experts = anatomy.parts(layer), kept[layer], anatomy.experts_of(layer)
        on_input(
            parts["o"], mask(anatomy.kv_heads, one.kv_groups, anatomy.heads // anatomy.kv_heads * anatomy.head_dim)
        )
        hooks.append(module(model, parts["o"]).register_forward_hook(narrowed))
        if "down" in parts:
            on_input(parts["down"], mask(anatomy.ffn_width[layer], one.ffn_units))
        if experts is None:
            hooks.append(module(model, parts["down"]).register_forward_hook(narrowed))
            continue
        block = block_of(bundle, layer)
        hooks.append(block.register_forward_hook(narrowed))
        hooks.append(masked_router(block.gate, mask(experts.count, one.experts).bool()))
        for place, expert in enumerate(one.kept_experts(experts.count)):
            if one.expert_units is not None:
                weight = down_of(bundle, layer, expert)
                zeroed.append((weight, weight.clone()))
                weight *= mask(experts.width, one.expert_units[place])
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight, whole in zeroed:
            weight.copy_(whole)


def require_exact(bundle: Any, options: PruneOptions, keep: KeepPlan, folder: Path, axes: Any = None) -> Any:
    """The pruned model computes what the masked one does, has the predicted size, and loads anywhere unchanged."""
    from transformers import AutoModelForCausalLM

    before = logits_of(bundle.model)
    pruned, record = run(bundle, options, calibration_of(bundle), keep_plan=keep)
    with masked(bundle, keep, axes):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 1e-5
    assert (wanted - before).abs().max() > 0.01
    assert torch.equal(logits_of(bundle.model), before)
    assert record.after.parameters == keep.parameters_after == sum(p.numel() for p in pruned.model.parameters())
    assert record.before.parameters == keep.parameters_before
    assert record.after.bytes == 4 * keep.parameters_after
    assert KeepPlan.from_json(keep.to_json()) == keep
    pruned.save(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    loaded = ModelBundle.load(folder)
    for model in (stock, loaded.model):  # copied, because products round otherwise where a file put the weights
        assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(pruned.model))
    assert loaded.content_sha256 == pruned.content_sha256
    return pruned


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_the_pruned_model_is_the_masked_one(tiny_bundle: Any, tmp_path: Path, family: str, axis: str) -> None:
    bundle = three_layers(tiny_bundle, family)
    options = PruneOptions(**AXES[axis], multiple=8, compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned = require_exact(bundle, options, keep, tmp_path / "model")
    assert pruned.anatomy.layers == keep.after.layers
    found = [one for one in pruned.anatomy.experts if one is not None]
    assert {(one.count, one.width) for one in found} <= {(keep.after.experts, keep.after.expert_width)}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("normalized", [True, False])
def test_weights_of_the_chosen_normalized_or_not(
    tiny_bundle: Any, tmp_path: Path, family: str, normalized: bool
) -> None:
    bundle = three_layers(tiny_bundle, family, norm_topk_prob=normalized, num_experts_per_tok=3)
    options = PruneOptions(experts_keep=0.67, expert_width_keep=0.5, multiple=8, method="fisher", compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    require_exact(bundle, options, keep, tmp_path / "model")


@pytest.mark.parametrize("layers", [(0, 1), (1, 2), (0, 2), (0,), (1,)])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_layers_with_experts_and_without(
    tiny_bundle: Any, tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """Of three layers the second has experts; which are left is written out in the config."""
    bundle = three_layers(tiny_bundle, family, decoder_sparse_step=2, mlp_only_layers=None)
    assert [one is not None for one in bundle.anatomy.experts] == [False, True, False]
    options = PruneOptions(experts_keep=0.5, layers_keep=0.4, multiple=8, compensate=False)
    made = plan(bundle, options, calibration_of(bundle))
    every = {one.layer: one for one in plan(bundle, replace(options, layers_keep=1.0), calibration_of(bundle)).layers}
    keep = replace(made, layers=tuple(every[layer] for layer in layers), layer_scores=())
    pruned = require_exact(bundle, options, keep, tmp_path / "model")
    assert pruned.model.config.mlp_only_layers == [new for new, layer in enumerate(layers) if layer != 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_width_is_the_projected_one(tiny_bundle: Any, tmp_path: Path, family: str) -> None:
    bundle = three_layers(tiny_bundle, family)
    cut = {"heads_keep": 0.5, "width_keep": 0.5} if family == "qwen2_moe" else {"width_keep": 0.75}
    options = PruneOptions(**cut, experts_keep=0.5, rotate=True, multiple=8, compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    axes, _ = principal_axes(bundle, calibration_of(bundle), [one.layer for one in keep.layers])
    pruned = require_exact(bundle, options, keep, tmp_path / "model", axes)
    assert not pruned.anatomy.tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_checkpoint_has_the_predicted_bytes(tiny_bundle: Any, tmp_path: Path, family: str) -> None:
    bundle = tiny_bundle(family, storage_dtype=torch.bfloat16)
    options = PruneOptions(experts_keep=0.5, expert_width_keep=0.5, multiple=8, method="magnitude")
    keep = plan(bundle, options)
    pruned, record = run(bundle, options, keep_plan=keep)
    pruned.save(tmp_path / "model")
    header = 2 * keep.parameters_after
    assert record.after.bytes == header < (tmp_path / "model" / "model.safetensors").stat().st_size < header + 20_000


def test_heads_of_qwen2_moe_fill_its_width(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("qwen2_moe")
    with pytest.raises(RecipeError, match=r"4\.57 refuses qwen2_moe with hidden_size=32 and 2 heads of 8.*hidden_size "
                                          "16 with 2 heads, or hidden_size 32 with 4 heads"):  # fmt: skip
        plan(bundle, PruneOptions(heads_keep=0.5), calibration_of(bundle))


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_computed_as_the_model_does(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    for layer, mixture in mixtures_of(bundle).items():
        block, experts = block_of(bundle, layer), mixture.experts
        with torch.no_grad():
            wanted = block(states)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
            if experts.shared:
                wanted = wanted - block.shared_expert_gate(states).sigmoid() * block.shared_expert(states)
        found = mixture.masked_output(states, torch.ones(2, experts.count), torch.ones(2, experts.count, experts.width))
        assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_scores_by_hand(tiny_bundle: Any, family: str) -> None:
    """An expert: weight times length of its output, per token. Silencing its down projection shows its part."""
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle, windows=2)
    scores = activation_axis_scores(bundle, calibration)
    layer = 1
    seen: list[torch.Tensor] = []
    block = block_of(bundle, layer)
    hook = block.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    logits_of(bundle.model, calibration.ids)
    hook.remove()

    def output() -> torch.Tensor:
        with torch.no_grad():
            found = block(seen[0])
        return found[0] if isinstance(found, tuple) else found

    whole = output()
    for expert in range(6):
        weight = down_of(bundle, layer, expert)
        held = weight.clone()
        weight.zero_()
        part = (whole - output()).reshape(-1, 32)
        weight.copy_(held)
        assert scores.experts[layer][expert] == pytest.approx(float(part.norm(dim=1).mean()), rel=1e-4, abs=1e-6)
    assert [one.shape for one in scores.expert_units] == [
        (6, bundle.anatomy.experts_of(i).width) if bundle.anatomy.experts_of(i) else (0,) for i in range(2)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_scores_are_slopes_of_the_loss(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle, windows=1)
    scores = gradient_axis_scores(bundle, calibration, "taylor")
    fisher = gradient_axis_scores(bundle, calibration, "fisher")
    assert torch.allclose(fisher.experts[1], scores.experts[1].square() / 2)

    def loss() -> float:
        logits = logits_of(bundle.model, calibration.ids)[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, calibration.ids[0, 1:], reduction="sum"))

    def slope(columns: Any) -> float:
        held, ends = weight.clone(), []
        for factor in (1.02, 0.98):
            weight[:, columns] = held[:, columns] * factor
            ends.append(loss())
            weight.copy_(held)
        return abs(ends[0] - ends[1]) / 0.04

    for expert in (0, 3):
        weight = down_of(bundle, 1, expert)
        assert float(scores.experts[1][expert]) == pytest.approx(slope(slice(None)), rel=0.02, abs=2e-3)
        unit = int(scores.expert_units[1][expert].argmax())
        assert float(scores.expert_units[1][expert, unit]) == pytest.approx(slope([unit]), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitudes_hold_every_weight_once(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    scores = magnitude_axis_scores(bundle)
    reading = [p for n, p in bundle.model.named_parameters() if p.dim() > 1]
    total = sum(float(p.detach().double().square().sum()) for p in reading)
    assert float(scores.channels.square().sum()) == pytest.approx(total)
    mixed = [one for one in scores.experts if len(one)]
    routers = [block_of(bundle, i).gate.weight for i in range(2) if bundle.anatomy.experts_of(i)]
    of_units = sum(float(units.square().sum()) for units in scores.expert_units)
    of_routers = sum(float(w.detach().double().square().sum()) for w in routers)
    assert sum(float(one.square().sum()) for one in mixed) == pytest.approx(of_units + of_routers)


# --- compensation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_equal_others_are_made_up_for(tiny_bundle: Any, family: str) -> None:
    """Half of every expert's units repeat the others: without them the refitted model computes the same."""
    bundle = tiny_bundle(family)
    for layer, mixture in mixtures_of(bundle).items():
        half = mixture.experts.width // 2
        for expert in range(mixture.experts.count):
            for part in ("gate", "up"):
                weight = mixture.weight(expert, part)
                weight[half:] = weight[:half]
        assert layer in (0, 1)
    options = PruneOptions(expert_width_keep=0.5, multiple=8, damping=1e-9)
    calibration = calibration_of(bundle, windows=40)
    keep = plan(bundle, options, calibration)
    half = keep.after.expert_width
    units = tuple(tuple(range(half)) for _ in range(6))
    layers = tuple(replace(one, expert_units=units if one.expert_units else None) for one in keep.layers)
    keep = replace(keep, layers=layers)
    before = logits_of(bundle.model)
    refitted, record = run(bundle, options, calibration, keep_plan=keep)
    plain, _ = run(bundle, replace(options, compensate=False), calibration, keep_plan=keep)
    assert (logits_of(refitted.model) - before).abs().max() <= 2e-3
    assert (logits_of(plain.model) - before).abs().max() > 0.05
    assert record.details["refitted_linears"] == 6 * sum(one is not None for one in bundle.anatomy.experts)
    assert record.details["expert_width"] == [2 * half, half]


def test_what_a_dropped_expert_gave_is_not_made_up_for(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("mixtral")
    _, record = run(bundle, PruneOptions(experts_keep=0.5), calibration_of(bundle))
    assert [one.what for one in record.skipped] == ["compensation of dropped experts"]
    assert record.details["experts"] == [6, 3]


# --- planning -------------------------------------------------------------------------------------------------------


def test_experts_are_never_fewer_than_a_token_passes(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("mixtral", num_experts_per_tok=4)
    keep = plan(bundle, PruneOptions(experts_keep=0.1, method="magnitude"))
    assert keep.after.experts == 4
    with pytest.raises(RecipeError, match=r"experts_keep=0\.95 of 6.*experts at least the 4 a token passes"):
        plan(bundle, PruneOptions(experts_keep=0.95, method="magnitude"))
    with pytest.raises(RecipeError, match=r"layer 0 experts \(3 where each token passes 4\)"):
        replace(keep, layers=tuple(replace(one, experts=(0, 1, 2)) for one in keep.layers))


@pytest.mark.parametrize(("family", "options", "found"), [
    ("llama", {"experts_keep": 0.5}, "experts_keep cuts nothing in this llama model, without experts"),
    ("llama", {"expert_width_keep": 0.5, "ffn_keep": 0.5}, "expert_width_keep cuts nothing in this llama"),
    ("mixtral", {"ffn_keep": 0.5}, r"ffn_keep cuts nothing in this mixtral model, whose FFN units.*expert_width_keep"),
    ("qwen2_moe", {"expert_width_keep": 0.9}, r"expert_width_keep=0\.9 of 32, rounded"),
    ("qwen2_moe", {"ffn_keep": 0.95, "multiple": 8}, r"ffn_keep=0\.95 of 64.*removes nothing"),
])  # fmt: skip
def test_cuts_that_would_do_nothing_are_refused(tiny_bundle: Any, family: str, options: Any, found: str) -> None:
    overrides = {"intermediate_size": 64, "shared_expert_intermediate_size": 320} if family == "qwen2_moe" else {}
    with pytest.raises(RecipeError, match=found):
        plan(tiny_bundle(family, **overrides), PruneOptions(method="magnitude", **options))


@pytest.mark.parametrize("name", ["experts_keep", "expert_width_keep"])
@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_outside_of_zero_to_one_are_refused(name: str, share: float) -> None:
    with pytest.raises(RecipeError, match=rf"{name}={share} \(needed: above 0, at most 1\)"):
        PruneOptions(**{name: share})


@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_count_experts_exactly(tiny_bundle: Any, family: str) -> None:
    bundle = three_layers(tiny_bundle, family)
    whole = bundle.size().parameters
    budget = 9 * whole // 20
    options = PruneOptions(parameters=budget, multiple=8, compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned, _ = run(bundle, options, calibration_of(bundle), keep_plan=keep)
    assert pruned.size().parameters == keep.parameters_after <= budget
    idle = replace(activation_axis_scores(bundle, calibration_of(bundle)), layers=torch.ones(3).double())
    first = torch.eye(6).double()[0]  # all but one expert are worth nothing, so they go first
    idle = replace(idle, experts=[first if len(one) else one for one in idle.experts])
    keep = plan_from_scores(bundle, options, idle, calibration_of(bundle))
    assert keep.after.experts == 2
    assert keep.layers[-1].experts == (0, 1)
    least = "8 FFN units, 2 KV groups" if family == "qwen2_moe" else "2 experts of 8 units, 1 KV groups"
    with pytest.raises(DoesNotFit, match=rf"{least}, 1 layers"):  # of qwen2_moe the layer without experts is left
        plan(bundle, PruneOptions(parameters=10, multiple=8), calibration_of(bundle))


def test_faults_of_an_edited_plan(tiny_bundle: Any) -> None:
    bundle = three_layers(tiny_bundle, "qwen2_moe")
    keep = plan(bundle, PruneOptions(experts_keep=0.5, expert_width_keep=0.5, multiple=8, method="magnitude"))
    dense, first, second = keep.layers
    assert (dense.experts, dense.expert_units) == (None, None)
    narrow = tuple(units[:4] for units in first.expert_units or ())
    for layers, found in [
        ((replace(dense, experts=(0, 1)), first, second), r"layer 0 experts \(it has none\)"),
        ((dense, replace(first, experts=None), second), r"layer 1 expert_units \(3 lists for 6 experts\)"),
        ((dense, replace(first, expert_units=narrow), second), r"different numbers of units \[4, 16\]"),
        ((dense, replace(first, experts=(0, 1, 9)), second), r"layer 1 experts \(index 9 of 6\)"),
        ((dense, replace(first, expert_units=((3, 2), (0, 1), (0, 1))), second), r"layer 1 expert \d \(not ascending"),
        ((dense, replace(first, ffn_units=(0, 1)), second), r"different numbers of ffn_units \[2, 48\]"),
    ]:
        with pytest.raises(RecipeError, match=found):
            replace(keep, layers=layers)


def test_the_table_shows_experts(tiny_bundle: Any) -> None:
    bundle = three_layers(tiny_bundle, "qwen2_moe")
    options = PruneOptions(experts_keep=0.5, expert_width_keep=0.5, ffn_keep=0.5, multiple=8, method="magnitude")
    text = plan_table(plan(bundle, options)).splitlines()
    assert "experts" in text[1]
    assert "units of each" in text[1]
    assert text[2].split()[1:3] == ["64", "->"]
    assert text[2].count("none") == 2
    assert "48 -> 24" in text[3]
    assert "6 -> 3" in text[3]
    assert "32 -> 16" in text[3]
    assert "experts" not in plan_table(plan(tiny_bundle(), PruneOptions(ffn_keep=0.5, method="magnitude")))


def test_a_plan_of_other_experts_is_refused(tiny_bundle: Any) -> None:
    keep = plan(tiny_bundle("mixtral"), PruneOptions(experts_keep=0.5, method="magnitude"))
    with pytest.raises(RecipeError, match="experts 6 where the model has 5"):
        keep.require(tiny_bundle("mixtral", num_local_experts=5))


@pytest.mark.parametrize(("family", "values", "parameters"), [
    ("mixtral", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
                 "num_key_value_heads": 8, "num_local_experts": 8}, 46_702_792_704),
    ("qwen2_moe", {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
                   "num_experts": 60, "moe_intermediate_size": 1408, "num_experts_per_tok": 4,
                   "shared_expert_intermediate_size": 5632}, 14_315_784_192),
    ("qwen3_moe", {"hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128,
                   "num_experts": 128, "moe_intermediate_size": 768, "num_experts_per_tok": 8}, 30_532_122_624),
])  # fmt: skip
def test_parameters_are_counted_from_a_config_alone(family: str, values: Any, parameters: int) -> None:
    """Of the sizes of Mixtral 8x7B, Qwen1.5-MoE-A2.7B and Qwen3-30B-A3B."""
    from transformers import CONFIG_MAPPING

    shape = Shape.of(anatomy_of(CONFIG_MAPPING[family](**values)))
    assert shape.parameters == parameters
    assert shape.parameters - replace(shape, experts=shape.experts - 1).parameters == (
        shape.layers * shape.width * (3 * shape.expert_width + 1)
    )


# --- the rest of the product ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_is_cut_beside_the_experts(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    options = PruneOptions(experts_keep=0.5, vocabulary_keep=0.98, multiple=1, compensate=False)
    pruned, record = run(bundle, options, calibration_of(bundle))
    assert pruned.anatomy.vocab < bundle.anatomy.vocab
    assert record.after.parameters == sum(p.numel() for p in pruned.model.parameters())


def test_a_pruned_mixture_generates_and_trains(tiny_bundle: Any) -> None:
    for family in FAMILIES:
        bundle = tiny_bundle(family)
        pruned, _ = run(bundle, PruneOptions(experts_keep=0.5, method="magnitude"))
        made = pruned.model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
        assert made[0, 20] == logits_of(pruned.model)[0, -1].argmax()
        pruned.model(IDS, labels=IDS).loss.backward()
        assert all(parameter.requires_grad for parameter in pruned.model.parameters())


def test_steps_that_do_not_carry_experts_say_so(tiny_bundle: Any, tmp_path: Path) -> None:
    from dwindle import adapters, export, quantize
    from dwindle.adapters.attach import target_names
    from dwindle.devices.workload import Workload
    from dwindle.prune.masks import train_masks

    bundle = tiny_bundle("qwen2_moe")
    refused = "has mixtures of 6 experts in 1 of 2 layers, which {} does not carry.*can be pruned, distilled"
    assert UnsupportedModel.exit_code == 2
    with pytest.raises(UnsupportedModel, match=refused.format("quantize")):
        quantize.run(bundle, quantize.QuantizeOptions())
    with pytest.raises(UnsupportedModel, match=refused.format("export")):
        export.run(bundle, export.ExportOptions(), tmp_path / "export")
    with pytest.raises(UnsupportedModel, match=refused.format("merge")):
        adapters.merge(bundle, tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match=refused.format("adapter")):
        target_names(bundle, ["all"], 4)
    with pytest.raises(UnsupportedModel, match=refused.format("prune by trained masks")):
        train_masks(bundle, {"ffn": 0.5}, calibration_of(bundle))
    train = replace(calibration_of(bundle), role="train")
    with pytest.raises(UnsupportedModel, match=refused.format("prune by method='soft_top_k'")):
        run(bundle, PruneOptions(ffn_keep=0.5, multiple=8, method="soft_top_k"), calibration_of(bundle), train=train)
    with pytest.raises(UnsupportedModel, match=r"num_experts=6\. The cost of a mixture of experts"):
        Workload.from_config(bundle.config_json())


def test_the_command_line_cuts_experts(tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dwindle.pipeline.cli import main

    def invoke(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return int(end.value.code or 0), found.out, found.err

    tiny_bundle("mixtral").save(tmp_path / "model")
    words = ["prune", "-m", tmp_path / "model", "-o", tmp_path / "small", "--method", "magnitude"]
    code, _, err = invoke(*words, "--keep", "experts=0.5", "--keep", "expert_width=0.5")
    assert code == 0
    assert "6 -> 3" in err
    assert "64 -> 32" in err
    small = ModelBundle.load(tmp_path / "small").anatomy.experts[0]
    assert small is not None
    assert (small.count, small.width) == (3, 32)
    code, _, err = invoke(*words[:4], tmp_path / "none", *words[5:], "--keep", "ffn=0.5")
    assert code == 2
    assert "ffn_keep cuts nothing in this mixtral model" in err
    code, _, err = invoke(
        "quantize", "-m", tmp_path / "model", "-o", tmp_path / "packed", "--scheme", "integer", "--bits", "4"
    )
    assert code == 2
    assert "quantize: mixtral has mixtures of 6 experts" in err
