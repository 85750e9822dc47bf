"""Passages, the writer, novelty and the verifier, each against what can be checked by hand or by another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dwindle.continuation import continued
from dwindle.data.document import Document
from dwindle.data.packing import pack_evaluation
from dwindle.data.synthesis.kinds import KINDS, Written
from dwindle.data.synthesis.novelty import Novelty
from dwindle.data.synthesis.options import VerifierOptions
from dwindle.data.synthesis.passages import drawn_passages, passages_of
from dwindle.data.synthesis.verifier import Verifier
from dwindle.data.synthesis.writer import Prompt, Writer
from dwindle.errors import RecipeError
from dwindle.measure import Meter
from dwindle.tokenization import encode_plain

TEXT = "A cat sat. " * 10 + "\n\n" + "The dog ran to the town! " * 4 + "x" * 90 + ". End of it all."


def test_passages_are_whole_sentences_within_the_limit(tiny_tokenizer: Any) -> None:
    found = list(passages_of(Document(TEXT, "s", licence="MIT", id="d"), tiny_tokenizer, 40, 8))
    assert all(8 <= len(p.text) <= 40 for p in found)
    assert all(p.text[-1] in ".!" for p in found)
    assert "x" * 90 not in "".join(p.text for p in found)
    assert [p.number for p in found] == list(range(len(found)))
    assert found[0].licence == "MIT"


def test_passages_are_drawn_the_same_in_any_order(tiny_tokenizer: Any) -> None:
    documents = [Document(f"Text {i} is here. " * 5, "s", id=str(i)) for i in range(30)]
    draw = [
        drawn_passages(d, tiny_tokenizer, count=7, tokens=40, least=8, seed=1) for d in (documents, documents[::-1])
    ]
    assert len(draw[0]) == 7
    assert draw[0] == draw[1]
    other = drawn_passages(documents, tiny_tokenizer, count=7, tokens=40, least=8, seed=2)
    assert other != draw[0]
    assert (
        drawn_passages(documents[:1], tiny_tokenizer, count=99, tokens=200, least=8, seed=1)[0].text
        == documents[0].text.strip()
    )


def test_greedy_text_is_the_models_own_and_padding_changes_nothing(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    writer = Writer(bundle, temperature=0, top_p=1.0, most_tokens=20)
    prompts = [writer.prompt(KINDS["continue"], text, 0, 12) for text in ("a cat", "the dog ran to the town", "x")]
    together = writer.write(prompts, seed=0)
    for prompt, draft in zip(prompts, together, strict=True):
        ids = continued(bundle.model, torch.tensor([prompt.ids]), len(prompt.ids) + 20, temperature=0)[0].tolist()
        said = ids[len(prompt.ids) :]
        end = next((i for i, token in enumerate(said) if token in (256, 257)), 20)
        assert draft.text == bundle.tokenizer.decode(prompt.shown + said[:end], skip_special_tokens=True)
        assert draft.ended == (end < 20)
        assert writer.write([prompt], seed=5)[0] == draft


def test_the_same_seed_draws_the_same_text_and_leaves_torch_alone(tiny_bundle: Callable[..., Any]) -> None:
    writer = Writer(tiny_bundle("llama"), temperature=1.0, top_p=0.9, most_tokens=16)
    prompts = [writer.prompt(KINDS["free:seeded"], "", seed, 8) for seed in range(3)]
    assert len({tuple(p.ids) for p in prompts}) == 3
    state = torch.get_rng_state()
    first = writer.write(prompts, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert writer.write(prompts, seed=7) == first
    assert writer.write(prompts, seed=8) != first


def test_a_template_goes_through_the_chat_template(worded: Callable[..., Any]) -> None:
    chat = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %} then{% endif %}"
    for template, wanted in ((chat, "Say: a cat then"), (None, "Say: a cat\n\nNow:")):
        bundle = worded(chat_template=template)
        writer = Writer(bundle, temperature=1, top_p=1, most_tokens=8)
        kind = KINDS["questions"].__class__("k", "template", "Say: {text}", "Now:")
        assert bundle.tokenizer.decode(writer.prompt(kind, "a cat", 0, 8).ids, skip_special_tokens=True) == wanted


def test_no_room_and_no_beginning_are_said(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(RecipeError, match=r"do not fit into the model's context of 64\. Set a smaller piece_tokens"):
        Writer(bundle, temperature=1, top_p=1, most_tokens=60).prompt(KINDS["rephrase:easy"], "a", 0, 8)
    bundle.tokenizer.bos_token = None
    with pytest.raises(RecipeError, match="this model's tokenizer has none"):
        Writer(bundle, temperature=1, top_p=1, most_tokens=8).prompt(KINDS["free"], "", 0, 8)


def test_novelty_is_the_share_of_known_ngrams() -> None:
    known = Novelty(3)
    known.add_all(["one two three four five", *(f"filler number {i} of many words" for i in range(600))])
    assert known.overlap("One, two, three; four!") == 1.0
    assert known.overlap("one two three and six") == pytest.approx(1 / 3)
    assert known.overlap("filler number 7 of nothing") == pytest.approx(2 / 3)
    assert known.overlap("two three") == 0.0
    assert known.overlap("...") == 0.0


def test_the_verifiers_log_probability_is_the_meters(tiny_bundle: Callable[..., Any]) -> None:
    bundle = tiny_bundle("llama")
    verifier = Verifier(bundle, VerifierOptions("m"))
    for text in ("a cat sat", "the dog ran to the town"):
        one = pack_evaluation(text, [Document(text, "t")], bundle.tokenizer)
        nats = Meter(one).measure(bundle).nats_per_token
        assert verifier.scores([Written(text, "", text)]) == pytest.approx([-nats], abs=1e-4)
    whole = Verifier(bundle, VerifierOptions("m"))._log_probabilities(
        [([256], encode_plain(bundle.tokenizer, ["who?\n\ncat"])[0])]
    )[0][0]
    asked = Verifier(bundle, VerifierOptions("m"))._log_probabilities(
        [([256], encode_plain(bundle.tokenizer, ["who?\n\n"])[0])]
    )[0][0]
    found = verifier.scores([Written("", "who?", "cat"), Written("x" * 200, "", "x" * 200)])
    assert found[0] == pytest.approx((whole - asked) / 3, abs=1e-4)


def test_yes_and_no_share_a_probability(tiny_bundle: Callable[..., Any], worded: Callable[..., Any]) -> None:
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for bundle in (tiny_bundle("llama"), worded(chat_template=chat)):
        found = Verifier(bundle, VerifierOptions("m", "yes_no")).scores(
            [Written("", "who?", "cat"), Written("a text", "", "a text")]
        )
        assert all(0 < p < 1 for p in found)
        assert found[0] != found[1]


def test_a_prompt_is_a_value() -> None:
    assert Prompt([1], []) == Prompt([1], [])
