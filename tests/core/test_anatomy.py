"""Every family of the table: names and shapes against a real (tiny, random) transformers model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from dwindle.anatomy import (
    FAMILIES,
    Experts,
    anatomy_of,
    check_model,
    family_of,
    module,
    require_dense,
    set_module,
    shape_problems,
)
from dwindle.bundle import ModelBundle
from dwindle.errors import UnsupportedModel
from dwindle.experts import built_layout, mixture_module, name_expert_count, stored_layout, stored_parameter
from dwindle.families import MIXTURES


def _llama(**overrides):
    return CONFIG_MAPPING["llama"](**{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, **overrides})


def _changed(config, **values):
    """The config with values that the config classes of transformers 5 would not let in."""
    return SimpleNamespace(**{**config.to_dict(), **values})


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_model(tiny_bundle, family):
    bundle = tiny_bundle(family)
    anatomy, model = bundle.anatomy, bundle.model
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(anatomy.linear_names()) == linears
    norms = {n for n, m in model.named_modules() if "RMSNorm" in type(m).__name__}
    assert set(anatomy.norm_names()) == norms
    check_model(model, anatomy)
    embedding = model.get_submodule(anatomy.embedding)
    assert tuple(embedding.weight.shape) == (anatomy.vocab, anatomy.width)
    assert (model.lm_head.weight is embedding.weight) == anatomy.tied
    assert anatomy.layers == len(model.model.layers)
    assert anatomy.ffn_width == (model.config.intermediate_size,) * anatomy.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_those_of_the_model(tiny_bundle, family):
    for flag in (False, True):
        bundle = tiny_bundle(family, attention_bias=flag, mlp_bias=flag)
        parts, traits = bundle.anatomy.parts(0), bundle.anatomy.traits
        expected = {"q": traits.qkv_bias, "qkv": traits.qkv_bias, "o": traits.output_bias, "down": traits.mlp_bias}
        for part, bias in expected.items():
            if part in parts:
                assert (module(bundle.model, parts[part]).bias is not None) == bias, part


def test_parts_of_a_fused_family(tiny_bundle):
    parts = tiny_bundle("phi3").anatomy.parts(1)
    assert set(parts) == {"qkv", "o", "gate_up", "down"}
    assert parts["qkv"] == "model.layers.1.self_attn.qkv_proj"


def test_traits_of_the_unusual_families(tiny_bundle):
    gemma = tiny_bundle("gemma3_text").anatomy.traits
    assert gemma.windows == (8, None)
    assert [rope.theta for rope in gemma.ropes] == [10_000.0, 1_000_000.0]
    assert (gemma.norm_offset, gemma.norm_layout, gemma.qk_norm) == (1.0, "sandwich", "head")
    assert gemma.embedding_scale == pytest.approx(32**0.5)
    assert gemma.attention_scale == pytest.approx(12**-0.5)
    assert tiny_bundle("gemma2").anatomy.traits.attention_softcap == 50.0
    assert tiny_bundle("smollm3").anatomy.traits.ropes[1] is None
    assert tiny_bundle("mistral").anatomy.traits.windows == (8, 8)
    assert tiny_bundle("qwen2").anatomy.traits.windows == (None, 8)
    assert tiny_bundle("phi3", partial_rotary_factor=0.5).anatomy.traits.ropes[0].rotary_dim == 4
    assert tiny_bundle("olmo2").anatomy.traits.norm_layout == "post"


def test_a_rope_written_by_transformers_5_is_read(assets):
    config = AutoConfig.from_pretrained(assets / "models" / "stories260K")
    assert anatomy_of(config).traits.ropes[0].theta == 10_000.0
    config.rope_parameters = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    rope = anatomy_of(config).traits.ropes[0]
    assert (rope.theta, rope.kind, rope.scaling["factor"]) == (5e5, "linear", 2.0)


def test_set_module_replaces_and_refuses_unknown_names(tiny_bundle):
    bundle = tiny_bundle()
    name = bundle.anatomy.parts(0)["up"]
    new = nn.Linear(32, 64, bias=False)
    set_module(bundle.model, name, new)
    assert module(bundle.model, name) is new
    with pytest.raises(AttributeError):
        set_module(bundle.model, "model.layers.0.mlp.nothing", new)


def test_unknown_family_names_the_nearest_and_all():
    with pytest.raises(UnsupportedModel, match=r"'qwen4'.*nearest supported one is qwen\d.*llama"):
        family_of("qwen4")
    with pytest.raises(UnsupportedModel, match="Supported: gemma2"):
        family_of(None)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"intermediate_size": -4}, "intermediate_size=-4"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries"),
        ({"layer_types": 7}, "layer_types has 7 entries"),
        ({"layer_types": ["full_attention", "round"]}, "has other entries than full_attention"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 is not a number above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
        ({"hidden_act": None}, "hidden_act=None is no name"),
        ({"use_bidirectional_attention": True}, "makes an encoder"),
    ],
)
def test_shape_problems_are_named(overrides, found):
    config = _changed(_llama(), **overrides)
    problems = shape_problems(config)
    assert any(found in line for line in problems)
    with pytest.raises(UnsupportedModel, match=r"Mend config\.json"):
        anatomy_of(config)


def test_a_width_that_transformers_5_refuses_is_a_problem_where_it_does():
    config = _changed(_llama(head_dim=8), hidden_size=30)
    assert shape_problems(config) == ["hidden_size=30 is no multiple of num_attention_heads=4"]
    config = CONFIG_MAPPING["qwen3"](hidden_size=30, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    assert shape_problems(config) == []


def test_good_configs_have_no_problems(tiny_bundle):
    for family in FAMILIES:
        assert shape_problems(tiny_bundle(family).model.config) == []


@pytest.mark.parametrize(
    ("family", "overrides", "found"),
    [
        ("mistral", {"sliding_window": -1}, "sliding_window=-1 is not a whole number"),
        ("gemma2", {"sliding_window": None}, "has sliding_attention, but sliding_window is not set"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
        ("gemma2", {"attn_logit_softcapping": -2.0}, "attn_logit_softcapping=-2.0"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
    ],
)
def test_problems_of_some_families(tiny_bundle, family, overrides, found):
    config = _changed(tiny_bundle(family).model.config, **overrides)
    assert any(found in line for line in shape_problems(config))


def test_all_problems_are_named_at_once():
    config = _changed(_llama(), vocab_size=0, rms_norm_eps=-1.0, attention_bias="no")
    assert len(shape_problems(config)) == 3


def test_a_bad_rope_base_is_refused():
    config = _changed(_llama(), rope_parameters={"rope_theta": "big"})
    with pytest.raises(UnsupportedModel, match="rope_theta='big'"):
        anatomy_of(config)


def test_check_model_names_linears_of_another_shape(tiny_bundle):
    bundle = tiny_bundle()
    set_module(bundle.model, "model.layers.1.mlp.up_proj", nn.Linear(32, 48, bias=False))
    with pytest.raises(UnsupportedModel, match=r"1 linears.*layers\.1\.mlp\.up_proj \(48, 32\).*\(64, 32\)"):
        check_model(bundle.model, bundle.anatomy)


@pytest.mark.parametrize("family", MIXTURES)
def test_names_of_a_mixture_are_those_that_transformers_writes(tiny_bundle, tmp_path, family):
    """What stock `save_pretrained` stores is what the anatomy names, with the shapes that it says."""
    bundle = tiny_bundle(family, tie_word_embeddings=False)
    anatomy, model = bundle.anatomy, bundle.model
    model.save_pretrained(tmp_path / "stock")
    with safe_open(tmp_path / "stock" / "model.safetensors", framework="pt") as file:
        stock = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    named = {f"{anatomy.embedding}.weight": (anatomy.vocab, anatomy.width),
             f"{anatomy.head}.weight": (anatomy.vocab, anatomy.width)}  # fmt: skip
    for layer in range(anatomy.layers):
        for part, name in anatomy.parts(layer).items():
            named[f"{name}.weight"] = anatomy.linear_shape(layer, part)
            if anatomy.traits.qkv_bias and part in ("q", "k", "v"):
                named[f"{name}.bias"] = anatomy.linear_shape(layer, part)[:1]
        experts = anatomy.experts_of(layer)
        if experts is None:
            continue
        named[f"{anatomy.router(layer)}.weight"] = (experts.count, anatomy.width)
        if experts.shared:
            named[f"{anatomy.shared_gate(layer)}.weight"] = (1, anatomy.width)
        for expert in range(experts.count):
            parts = anatomy.expert_parts(layer, expert)
            named |= {f"{parts[part]}.weight": (experts.width, anatomy.width) for part in ("gate", "up")}
            named[f"{parts['down']}.weight"] = (anatomy.width, experts.width)
    norms = {f"{name}.weight" for name in anatomy.norm_names()}
    assert stock.keys() - named.keys() == norms
    assert named.items() <= stock.items()
    assert {name: tuple(tensor.shape) for name, tensor in bundle.stored_tensors().items()} == stock
    check_model(model, anatomy)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_split_and_joined_without_loss(tiny_bundle, tmp_path, family):
    bundle = tiny_bundle(family)
    anatomy, model = bundle.anatomy, bundle.model
    state = model.state_dict()
    stored = stored_layout(anatomy, state)
    for name, tensor in stored.items():
        assert torch.equal(stored_parameter(model, anatomy, name), tensor)
    back = built_layout(anatomy, stored, state.keys())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    block = module(model, mixture_module(model, anatomy, 1))
    assert torch.equal(stored[f"{anatomy.router(1)}.weight"], block.gate.weight)
    bundle.save(tmp_path / "model")
    loaded = ModelBundle.load(tmp_path / "model")
    assert loaded.content_sha256 == bundle.content_sha256
    assert loaded.anatomy == anatomy


def test_experts_of_every_layer(tiny_bundle):
    assert tiny_bundle().anatomy.experts == ()
    assert not tiny_bundle().anatomy.has_experts
    mixtral = tiny_bundle("mixtral").anatomy
    assert mixtral.experts == (Experts(count=6, width=64, top_k=2, normalized=True, shared=False),) * 2
    assert (mixtral.ffn_width, mixtral.traits.windows) == ((0, 0), (8, 8))
    qwen = tiny_bundle("qwen2_moe").anatomy
    assert qwen.experts == (None, Experts(count=6, width=32, top_k=2, normalized=False, shared=True))
    assert qwen.ffn_width == (64, 48)
    assert qwen.parts(0)["down"] == "model.layers.0.mlp.down_proj"
    assert qwen.parts(1)["down"] == "model.layers.1.mlp.shared_expert.down_proj"
    every_other = tiny_bundle("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]).anatomy
    assert [one is not None for one in every_other.experts] == [False, True, False, False]
    assert every_other.ffn_width == (64, 0, 64, 64)


@pytest.mark.parametrize(
    ("family", "overrides", "found"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0 is not a whole number from 1"),
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 of num_local_experts=6"),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size=None"),
        ("qwen2_moe", {"use_sliding_window": True}, r"other layers a window in transformers 4\.57"),
        ("qwen2_moe", {"head_dim": 6}, "hidden_size=32 is not num_attention_heads=4 times head_dim=6"),
        ("qwen2_moe", {"qkv_bias": "no"}, "qkv_bias='no' is neither true nor false"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"mlp_only_layers": ["a"]}, r"mlp_only_layers=\['a'\] is no list of layers"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3 is no list of layers"),
    ],
)
def test_problems_of_mixtures(tiny_bundle, family, overrides, found):
    config = tiny_bundle(family).model.config
    assert shape_problems(config) == []
    changed = _changed(config, **overrides)
    for key in ("num_experts", "num_local_experts"):  # transformers 5 calls qwen3_moe's by either name
        if not hasattr(changed, key):
            setattr(changed, key, 6)
    with pytest.raises(UnsupportedModel, match=found):
        anatomy_of(changed)


def test_the_number_of_experts_is_named_as_every_version_reads_it(tiny_bundle):
    assert tiny_bundle("qwen3_moe").config_json()["num_experts"] == 6
    assert tiny_bundle("mixtral").config_json()["num_local_experts"] == 6
    assert name_expert_count({"model_type": "llama"}) == {"model_type": "llama"}


def test_steps_without_experts_refuse_them(tiny_bundle):
    require_dense(tiny_bundle().anatomy, "a step")
    with pytest.raises(UnsupportedModel, match="a step: mixtral has mixtures of 6 experts in 2 of 2 layers"):
        require_dense(tiny_bundle("mixtral").anatomy, "a step")
