"""The vocabulary as an axis of the prune step: in one plan with the others, in the budget, in the record, on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, DoesNotFit, RecipeError, UnsupportedModel
from dwindle.measure import Meter
from dwindle.prune import KeepPlan, MaskOptions, PruneOptions, cut_vocabulary, plan, plan_vocabulary, run
from dwindle.prune.plan_table import plan_table
from dwindle.prune.surgery import apply
from dwindle.prune.vocabulary_options import VocabularyOptions
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode, encode_plain, encoding_sha256
from dwindle.vocabulary_map import VocabularyMap, map_between

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2",
            "mixtral", "qwen3_moe"]  # fmt: skip
TEXT = "the cat sat on the mat and the dog ran to the town then the cat and the dog sat on a mat in town " * 6
OTHER = "his long way was in the house of the tree and the bird is to sing a song then her cat sat on the way " * 2
EDITED = "Ġmat"


def tokens_of(bundle: Any, text: str = TEXT, role: Any = "calibration", tokens: int = 16) -> TokenSet:
    ids = torch.tensor(encode_plain(bundle.tokenizer, [text])[0])
    windows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    return TokenSet(windows, role, "text", f"{role}{len(ids)}", len(text), encoding_sha256(bundle.tokenizer))


def evaluation_of(bundle: Any, text: str) -> TokenSet:
    ids = torch.tensor([encode(bundle.tokenizer, text)])
    return TokenSet(ids, "evaluation", "text", "0", len(text), encoding_sha256(bundle.tokenizer))


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_all_axes_in_one_plan(worded: Any, tmp_path: Path, family: str) -> None:
    """The result is the other axes' cut with the kept rows: stock transformers loads it, counts are as predicted."""
    from transformers import AutoModelForCausalLM

    bundle = worded(family)
    before, settings = bundle.content_sha256, bundle.model.generation_config.to_dict()
    data = tokens_of(bundle)
    options = PruneOptions(heads_keep=0.5, vocabulary_keep=0.85, multiple=16,
                           **({"experts_keep": 0.5} if bundle.anatomy.has_experts else {"ffn_keep": 0.5}))  # fmt: skip
    chosen = plan(bundle, options, data)
    pruned, record = run(bundle, options, data, keep_plan=chosen)
    assert bundle.content_sha256 == before
    assert bundle.model.generation_config.to_dict() == settings
    assert chosen.vocabulary is not None
    kept = torch.tensor(chosen.vocabulary.kept)
    assert pruned.anatomy.vocab == chosen.after.vocab == len(kept) == 288
    assert pruned.anatomy.kv_heads == 1
    assert pruned.size().parameters == chosen.parameters_after == record.after.parameters
    assert pruned.size().bytes == 4 * chosen.parameters_after
    others, _ = run(bundle, options, data, keep_plan=replace(chosen, vocabulary=None))
    ids = torch.randint(0, len(kept), (2, 20), generator=torch.Generator().manual_seed(1))
    expected = logits_of(others.model, kept[ids])[..., kept]
    assert torch.allclose(logits_of(pruned.model, ids), expected, atol=1e-5)
    assert record.details["vocabulary"] == [352, 288]
    assert record.details["vocabulary_coverage"] == chosen.vocabulary.coverage == 1
    assert pruned.lineage.steps[-2:] == ("origin", "prune")
    pruned.save(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation=bundle.model.config._attn_implementation
    ).eval()
    assert torch.allclose(logits_of(stock, ids), expected, atol=1e-5)
    loaded = ModelBundle.load(tmp_path / "model")
    assert loaded.vocabulary_map == pruned.vocabulary_map
    assert loaded.content_sha256 == pruned.content_sha256


def test_the_vocabulary_alone_needs_no_scores(worded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, texts = worded(), [TEXT]
    monkeypatch.setattr("dwindle.prune.method.activation_axis_scores", None)
    options = PruneOptions(vocabulary_min_count=1, multiple=1)
    chosen = plan(bundle, options, corpora=texts)
    assert chosen.method == "token counts"
    alone = cut_vocabulary(bundle, plan_vocabulary(bundle, texts, VocabularyOptions(multiple=1)))
    pruned, record = run(bundle, options, corpora=texts)
    ids = torch.arange(30)[None]
    assert torch.equal(logits_of(pruned.model, ids), logits_of(alone.model, ids))
    assert pruned.vocabulary_map == alone.vocabulary_map
    assert record.skipped == ()
    assert run(bundle, options, tokens_of(bundle))[0].content_sha256 == pruned.content_sha256
    both, _ = run(bundle, options, tokens_of(bundle), train=tokens_of(bundle, OTHER, role="train"))
    assert both.anatomy.vocab > pruned.anatomy.vocab


def test_the_plan_is_one_json_to_read_and_edit(worded: Any, tmp_path: Path) -> None:
    bundle = worded()
    data = tokens_of(bundle)
    options = PruneOptions(ffn_keep=0.5, vocabulary_size=300, vocabulary_min_count=0, multiple=1)
    chosen = plan(bundle, options, data)
    chosen.save(tmp_path / "plan.json")
    raw = json.loads((tmp_path / "plan.json").read_text())
    assert KeepPlan.from_json(raw) == chosen
    assert raw["vocabulary"]["kind"] == "vocabulary_plan"
    assert "vocabulary 352 -> 300 (100.000% of" in plan_table(chosen)
    raw["vocabulary"]["tokens"] = [token for token in raw["vocabulary"]["tokens"] if token[2] != EDITED]
    edited = KeepPlan.from_json(raw)
    pruned, _ = run(bundle, options, data, keep_plan=edited)
    assert pruned.size().parameters == edited.parameters_after == chosen.parameters_after - bundle.anatomy.width
    assert EDITED not in pruned.tokenizer.get_vocab()
    raw["vocabulary"]["vocabulary"] = 400
    with pytest.raises(RecipeError, match="tokens of a vocabulary of 400 for one of 352"):
        KeepPlan.from_json(raw)
    del raw["vocabulary"]
    assert KeepPlan.from_json(raw).vocabulary is None
    assert "vocabulary" not in plan_table(KeepPlan.from_json(raw))


def test_a_budget_counts_the_vocabulary_first(worded: Any) -> None:
    bundle = worded()
    data = tokens_of(bundle)
    tokens = {"vocabulary_min_count": 1, "multiple": 8}
    size = plan(bundle, PruneOptions(**tokens), data).parameters_after
    assert plan(bundle, PruneOptions(parameters=size, **tokens), data).after.ffn_width == 64
    fitted = plan(bundle, PruneOptions(bytes=4 * (size - 1000), **tokens), data)
    assert fitted.parameters_after <= size - 1000
    assert fitted.after.vocab == 288
    assert fitted.after.ffn_width < 64 or fitted.after.kv_heads < 2 or fitted.after.layers < 2
    without = plan(bundle, PruneOptions(parameters=size, multiple=8), data)
    assert without.after.vocab == 352
    assert without.after != fitted.after
    pruned, _ = run(bundle, PruneOptions(bytes=4 * (size - 1000), **tokens), data)
    assert pruned.size().bytes == 4 * fitted.parameters_after
    with pytest.raises(DoesNotFit, match="cannot be reached"):
        plan(bundle, PruneOptions(parameters=288 * 32, **tokens), data)


def test_a_turned_width_and_a_head_of_its_own(worded: Any) -> None:
    bundle = worded()
    data = tokens_of(bundle)
    options = PruneOptions(width_keep=0.5, vocabulary_keep=0.85, multiple=16)
    chosen = plan(bundle, options, data)
    assert chosen.rotated
    pruned, _ = run(bundle, options, data, keep_plan=chosen)
    assert not pruned.anatomy.tied
    assert pruned.size().parameters == chosen.parameters_after
    assert pruned.model.lm_head.weight.shape == pruned.model.model.embed_tokens.weight.shape == (288, 16)


def test_learned_masks_beside_it(worded: Any) -> None:
    bundle = worded()
    data, train = tokens_of(bundle), tokens_of(bundle, role="train")
    options = PruneOptions(method="soft_top_k", masks=MaskOptions(steps=2, batch_size=2), ffn_keep=0.5,
                           vocabulary_min_count=1, multiple=16)  # fmt: skip
    pruned, record = run(bundle, options, data, train=train)
    chosen = KeepPlan.from_json(record.details["plan"])
    assert chosen.method == "soft_top_k"
    assert pruned.anatomy.vocab == chosen.after.vocab == 288
    assert pruned.size().parameters == chosen.parameters_after


def test_cut_twice_the_map_leads_to_the_first(worded: Any, tmp_path: Path) -> None:
    bundle = worded()
    first, _ = run(bundle, PruneOptions(vocabulary_min_count=1, multiple=1), corpora=[TEXT + OTHER])
    second, _ = run(first, PruneOptions(vocabulary_min_count=1, multiple=1), corpora=[TEXT])
    assert second.anatomy.vocab < first.anatomy.vocab < 352
    mapped = map_between(bundle, second)
    assert mapped is not None
    new = encode_plain(second.tokenizer, [TEXT])[0]
    assert mapped.old_ids(torch.tensor(new)).tolist() == encode_plain(bundle.tokenizer, [TEXT])[0]
    between = map_between(first, second)
    assert between is not None
    assert between.old_ids(torch.tensor(new)).tolist() == encode_plain(first.tokenizer, [TEXT])[0]
    assert first.vocabulary_map is not None
    assert first.vocabulary_map.then(between) == mapped == second.vocabulary_map
    with pytest.raises(RecipeError, match=r"the second leads to 352 tokens .* Join maps of one model"):
        mapped.then(mapped)
    second.save(tmp_path / "model")
    (tmp_path / "model" / "vocabulary_map.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"vocabulary_map.json cannot be read .*no vocabulary map of schema 1"):
        ModelBundle.load(tmp_path / "model")


def test_measures_against_the_full_teacher(worded: Any) -> None:
    """KL and agreement are those of the kept tokens: by hand, straight from the definition."""
    teacher = worded(seed=1)
    student, _ = run(worded(seed=2), PruneOptions(vocabulary_min_count=1, multiple=1), corpora=[TEXT])
    found = Meter(evaluation_of(student, OTHER), teacher).measure(student)
    mapped = student.vocabulary_map
    assert mapped is not None
    ids, kl, agreed, nats = encode(student.tokenizer, OTHER), 0.0, 0.0, 0.0
    assert len(ids) > len(encode(teacher.tokenizer, OTHER))
    for start in range(0, len(ids) - 1, 64):
        window = torch.tensor([ids[start : start + 64][: len(ids) - 1 - start]])
        q = logits_of(student.model, window)[0].double().log_softmax(-1)
        p = logits_of(teacher.model, mapped.old_ids(window))[0].double()[:, list(mapped.kept)].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
        targets = torch.tensor(ids[start + 1 : start + 65])
        nats -= float(q[range(len(targets)), targets].sum())
    count = len(ids) - 1
    assert found.kl_nats_per_token == pytest.approx(kl / count, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreed / count)
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-5)
    again = Meter(evaluation_of(student, OTHER), teacher)
    assert again.measure(student) == again.measure(student) == found


def test_unused_tokens_cost_nothing(worded: Any) -> None:
    """Text of kept tokens is read as before; KL from the full model is 0, and bits/byte fall: no share is lost."""
    bundle = worded()
    pruned, _ = run(bundle, PruneOptions(vocabulary_min_count=1, multiple=1), corpora=[TEXT])
    full = Meter(evaluation_of(bundle, TEXT), bundle).measure(bundle)
    cut = Meter(evaluation_of(pruned, TEXT), bundle).measure(pruned)
    assert cut.kl_nats_per_token == pytest.approx(0, abs=1e-6)
    assert cut.top1_agreement == 1
    assert cut.bits_per_byte < full.bits_per_byte


def test_a_full_teacher_of_another_map_is_refused(worded: Any, tiny_bundle: Any) -> None:
    bundle = worded()
    student, _ = run(bundle, PruneOptions(vocabulary_min_count=1, multiple=1), corpora=[TEXT])
    stranger = worded()
    stranger.tokenizer.add_tokens(["<new>"])
    found, needed = encoding_sha256(stranger.tokenizer)[:12], encoding_sha256(bundle.tokenizer)[:12]
    with pytest.raises(UnsupportedModel, match=rf"full: found {found} with 348 tokens, needed {needed}"):
        map_between(stranger, student)
    with pytest.raises(UnsupportedModel, match=r"has 352 entries, the student's 288, and nothing says which token"):
        map_between(bundle, replace(student, vocabulary_map=None))
    short = replace(bundle, anatomy=tiny_bundle(vocab_size=350).anatomy)
    with pytest.raises(UnsupportedModel, match=r"the student's map leads to a vocabulary of 352"):
        map_between(short, student)
    sibling, _ = run(bundle, PruneOptions(vocabulary_size=288, vocabulary_min_count=0, multiple=1), corpora=[OTHER])
    assert sibling.anatomy.vocab == student.anatomy.vocab
    with pytest.raises(UnsupportedModel, match="made for other tokenizers"):
        map_between(sibling, student)
    assert map_between(student, student) is None
    assert VocabularyMap(9, (1,), "a", "b").within(VocabularyMap(9, (0, 2), "a", "c")) is None


def test_what_cannot_be_cut(worded: Any, tiny_bundle: Any) -> None:
    bundle = worded()
    data = tokens_of(bundle)
    with pytest.raises(RecipeError, match=r"Give\s+calibration or training data"):
        plan(bundle, PruneOptions(vocabulary_keep=0.9, method="magnitude"))
    with pytest.raises(RecipeError, match=r"100 of 352 .* but 260 cannot go.*smallest reachable size is 260"):
        plan(bundle, PruneOptions(vocabulary_size=100, multiple=1), data)
    with pytest.raises(RecipeError, match="all 352 tokens stay"):
        plan(bundle, PruneOptions(vocabulary_min_count=0), data)
    with pytest.raises(DataError, match="may not choose the vocabulary"):
        plan(bundle, PruneOptions(vocabulary_min_count=1), corpora=tokens_of(bundle, role="evaluation"))
    with pytest.raises(RecipeError, match=r"vocabulary_keep=0.5 and vocabulary_size=9 \(needed: one of them\)"):
        PruneOptions(vocabulary_keep=0.5, vocabulary_size=9)
    with pytest.raises(RecipeError, match=r"vocabulary_keep=0 .*vocabulary_size=0 .*vocabulary_min_count=-1 "):
        PruneOptions(vocabulary_keep=0, vocabulary_size=0, vocabulary_min_count=-1)
    made = plan(bundle, PruneOptions(vocabulary_min_count=1, multiple=1), data)
    renamed = replace(bundle, tokenizer=worded().tokenizer)
    renamed.tokenizer.add_tokens(["<new>"])
    with pytest.raises(RecipeError, match="vocabulary plan: made for another tokenizer"):
        run(renamed, PruneOptions(), data, keep_plan=made)
    assert apply(bundle, made).config.vocab_size == 352


def test_a_tokenizer_that_cannot_be_rebuilt(tiny_bundle: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    bundle = ModelBundle.from_model(tiny_bundle().model, words, name="words")
    with pytest.raises(UnsupportedModel, match="its model is WordLevel"):
        plan(bundle, PruneOptions(vocabulary_min_count=1), corpora=["the cat"])


def test_a_real_model_loses_nothing_by_tokens_it_does_not_use(assets: Path) -> None:
    """pycode-6m (4,096 tokens) cut to what one module uses: KL 0 from the full model on it, and no more bits/byte."""
    bundle, text = ModelBundle.load(assets / "models" / "pycode-6m"), Path(json.__file__).read_text()
    pruned, record = run(bundle, PruneOptions(vocabulary_keep=0.5), corpora=[text])
    assert record.details["vocabulary"][1] <= 2048
    assert record.details["vocabulary_coverage"] == 1
    full = Meter(evaluation_of(bundle, text[:4000]), context=256).measure(bundle)
    cut = Meter(evaluation_of(pruned, text[:4000]), bundle, context=256).measure(pruned)
    assert cut.kl_nats_per_token == pytest.approx(0, abs=1e-5)
    assert full.bits_per_byte is not None
    assert cut.bits_per_byte is not None
    assert cut.bits_per_byte <= full.bits_per_byte
