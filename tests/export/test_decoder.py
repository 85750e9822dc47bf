"""The decoder against transformers: every family, every option, prefill and cached decode, padding, and tracing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwindle.anatomy import FAMILIES
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.export.decoder import Decoder, causal_bias
from dwindle.export.kv_cache import MASKED

TOLERANCE = 1e-5
LENGTH, PREFILL = 40, 24  # the tiny models' sliding window is 8
LONG_ROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 16, "hidden_act": "gelu"}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    ("gemma3_text", {"attn_logit_softcapping": 2.0}),  # read by no code of transformers
    ("gemma3_text", {"final_logit_softcapping": 3.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}),
    ("phi3", {"rope_scaling": LONG_ROPE, "max_position_embeddings": 128, "original_max_position_embeddings": 64}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "attention_bias": True,
                 "mlp_bias": True}),
    ("olmo2", {"attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
]  # fmt: skip


def _ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, LENGTH), generator=torch.Generator().manual_seed(7))


def _positions(begin: int, end: int, batch: int) -> torch.Tensor:
    return torch.arange(begin, end).expand(batch, -1)


def _decoded(decoder: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prefill and then one token at a time through the cache."""
    batch = ids.shape[0]
    keys, values = decoder.empty_cache(batch)
    logits, keys, values = decoder(ids[:, :PREFILL], _positions(0, PREFILL, batch), keys, values, causal_bias(PREFILL))
    parts = [logits]
    for i in range(PREFILL, LENGTH):
        logits, keys, values = decoder(ids[:, i : i + 1], _positions(i, i + 1, batch), keys, values, causal_bias(1, i))
        parts.append(logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_logits_equal_transformers(tiny_bundle, family, options):
    bundle = tiny_bundle(family, **options)
    ids = _ids()
    stock = bundle.model(ids).logits
    for computed in (False, True):
        decoder = Decoder.from_bundle(bundle, context=64, computed_rotary=computed)
        whole = decoder(ids, _positions(0, LENGTH, 2), *decoder.empty_cache(2), causal_bias(LENGTH))[0]
        assert (whole - stock).abs().max() <= TOLERANCE
        assert (_decoded(decoder, ids) - stock).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_equals_transformers_and_the_unpadded_text(tiny_bundle, family):
    bundle = tiny_bundle(family)
    decoder = Decoder.from_bundle(bundle)
    ids, pad = _ids(), torch.tensor([0, 11])
    mask = (torch.arange(LENGTH)[None] >= pad[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = decoder(ids, positions, *decoder.empty_cache(2), causal_bias(LENGTH, padding=mask))[0]
    assert torch.isfinite(logits).all()
    stock = bundle.model(ids, attention_mask=mask, position_ids=positions).logits
    assert ((logits - stock).abs() * mask[..., None]).max() <= TOLERANCE
    alone = bundle.model(ids[1:, 11:]).logits
    assert (logits[1:, 11:] - alone).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_load_strictly_under_the_stock_names(tiny_bundle, family):
    bundle = tiny_bundle(family)
    decoder = Decoder.from_bundle(bundle)
    assert set(decoder.state_dict()) == {n for n in bundle.model.state_dict() if "rotary" not in n}
    embedding = decoder.model.embed_tokens.weight
    assert embedding.data_ptr() == bundle.model.get_submodule(bundle.anatomy.embedding).weight.data_ptr()
    assert (decoder.lm_head.weight is embedding) == bundle.anatomy.tied
    assert not any(p.requires_grad for p in decoder.parameters())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export_with_dynamic_shapes(tiny_bundle):
    bundle = tiny_bundle("gemma3_text")
    decoder = Decoder.from_bundle(bundle)
    auto, anatomy = torch.export.Dim.AUTO, bundle.anatomy
    past = [torch.zeros(2, anatomy.kv_heads, 5, anatomy.head_dim) for _ in range(anatomy.layers)]
    example = (_ids()[:, :3], _positions(5, 8, 2).contiguous(), past, [p.clone() for p in past],
               causal_bias(3, 5).repeat(2, 1, 1, 1))  # fmt: skip
    grows = [{0: auto, 2: auto}] * anatomy.layers
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, grows, grows, {0: auto, 2: auto, 3: auto})
    program = torch.export.export(decoder, example, dynamic_shapes=shapes).module()
    ids, bias = _ids(), causal_bias(LENGTH - 7, 7).repeat(2, 1, 1, 1)
    first = decoder(ids[:, :7], _positions(0, 7, 2), *decoder.empty_cache(2), causal_bias(7))
    rest = program(ids[:, 7:], _positions(7, LENGTH, 2), first[1], first[2], bias)[0]
    assert (rest - bundle.model(ids).logits[:, 7:]).abs().max() <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_packed_weights_are_dequantized_and_kept(tiny_bundle, family):
    from dwindle.quantized_model import apply_quantized_weights
    from dwindle.weights import AffineWeight

    bundle = tiny_bundle(family)
    anatomy = bundle.anatomy
    weights = {}
    for name in [*anatomy.linear_names()[1:], anatomy.embedding]:
        rows, columns = bundle.model.get_submodule(name).weight.shape
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
        weights[name] = AffineWeight(codes, torch.rand(rows, columns // 16).half() * 0.05, None, 4, 16)
    tied = {anatomy.head: anatomy.embedding} if anatomy.tied else None
    apply_quantized_weights(bundle.model, weights, tied)
    decoder = Decoder.from_bundle(bundle)
    assert set(decoder.quantized) == set(weights)
    assert torch.equal(decoder.quantized[anatomy.embedding].codes, weights[anatomy.embedding].codes)
    assert (_decoded(decoder, _ids()) - bundle.model(_ids()).logits).abs().max() <= TOLERANCE


def test_the_bias_hides_the_future_and_the_padding():
    bias = causal_bias(2, past=1, padding=torch.tensor([[0, 1, 1]]))
    assert bias.tolist() == [[[[MASKED, 0.0, MASKED], [MASKED, 0.0, 0.0]]]]


def test_a_context_beyond_the_model_is_refused(tiny_bundle):
    with pytest.raises(RecipeError, match=r"context_length=65 is not within 1 to 64"):
        Decoder.from_bundle(tiny_bundle(), context=65)
    long = tiny_bundle("phi3", rope_scaling=LONG_ROPE, max_position_embeddings=128,
                       original_max_position_embeddings=32)  # fmt: skip
    with pytest.raises(RecipeError, match="at most 32"):
        Decoder.from_bundle(long)


def test_an_unknown_activation_is_refused(tiny_bundle):
    bundle = tiny_bundle(hidden_act="tanh")
    with pytest.raises(UnsupportedModel, match="activation 'tanh' cannot be exported; supported: silu"):
        Decoder.from_bundle(bundle)
