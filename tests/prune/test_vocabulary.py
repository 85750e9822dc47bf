from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, RecipeError, UnsupportedModel
from dwindle.prune.chat_template_tokens import chat_template_tokens
from dwindle.prune.token_id_settings import named_ids, renumber
from dwindle.prune.tokenizer_pieces import read_pieces
from dwindle.prune.vocabulary import essential_tokens, plan_vocabulary
from dwindle.prune.vocabulary_options import VocabularyOptions
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.prune.vocabulary_surgery import cut_vocabulary
from dwindle.storage import hash_json
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode_plain, encoding_sha256
from dwindle.vocabulary_map import VocabularyMap

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
VOCABULARY, TOKENS = 352, 347
"""Rows of the tiny models' embeddings, and how many of them have a token."""
TEXTS = ["the cat sat on the mat and the dog ran to the town", "then the cat and the dog sat on a mat in town"]
ONE = VocabularyOptions(multiple=1)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content + ' house' }}{% endfor %}{# his #}{% if add_generation_prompt %}tree\n{% endif %}"
)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def tokens_of(bundle: Any, texts: list[str] = TEXTS, role: Any = "train") -> TokenSet:
    ids = [i for found in encode_plain(bundle.tokenizer, texts) for i in found]
    return TokenSet(torch.tensor([ids]), role, "texts", "5e7", 1, encoding_sha256(bundle.tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_full_models_at_the_kept_ids(worded: Any, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    bundle = worded(family)
    before = bundle.content_sha256
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    assert bundle.content_sha256 == before
    assert len(plan.kept) < 300
    ids = torch.randint(0, len(plan.kept), (2, 20), generator=torch.Generator().manual_seed(1))
    kept = torch.tensor(plan.kept)
    expected = logits_of(bundle.model, kept[ids])[..., kept]
    assert torch.equal(logits_of(pruned.model, ids), expected)
    assert pruned.size().parameters == plan.parameters_after
    assert bundle.size().parameters == plan.parameters_before
    assert pruned.anatomy.vocab == pruned.model.config.vocab_size == len(plan.kept)
    pruned.save(tmp_path / "model")
    attention = bundle.model.config._attn_implementation
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=attention).eval()
    assert torch.equal(logits_of(stock, ids), expected)
    loaded = ModelBundle.load(tmp_path / "model")
    assert loaded.content_sha256 == pruned.content_sha256
    assert encode_plain(loaded.tokenizer, TEXTS) == encode_plain(pruned.tokenizer, TEXTS)


@pytest.mark.parametrize("tied", [True, False])
def test_a_heads_bias_follows(worded: Any, tied: bool) -> None:
    bundle = worded("llama", tie_word_embeddings=tied)
    bundle.model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    ids, kept = torch.arange(30)[None], torch.tensor(plan.kept)
    assert torch.equal(logits_of(pruned.model, ids), logits_of(bundle.model, kept[ids])[..., kept])
    assert torch.equal(pruned.model.lm_head.bias, bundle.model.lm_head.bias[kept])
    assert pruned.size().parameters == plan.parameters_after
    assert (pruned.model.lm_head.weight is pruned.model.model.embed_tokens.weight) == tied
    assert bundle.model.lm_head.out_features == bundle.model.lm_head.weight.shape[0] == VOCABULARY


def test_ids_in_the_settings_follow(worded: Any, tmp_path: Path) -> None:
    bundle = worded("llama", eos_token_id=[1, 300], pad_token_id=2)
    unused = bundle.tokenizer.get_vocab()["Ġway"]
    bundle.model.generation_config.suppress_tokens = [unused, 1]
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    assert 300 in plan.kept
    assert unused not in plan.kept
    new = {old: i for i, old in enumerate(plan.kept)}
    assert pruned.model.config.eos_token_id == [new[1], new[300]]
    assert pruned.model.generation_config.suppress_tokens == [new[1]]
    assert bundle.model.generation_config.suppress_tokens == [unused, 1]
    assert (
        pruned.model.model.embed_tokens.padding_idx == pruned.model.model.padding_idx == pruned.tokenizer.pad_token_id
    )
    pruned.save(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["vocab_size"] == len(plan.kept)
    assert written["eos_token_id"] == [new[1], new[300]]
    assert pruned.tokenizer.convert_tokens_to_ids("<tool>") == len(plan.kept) - 1


def test_what_the_plan_says(worded: Any) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    text_ids = [i for ids in encode_plain(bundle.tokenizer, TEXTS) for i in ids]
    assert plan.vocabulary == VOCABULARY
    assert plan.corpus_tokens == len(text_ids)
    assert plan.seen == len(set(text_ids))
    assert plan.coverage == 1.0
    assert plan.essential == 3 + 256 + 1  # <s> </s> <pad>, bytes, <tool>
    counts = {name: count for _, count, name in plan.tokens}
    assert counts["Ġthe"] == 5
    assert counts["<tool>"] == 0
    assert VOCABULARY - 1 not in plan.kept
    assert plan.tokens == plan_vocabulary(bundle, tokens_of(bundle), ONE).tokens
    assert plan.tokens == plan_vocabulary(bundle, iter([tokens_of(bundle, TEXTS[:1]), TEXTS[1]]), ONE).tokens
    once = plan_vocabulary(bundle, TEXTS[0], ONE)
    assert once.corpus_sha256 != plan.corpus_sha256
    assert {token for token, _, _ in once.tokens} < {token for token, _, _ in plan.tokens}


def test_texts_of_the_corpus_encode_as_before(worded: Any) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    mapped = VocabularyMap.between(bundle.tokenizer, pruned.tokenizer, plan.kept, VOCABULARY)
    for old, new in zip(encode_plain(bundle.tokenizer, TEXTS), encode_plain(pruned.tokenizer, TEXTS), strict=True):
        assert mapped.old_ids(torch.tensor(new)).tolist() == old
        assert mapped.new_ids()[old].tolist() == new
    other = "a long way, señor — 道"
    assert pruned.tokenizer.decode(encode_plain(pruned.tokenizer, [other])[0]) == other


def test_sizes(worded: Any) -> None:
    bundle = worded()
    used = len(plan_vocabulary(bundle, TEXTS, ONE).kept)
    assert used == 288
    for options, size in [
        (VocabularyOptions(size=270, multiple=1), 270),
        (VocabularyOptions(size=340, multiple=1), used),
        (VocabularyOptions(size=340, multiple=1, min_count=0), 340),
        (VocabularyOptions(keep=0.8, multiple=8), 288),
        (VocabularyOptions(size=262, multiple=1, min_count=2), 262),
        (VocabularyOptions(multiple=64), 320),
        (VocabularyOptions(multiple=350), 350),
        (VocabularyOptions(keep=1.0, multiple=352), 352),
    ]:
        plan = plan_vocabulary(bundle, TEXTS, options)
        assert len(plan.kept) == size, options
        assert len(cut_vocabulary(bundle, plan).tokenizer) == min(size, TOKENS)


def test_fewer_tokens_are_the_more_frequent_ones(worded: Any) -> None:
    bundle = worded()
    small = plan_vocabulary(bundle, TEXTS, VocabularyOptions(size=270, multiple=1))
    whole = plan_vocabulary(bundle, TEXTS, ONE)
    assert set(small.kept) < set(whole.kept)
    assert 0 < small.coverage < 1
    assert small.coverage == sum(count for _, count, _ in small.tokens) / small.corpus_tokens
    pruned = cut_vocabulary(bundle, small)
    assert pruned.tokenizer.decode(encode_plain(pruned.tokenizer, TEXTS)[0]) == TEXTS[0]


def test_chat_template_tokens_stay(worded: Any, worded_tokenizer: Any) -> None:
    bundle = worded(chat_template=TEMPLATE)
    names = {bundle.tokenizer.convert_ids_to_tokens(i) for i in chat_template_tokens(bundle.tokenizer)}
    assert {"tree", "Ġhouse"} <= names
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog"}]
    old, new = (b.tokenizer.apply_chat_template(talk, tokenize=False) for b in (bundle, pruned))
    assert old == new
    ids = encode_plain(pruned.tokenizer, [new])[0]
    assert [plan.kept[i] for i in ids] == encode_plain(bundle.tokenizer, [old])[0]
    assert chat_template_tokens(worded_tokenizer()) == set()
    several = worded_tokenizer({"default": "{{ 'tree' }}", "tools": "{% if tools %}town{% endif %}"})
    assert several.convert_ids_to_tokens(sorted(chat_template_tokens(several))) == ["tree", "town"]
    assert bundle.tokenizer.get_vocab()["tree"] in essential_tokens(bundle, read_pieces(bundle.tokenizer))


def test_the_lineage_names_the_plan(worded: Any) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    entry = cut_vocabulary(bundle, plan).lineage.entries[-1]
    assert entry.step == "prune"
    assert entry.options == {"vocabulary": [VOCABULARY, len(plan.kept)]}
    assert entry.inputs == {"plan": hash_json(plan.to_json())}


def test_plans_are_json(worded: Any, tmp_path: Path) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    plan.save(tmp_path / "plan.json")
    assert VocabularyPlan.from_json(json.loads((tmp_path / "plan.json").read_text())) == plan
    for data in ({}, {**plan.to_json(), "kind": "keep_plan"}, {**plan.to_json(), "schema": 2}):
        with pytest.raises(RecipeError, match="no vocabulary plan of schema 1"):
            VocabularyPlan.from_json(data)
    for tokens in (3, [3], [[3]]):
        with pytest.raises(RecipeError, match="damaged"):
            VocabularyPlan.from_json({**plan.to_json(), "tokens": tokens})
    for tokens, found in (((), "keeps nothing"), (((3, 0, "a"), (3, 0, "a")), "twice"), (((999, 0, "a"),), "999 of")):
        with pytest.raises(RecipeError, match=found):
            replace(plan, tokens=tokens)


def test_an_edited_plan_is_checked_and_counted(worded: Any) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    without = replace(plan, tokens=tuple(token for token in plan.tokens if token[2] != "Ġmat"))
    pruned = cut_vocabulary(bundle, without)
    assert pruned.size().parameters == without.parameters_after == plan.parameters_after - plan.parameters_per_token
    gone = ("<tool>", "Ġt", "<s>", "a")
    broken = replace(plan, tokens=tuple(token for token in plan.tokens if token[2] not in gone))
    with pytest.raises(RecipeError, match=r"4 tokens are missing that must stay.*'<s>'.*'a'.*'Ġt'.*'<tool>'"):
        cut_vocabulary(bundle, broken)


def test_a_plan_of_another_model_is_refused(worded: Any, tiny_bundle: Any) -> None:
    plan = plan_vocabulary(worded(), TEXTS, ONE)
    with pytest.raises(RecipeError, match="made for 352 tokens, the model embeds 272"):
        cut_vocabulary(tiny_bundle(), plan)
    with pytest.raises(RecipeError, match="another tokenizer"):
        cut_vocabulary(tiny_bundle(vocab_size=VOCABULARY), plan)


def test_what_cannot_be_planned(worded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = worded()
    with pytest.raises(RecipeError, match=r"100 of 352 .* but 260 cannot go.*smallest reachable size is 260"):
        plan_vocabulary(bundle, TEXTS, VocabularyOptions(size=100, multiple=1))
    with pytest.raises(RecipeError, match=r"smallest reachable size is 320"):
        plan_vocabulary(bundle, TEXTS, VocabularyOptions(size=100))
    with pytest.raises(RecipeError, match=r"all 352 tokens stay \(260 are essential, the corpus holds 14"):
        plan_vocabulary(bundle, TEXTS, VocabularyOptions(multiple=352))
    for nothing in ("", [], [""]):
        with pytest.raises(DataError, match="holds no token"):
            plan_vocabulary(bundle, nothing, ONE)
    with pytest.raises(DataError, match="may not choose the vocabulary it will judge"):
        plan_vocabulary(bundle, tokens_of(bundle, role="evaluation"), ONE)
    with pytest.raises(DataError, match="another tokenizer"):
        plan_vocabulary(bundle, replace(tokens_of(bundle), tokenizer_sha256="0"), ONE)
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    monkeypatch.setattr(ModelBundle, "quantized", property(lambda _: True))
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        plan_vocabulary(bundle, TEXTS, ONE)
    with pytest.raises(RecipeError, match="Prune first, then quantize"):
        cut_vocabulary(bundle, plan)


def test_added_tokens_without_a_row_stay_in_the_tokenizer(tiny_bundle: Any, worded_tokenizer: Any) -> None:
    bundle = ModelBundle.from_model(tiny_bundle(vocab_size=TOKENS - 1).model, worded_tokenizer(), name="short")
    pruned = cut_vocabulary(bundle, plan_vocabulary(bundle, TEXTS, ONE))
    assert pruned.tokenizer.convert_tokens_to_ids("<tool>") == pruned.anatomy.vocab
    short = ModelBundle.from_model(tiny_bundle(vocab_size=TOKENS - 2).model, worded_tokenizer(), name="shorter")
    with pytest.raises(UnsupportedModel, match="embeds 345 tokens, but the tokenizer has 1 more"):
        plan_vocabulary(short, TEXTS, ONE)


def test_options() -> None:
    with pytest.raises(RecipeError, match=r"keep=1.5 .*size=0 .*min_count=-1 .*multiple=0 .*needed: one of them"):
        VocabularyOptions(keep=1.5, size=0, min_count=-1, multiple=0)
    with pytest.raises(RecipeError, match="keep=0 "):
        VocabularyOptions(keep=0)


def test_settings_of_every_kind() -> None:
    settings = SimpleNamespace(
        bos_token_id=4, eos_token_id=[5, 99], pad_token_id=-1, sep_token_id=99, forced_decoder_ids=[[1, 4], [2, None]],
        force_words_ids=[[4, 5], [[5]]], suppress_tokens=[6], bad_words_ids=[[4, 6], [5, 4]],
        sequence_bias={(4,): 1.0, (6, 4): 2.0},
    )  # fmt: skip
    listed = SimpleNamespace(sequence_bias=[[[4], 1.0], [[6], 2.0]])
    assert named_ids(settings, 10) == {4, 5}
    for given in (settings, listed, None):
        renumber(given, {4: 0, 5: 1})
    assert vars(settings) == {
        "bos_token_id": 0, "eos_token_id": [1], "pad_token_id": -1, "sep_token_id": None,
        "forced_decoder_ids": [[1, 0], [2, None]], "force_words_ids": [[0, 1], [[1]]], "suppress_tokens": None,
        "bad_words_ids": [[1, 0]], "sequence_bias": {(0,): 1.0},
    }  # fmt: skip
    assert listed.sequence_bias == [[[0], 1.0]]


def test_the_map_is_for_two_tokenizers(worded: Any, tmp_path: Path) -> None:
    bundle = worded()
    plan = plan_vocabulary(bundle, TEXTS, ONE)
    pruned = cut_vocabulary(bundle, plan)
    mapped = VocabularyMap.between(bundle.tokenizer, pruned.tokenizer, plan.kept, VOCABULARY)
    assert VocabularyMap.read(tmp_path) is None
    mapped.write(tmp_path)
    data = json.loads((tmp_path / "vocabulary_map.json").read_text())
    assert VocabularyMap.read(tmp_path) == VocabularyMap.from_json(data) == mapped == pruned.vocabulary_map
    mapped.require(bundle.tokenizer, pruned.tokenizer)
    ids = torch.arange(40)[None]
    taught = mapped.kept_logits(logits_of(bundle.model, mapped.old_ids(ids)))
    assert torch.equal(taught, logits_of(pruned.model, ids))
    with pytest.raises(RecipeError, match=r"other tokenizers \(pruned: found \w+ with 347 tokens, needed \w+\)"):
        mapped.require(bundle.tokenizer, bundle.tokenizer)
    with pytest.raises(RecipeError, match="are other ones in the full tokenizer"):
        VocabularyMap.between(bundle.tokenizer, pruned.tokenizer, tuple(range(len(plan.kept))), VOCABULARY)
    with pytest.raises(RecipeError, match="no vocabulary map of schema 1"):
        VocabularyMap.from_json({**data, "schema": 0})
    with pytest.raises(RecipeError, match="ascending"):
        replace(mapped, kept=(2, 1))


@pytest.mark.parametrize(("name", "text"), [("stories260K", "tinystories_valid.txt"), ("pycode-6m", None)])
def test_real_models_keep_what_a_text_uses(assets: Path, name: str, text: str | None) -> None:
    """The text that chose the tokens is encoded as before, and the logits are the full model's."""
    bundle = ModelBundle.load(assets / "models" / name)
    corpus = Path(json.__file__).read_text() if text is None else (assets / "data" / "text" / text).read_text()[:60_000]
    plan = plan_vocabulary(bundle, corpus, VocabularyOptions(multiple=32))
    pruned = cut_vocabulary(bundle, plan)
    assert len(plan.kept) % 32 == 0
    assert len(plan.kept) < (512 if text else 2048)
    old, new = (encode_plain(b.tokenizer, [corpus])[0] for b in (bundle, pruned))
    assert [plan.kept[i] for i in new] == old
    assert pruned.tokenizer.decode(new) == bundle.tokenizer.decode(old)
    kept, ids = torch.tensor(plan.kept), torch.tensor([new[:64]])
    expected = logits_of(bundle.model, kept[ids])[..., kept]
    assert torch.allclose(logits_of(pruned.model, ids), expected, atol=1e-5)
