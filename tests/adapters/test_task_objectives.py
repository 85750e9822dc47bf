"""Answers' log-probabilities, SFT and DPO against their formulas written out one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.adapters.completion_loss import CompletionLoss
from dwindle.adapters.preference_loss import PreferenceLoss, preference_sides, reference_log_probs
from dwindle.adapters.rouge import rouge_l
from dwindle.adapters.task_metrics import greedy_answers, label_scores, same_answer, task_metrics
from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import Record, TaskRecords
from dwindle.adapters.task_tokens import Encoded, Encoder, completion_rows, preference_rows, tokenised
from dwindle.errors import DataError, RecipeError, UnsupportedModel
from dwindle.token_set import TokenSet
from dwindle.train import Objective, TrainOptions, train

Factory = Callable[..., Any]
TASK = TaskOptions("echo", ("a.jsonl",))
PAIRS = TaskOptions("polite", ("a.jsonl",), chosen="good", rejected="bad")
TEMPLATE = ("{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip


@torch.no_grad()
def naive(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """log p(answer | prompt), one sequence, no padding."""
    ids = torch.tensor([[*prompt, *answer]])
    log_probs = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return sum((log_probs[len(prompt) + i - 1, token] for i, token in enumerate(answer)), torch.zeros(()))


def encoded(bundle: Any, options: TaskOptions, *texts: tuple[str, ...]) -> list[Encoded]:
    encoder = Encoder(bundle.tokenizer, options)
    return [encoder.record(Record(t[0], t[1], f"a:{i}", rejected=t[2] if len(t) > 2 else None))
            for i, t in enumerate(texts)]  # fmt: skip


SOME = (("the cat", "sat"), ("a", "long answer about a dog"), ("to the tree and back again", "x"), ("b", "sing"),
        ("where", "in the mat"), ("who", "dog"))  # fmt: skip
TWO = tuple((p, c, c[::-1] + "!") for p, c in SOME)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_the_loss_is_the_mean_over_answer_tokens(tiny_bundle: Factory, family: str) -> None:
    bundle = tiny_bundle(family)
    examples = encoded(bundle, TASK, *SOME)
    loss, parts = CompletionLoss().loss(bundle.model, completion_rows(bundle, examples).ids)
    total = sum(naive(bundle.model, e.prompt, e.answer) for e in examples)
    wanted = -total / sum(len(e.answer) for e in examples)
    assert loss.item() == pytest.approx(float(wanted), abs=2e-6)
    assert parts["answers"] == pytest.approx(loss.item())


def test_replay_has_its_share_of_the_loss(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    examples = encoded(bundle, TASK, *SOME)
    general = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    rows = completion_rows(bundle, examples, general)
    loss, parts = CompletionLoss().loss(bundle.model, rows.ids)
    of_text = -sum(naive(bundle.model, tuple(w[:1].tolist()), tuple(w[1:].tolist())) for w in general) / (2 * 29)
    assert loss.item() == pytest.approx((6 * parts["answers"] + 2 * float(of_text)) / 8, abs=1e-5)
    assert rows.require("train").tokenizer_sha256


@pytest.mark.parametrize("nll_weight", [0.0, 0.3])
def test_dpo_equals_its_formula_with_a_reference_computed_before(tiny_bundle: Factory, nll_weight: float) -> None:
    bundle, other = tiny_bundle(seed=1), tiny_bundle(seed=2)
    pairs = encoded(bundle, PAIRS, *TWO)
    rows = preference_rows(bundle, pairs).ids
    reference = reference_log_probs(other.model, rows, batch_size=4)
    batch = rows[torch.tensor([3, 0, 5])]
    loss, parts = PreferenceLoss(reference, beta=0.2, nll_weight=nll_weight).loss(bundle.model, batch)
    wanted = torch.zeros(())
    for pair in (pairs[3], pairs[0], pairs[5]):
        sides = [naive(bundle.model, pair.prompt, a) - naive(other.model, pair.prompt, a)
                 for a in (pair.answer, pair.rejected)]  # fmt: skip
        wanted = wanted - torch.nn.functional.logsigmoid(0.2 * (sides[0] - sides[1])) / 3
    chosen = [pairs[i] for i in (3, 0, 5)]
    nll = -sum(naive(bundle.model, p.prompt, p.answer) for p in chosen) / sum(len(p.answer) for p in chosen)
    assert loss.item() == pytest.approx(float(wanted + nll_weight * nll), abs=2e-5)
    assert 0 <= parts["ranked"] <= 1


def test_replay_has_its_share_of_dpo_too(tiny_bundle: Factory) -> None:
    bundle, other = tiny_bundle(seed=1), tiny_bundle(seed=2)
    pairs = encoded(bundle, PAIRS, *TWO)
    general = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    alone, mixed = preference_rows(bundle, pairs).ids, preference_rows(bundle, pairs, general).ids
    objective = PreferenceLoss(reference_log_probs(other.model, alone, 8), beta=0.2, nll_weight=0.3)
    without, parts = objective.loss(bundle.model, alone)
    together, mixed_parts = objective.loss(bundle.model, mixed)
    of_text = -sum(naive(bundle.model, tuple(w[:1].tolist()), tuple(w[1:].tolist())) for w in general) / (2 * 49)
    assert together.item() == pytest.approx((6 * without.item() + 2 * float(of_text)) / 8, abs=1e-5)
    assert mixed_parts == pytest.approx(parts, abs=1e-5)
    only_text = objective.loss(bundle.model, mixed[6:])[0]
    assert only_text.item() == pytest.approx(float(of_text), abs=1e-5)


@pytest.mark.parametrize("objective", ["completions", "preferences"])
def test_a_batch_in_pieces_gives_the_same_update(tiny_bundle: Factory, objective: str) -> None:
    """Answers are of unequal lengths, and replay falls into one piece only: a mean of the pieces' means is another."""
    general = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    ended = []
    for pieces in (1, 2, 4):
        bundle = tiny_bundle(seed=1)
        if objective == "completions":
            rows: TokenSet = completion_rows(bundle, encoded(bundle, TASK, *SOME), general)
            loss: Objective = CompletionLoss()
        else:
            rows = preference_rows(bundle, encoded(bundle, PAIRS, *TWO), general)
            reference = reference_log_probs(tiny_bundle(seed=2).model, rows.ids, 8)
            loss = PreferenceLoss(reference, beta=0.2, nll_weight=0.3)
        options = TrainOptions(steps=2, batch_size=8, gradient_accumulation=pieces, learning_rate=1e-2, log_every=1)
        told = train(bundle.model, loss, rows, options)
        ended.append((torch.cat([p.detach().flatten() for p in bundle.model.parameters()]), told.history))
    (weights, lines), *others = ended
    for other, other_lines in others:
        assert (other - weights).abs().max() < 1e-4  # AdamW's first steps are rate * sign(g) where g is near zero
        assert other_lines[0].loss == pytest.approx(lines[0].loss, abs=1e-5)
        assert other_lines[0].parts == pytest.approx(lines[0].parts, abs=1e-5)


def test_dpo_begins_at_log_two_and_its_gradient_raises_the_chosen(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    rows = preference_rows(bundle, encoded(bundle, PAIRS, *TWO)).ids
    objective = PreferenceLoss(reference_log_probs(bundle.model, rows, 8), beta=0.1)
    loss, parts = objective.loss(bundle.model, rows)
    assert loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert parts["margin"] == pytest.approx(0, abs=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert objective.loss(bundle.model, rows)[1]["margin"] > 0
    ids, starts, lengths = preference_sides(rows)
    assert (ids.shape[0], len(starts), len(lengths)) == (12, 12, 12)


def test_label_scores_share_the_prompts_pass(tiny_bundle: Factory) -> None:
    for family in ("llama", "mistral", "gemma3_text"):
        bundle = tiny_bundle(family)
        encoder = Encoder(bundle.tokenizer, TASK)
        prompt = encoder.prompt("the mood at the end of a story is")
        answers = [encoder.answer("the mood at the end of a story is", text) for text in ("glad", "sad", "very calm")]
        found = label_scores(bundle.model, prompt, answers)
        wanted = torch.stack([naive(bundle.model, prompt, answer) for answer in answers])
        assert torch.allclose(found, wanted, atol=2e-5), family
        assert torch.allclose(label_scores(bundle.model, prompt[:1], answers)[0],
                              naive(bundle.model, prompt[:1], answers[0]), atol=2e-5)  # fmt: skip


def test_greedy_answers_equal_one_by_one_decoding(tiny_bundle: Factory) -> None:
    from dwindle.continuation import continued

    bundle = tiny_bundle()
    bundle.model.generation_config.repetition_penalty = 3.0
    examples = encoded(bundle, TASK, *SOME)
    encoder = Encoder(bundle.tokenizer, TASK)
    for example, answer in zip(examples, greedy_answers(bundle, encoder, examples), strict=True):
        length = len(example.prompt) + max(len(e.answer) for e in examples) + 4
        ids = continued(bundle.model, torch.tensor([example.prompt]), length, temperature=0)[0]
        ids = ids[len(example.prompt) :].tolist()
        ids = ids[: ids.index(257)] if 257 in ids else ids
        assert answer == bundle.tokenizer.decode(ids, skip_special_tokens=True)


def test_metrics_of_a_model_that_is_right_and_one_that_is_not(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle(initializer_range=0.4)
    encoder = Encoder(bundle.tokenizer, TASK)
    examples = encoded(bundle, TASK, *SOME)
    own = greedy_answers(bundle, encoder, examples)
    right = [Encoded(Record(e.record.prompt, a.strip(), e.record.place), e.prompt, e.answer)
             for e, a in zip(examples, own, strict=True) if a.strip()]  # fmt: skip
    options = TaskOptions("echo", ("a.jsonl",), metrics=("exact_match", "rouge_l"))
    found = task_metrics(bundle, TaskRecords(options, (), ()), encoder, right)
    assert found["exact_match"] == 1
    wrong = [Encoded(Record("x", "nothing of it", "a:1"), right[0].prompt, right[0].answer)]
    assert task_metrics(bundle, TaskRecords(options, (), ()), encoder, wrong)["exact_match"] == 0
    pairs = encoded(bundle, PAIRS, *TWO)
    rate = task_metrics(bundle, TaskRecords(PAIRS, (), ()), encoder, pairs)["win_rate"]
    wins = [float(naive(bundle.model, p.prompt, p.answer) > naive(bundle.model, p.prompt, p.rejected)) for p in pairs]
    assert rate == pytest.approx(sum(wins) / len(wins))
    labels = ("sat", "long answer about a dog", "x", "sing", "in the mat", "dog")
    graded = TaskOptions("pick", ("a.jsonl",), label="label", labels=labels)
    accuracy = task_metrics(bundle, TaskRecords(graded, (), (), labels), encoder, examples)["label_accuracy"]
    best = [labels[max(range(6), key=lambda i: float(naive(bundle.model, e.prompt, encoder.answer(e.record.prompt,
            labels[i]))))] for e in examples]  # fmt: skip
    assert accuracy == pytest.approx(sum(b == e.record.completion for b, e in zip(best, examples, strict=True)) / 6)


def test_answers_are_compared_by_pattern_where_there_is_one() -> None:
    task = TaskOptions("sums", ("a.jsonl",), answer=r"#### (\S+)")
    assert same_answer("7 and 5 is 12 #### 12", "12.\n#### 12", task)
    assert not same_answer("it is 12", "#### 12", task)
    assert not same_answer("12", "x12", TaskOptions("sums", ("a.jsonl",), answer=r"(x)?12"))
    assert same_answer("Because it RAINED.\nmore", "because it rained", TASK)
    assert not same_answer("because it rained\nmore", "because\nit rained", TASK)


@pytest.mark.parametrize(("candidate", "reference", "wanted"), [
    ("police killed the gunman", "police kill the gunman", 0.75),
    ("the gunman kill police", "police kill the gunman", 0.5),
    ("A long-winded, well 3.5% tale", "a long winded tale of 3 5", 5 / 7),
])  # fmt: skip
def test_rouge_l_is_the_packages(candidate: str, reference: str, wanted: float) -> None:
    assert rouge_l(candidate, reference) == pytest.approx(wanted, abs=1e-6)


def test_chat_templates_surround_prompt_and_answer(worded: Factory) -> None:
    bundle = worded(chat_template=TEMPLATE)
    options = TaskOptions("echo", ("a.jsonl",), system="be kind")
    encoder = Encoder(bundle.tokenizer, options)
    prompt, answer = encoder.prompt("the cat"), encoder.answer("the cat", "sat")
    assert bundle.tokenizer.decode(prompt) == "[system]be kind[user]the cat[assistant]"
    assert bundle.tokenizer.decode(answer) == "sat</s>"
    ended = Encoder(worded(chat_template=TEMPLATE.replace("m['content'] }}", "m['content'] + '</s>' }}")).tokenizer,
                    TaskOptions("echo", ("a.jsonl",)))  # fmt: skip
    assert ended.tokenizer.decode(ended.answer("the cat", "sat")) == "sat</s>"
    plain = Encoder(bundle.tokenizer, TaskOptions("echo", ("a.jsonl",), template="plain"))
    assert plain.tokenizer.decode(plain.answer("the cat", "sat")) == " sat</s>"


def test_templates_that_are_missing_or_rewrite_the_prompt_are_refused(worded: Factory) -> None:
    with pytest.raises(RecipeError, match="the tokenizer has no chat template"):
        Encoder(worded().tokenizer, TaskOptions("echo", ("a.jsonl",), template="chat"))
    with pytest.raises(RecipeError, match="a system message needs a chat template"):
        Encoder(worded().tokenizer, TaskOptions("echo", ("a.jsonl",), system="be kind"))
    bundle = worded(chat_template="{{ messages | length }}" + TEMPLATE)
    with pytest.raises(UnsupportedModel, match="cannot be told apart"):
        Encoder(bundle.tokenizer, TASK).answer("the cat", "sat")


def test_records_longer_than_the_context_are_told(tiny_bundle: Factory) -> None:
    records = (*[Record(f"p{n}", "x", f"a.jsonl:{n}") for n in range(3)], Record("p", "y" * 80, "a.jsonl:9"))
    with pytest.raises(DataError, match=r"1 with more tokens than the context of 64: a\.jsonl:9 \(84\)"):
        tokenised(tiny_bundle(), TaskRecords(TASK, records, records[:1]))
    kept = tokenised(tiny_bundle(), TaskRecords(TaskOptions("echo", ("a",), bad_records="drop"), records, records[:1]))
    assert (len(kept.train), len(kept.skipped)) == (3, 1)
