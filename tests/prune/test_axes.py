"""Every axis, every family: the pruned model computes what the full model does with the same things masked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.anatomy import module
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.prune import KeepPlan, PruneOptions, plan, run
from dwindle.prune.planning import plan_from_scores
from dwindle.prune.rotation import principal_axes
from dwindle.prune.scores import AxisScores
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
TURNABLE = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]
AXES: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_keep": 0.4},
    "heads": {"heads_keep": 0.5},
    "width": {"width_keep": 0.75, "rotate": False},
    "depth": {"layers_keep": 0.6},
    "all": {"ffn_keep": 0.6, "heads_keep": 0.5, "width_keep": 0.75, "layers_keep": 0.6, "rotate": False},
}
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))
LISTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def three_layers(tiny_bundle: Any, family: str, **overrides: Any) -> Any:
    return tiny_bundle(family, num_hidden_layers=3, **LISTS.get(family, {}), **overrides)


def calibration_of(bundle: Any, windows: int = 6, tokens: int = 16) -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, "calibration", "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@contextlib.contextmanager
def masked(bundle: Any, keep: KeepPlan, axes: torch.Tensor | None = None) -> Iterator[None]:
    """The full model with everything that the plan cuts set to zero where it arises."""
    anatomy, model, hooks = bundle.anatomy, bundle.model, []
    kept = {one.layer: one for one in keep.layers}

    def mask(size: int, indices: Any, each: int = 1) -> torch.Tensor:
        found = torch.zeros(size, each)
        found[list(range(size) if indices is None else indices)] = 1
        return found.flatten()

    def on_input(name: str, by: torch.Tensor) -> None:
        hooks.append(module(model, name).register_forward_pre_hook(lambda _, given: (given[0] * by,)))

    def on_output(name: str, change: Any) -> None:
        hooks.append(module(model, name).register_forward_hook(lambda _, __, given: change(given)))

    def passes_on(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    if axes is not None:
        turn = axes[:, : keep.width].float()
        narrowed = lambda given: given @ turn @ turn.T  # noqa: E731
    else:
        width = mask(anatomy.width, keep.channels)
        narrowed = lambda given: given * width  # noqa: E731
    on_output(anatomy.embedding, narrowed)
    for layer in range(anatomy.layers):
        if layer not in kept:
            path = anatomy.layer_path(layer)
            hooks.append(module(model, path).register_forward_hook(passes_on, with_kwargs=True))
            continue
        parts, one = anatomy.parts(layer), kept[layer]
        per_group = anatomy.heads // anatomy.kv_heads * anatomy.head_dim
        queries = mask(anatomy.kv_heads, one.kv_groups, per_group)
        keys = mask(anatomy.kv_heads, one.kv_groups, anatomy.head_dim)
        on_input(parts["down"], mask(anatomy.ffn_width[layer], one.ffn_units))
        on_input(parts["o"], queries)
        if anatomy.traits.qk_norm == "full":
            on_output(parts["q"], lambda given, by=queries: given * by)
            on_output(parts["k"], lambda given, by=keys: given * by)
        on_output(parts["o"], narrowed)
        on_output(parts["down"], narrowed)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_stock(pruned: Any, bundle: Any, folder: Path) -> None:
    """Saved and loaded by transformers alone, and by dwindle, the logits are the same to the last bit."""
    from transformers import AutoModelForCausalLM

    pruned.save(folder)
    attention = bundle.model.config._attn_implementation
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    assert torch.equal(logits_of(stock), logits_of(pruned.model))
    assert torch.equal(logits_of(ModelBundle.load(folder).model), logits_of(pruned.model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", AXES)
def test_the_pruned_model_is_the_masked_one(tiny_bundle: Any, tmp_path: Path, family: str, axis: str) -> None:
    bundle = three_layers(tiny_bundle, family)
    before = logits_of(bundle.model)
    options = PruneOptions(**AXES[axis], multiple=8, compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned, record = run(bundle, options, calibration_of(bundle), keep_plan=keep)
    with masked(bundle, keep):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 1e-5
    assert (wanted - before).abs().max() > 0.1
    assert torch.equal(logits_of(bundle.model), before)
    assert record.after.parameters == keep.parameters_after == sum(p.numel() for p in pruned.model.parameters())
    assert record.before.parameters == keep.parameters_before
    assert pruned.anatomy.layers == keep.after.layers
    require_stock(pruned, bundle, tmp_path / "model")


@pytest.mark.parametrize("family", TURNABLE)
def test_a_turned_width_is_the_projected_one(tiny_bundle: Any, tmp_path: Path, family: str) -> None:
    bundle = three_layers(tiny_bundle, family)
    calibration = calibration_of(bundle)
    options = PruneOptions(width_keep=0.75, ffn_keep=0.6, layers_keep=0.6, rotate=True, multiple=8, compensate=False)
    keep = plan(bundle, options, calibration)
    pruned, record = run(bundle, options, calibration, keep_plan=keep)
    axes, variances = principal_axes(bundle, calibration, [one.layer for one in keep.layers])
    assert torch.allclose(axes.T @ axes, torch.eye(32).double(), atol=1e-10)
    assert keep.width_score == pytest.approx(float(variances[:24].sum() / variances.sum()))
    with masked(bundle, keep, axes):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 2e-5
    assert record.after.parameters == keep.parameters_after == sum(p.numel() for p in pruned.model.parameters())
    assert not pruned.anatomy.tied
    require_stock(pruned, bundle, tmp_path / "model")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_families_whose_width_cannot_be_turned(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family)
    calibration = calibration_of(bundle)
    with pytest.raises(RecipeError, match=f"cannot turn the width of {family}.*llama, mistral"):
        plan(bundle, PruneOptions(width_keep=0.5, rotate=True, multiple=8), calibration)
    options = PruneOptions(width_keep=0.5, multiple=8)
    keep = plan(bundle, options, calibration)
    assert not keep.rotated
    _, record = run(bundle, options, calibration, keep_plan=keep)
    assert "cannot turn" in record.skipped[0].why
    turned = KeepPlan(keep.method, keep.model_sha256, keep.shape, keep.layers, width=16, rotated=True)
    with pytest.raises(RecipeError, match=r"cannot turn.*without rotate"):
        run(bundle, options, calibration, keep_plan=turned)


def test_the_width_is_turned_where_it_can_be(tiny_bundle: Any) -> None:
    bundle = tiny_bundle("llama", intermediate_size=512)
    calibration = calibration_of(bundle)
    assert plan(bundle, PruneOptions(width_keep=0.5, multiple=8), calibration).rotated
    by_weights = plan(bundle, PruneOptions(width_keep=0.5, multiple=8, method="magnitude"))
    assert not by_weights.rotated
    _, record = run(bundle, PruneOptions(), keep_plan=by_weights)
    assert [skipped.why for skipped in record.skipped] == ["the plan chooses channels"]
    with pytest.raises(RecipeError, match="rotate needs calibration data"):
        plan_from_scores(bundle, PruneOptions(width_keep=0.5, rotate=True, multiple=8), AxisScores())


def test_a_turn_that_would_grow_the_model_is_refused(tiny_bundle: Any) -> None:
    """Untying a head of 2,000 entries costs more than a quarter of this width saves."""
    bundle = tiny_bundle("llama", vocab_size=2000)
    with pytest.raises(RecipeError, match=r"rotate would untie the head.*parameters where the full model has"):
        plan(bundle, PruneOptions(width_keep=0.75, rotate=True, multiple=8), calibration_of(bundle))
    assert not plan(bundle, PruneOptions(width_keep=0.75, multiple=8), calibration_of(bundle)).rotated


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(("family", "overrides"), [
    ("llama", BIASES), ("smollm3", BIASES), ("qwen3", {"attention_bias": True}), ("olmo2", {"attention_bias": True}),
    ("gemma2", {"attention_bias": True}), ("llama", {"tie_word_embeddings": False}),
    ("gemma2", {"tie_word_embeddings": False}), ("phi3", {"sliding_window": 6}),
    ("olmo2", {"rms_norm_eps": 0.1}), ("qwen3", {"rms_norm_eps": 0.1}), ("gemma3_text", {"rms_norm_eps": 0.1}),
])  # fmt: skip
def test_biases_untied_heads_windows_and_large_eps(
    tiny_bundle: Any, tmp_path: Path, family: str, overrides: Any
) -> None:
    bundle = three_layers(tiny_bundle, family, **overrides)
    options = PruneOptions(**AXES["all"], multiple=8, method="fisher", compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned, record = run(bundle, options, calibration_of(bundle), keep_plan=keep)
    with masked(bundle, keep):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 1e-5
    assert record.after.parameters == keep.parameters_after == pruned.size().parameters
    require_stock(pruned, bundle, tmp_path / "model")


ROPE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(("overrides", "kind"), [
    ({}, "mistral"), ({"rope_scaling": ROPE}, "mistral"), (BIASES, "smollm3"), ({"attention_bias": True}, "smollm3"),
])  # fmt: skip
def test_a_llama_whose_heads_do_not_divide_its_width(
    tiny_bundle: Any, tmp_path: Path, overrides: dict[str, Any], kind: str
) -> None:
    bundle = tiny_bundle("llama", num_attention_heads=8, num_key_value_heads=4, **overrides)
    options = PruneOptions(heads_keep=0.75, ffn_keep=0.5, multiple=8, compensate=False)
    keep = plan(bundle, options, calibration_of(bundle))
    pruned, record = run(bundle, options, calibration_of(bundle), keep_plan=keep)
    assert (pruned.anatomy.heads, pruned.anatomy.width, pruned.anatomy.head_dim) == (6, 32, 4)
    assert pruned.anatomy.model_type == kind
    assert record.details["architecture"] == ["llama", kind]
    with masked(bundle, keep):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 1e-5
    assert record.after.parameters == keep.parameters_after
    require_stock(pruned, bundle, tmp_path / "model")


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_shapes_that_transformers_refuses_name_the_rule_and_the_nearest(tiny_bundle: Any, family: str) -> None:
    bundle = tiny_bundle(family, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(RecipeError, match=r"32 and 6 heads \(hidden_size must be a multiple.*hidden_size 30 or 36 "
                                          "with 6 heads, or 4 heads"):  # fmt: skip
        plan(bundle, PruneOptions(heads_keep=0.75), calibration_of(bundle))


def test_phi3_with_longrope_keeps_its_ratio(tiny_bundle: Any, tmp_path: Path) -> None:
    rope = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0] * 4}
    bundle = tiny_bundle("phi3", rope_scaling=rope, max_position_embeddings=128)
    with pytest.raises(RecipeError, match="longrope unless hidden_size // num_attention_heads stays 8"):
        plan(bundle, PruneOptions(heads_keep=0.5), calibration_of(bundle))
    both = PruneOptions(heads_keep=0.5, width_keep=0.5, multiple=8, compensate=False, rotate=False)
    keep = plan(bundle, both, calibration_of(bundle))
    pruned, _ = run(bundle, both, keep_plan=keep)
    with masked(bundle, keep):
        wanted = logits_of(bundle.model)
    assert (logits_of(pruned.model) - wanted).abs().max() <= 1e-5
    require_stock(pruned, bundle, tmp_path / "model")


def test_lists_per_layer_follow_the_layers(tiny_bundle: Any) -> None:
    for family in ("gemma3_text", "smollm3", "qwen2"):
        bundle = three_layers(tiny_bundle, family)
        keep = plan(bundle, PruneOptions(layers_keep=0.4), calibration_of(bundle))
        (left,) = keep.layers
        pruned, _ = run(bundle, PruneOptions(), calibration_of(bundle), keep_plan=keep)
        for name in ("windows", "ropes"):
            whole, after = (getattr(one.anatomy.traits, name) for one in (bundle, pruned))
            assert after == (whole[left.layer],)
