"""Answers from torch and from exported artifacts: the same greedy text, one prefill for many, and the best of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle import export
from dwindle.checkers import Verdict
from dwindle.errors import DataError, RecipeError
from dwindle.export import ExportOptions
from dwindle.export.best_of import Candidate, best, curve, reward_scores
from dwindle.export.generation import Answer, log_probability, sampled_answers
from dwindle.export.torch_runner import TorchRunner
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized
from dwindle.sampling import SamplingOptions

Factory = Callable[..., Any]
PROMPT = torch.arange(60, 72)[None]
GREEDY = SamplingOptions(temperature=0.0, max_tokens=12)
WARM = SamplingOptions(temperature=1.0, max_tokens=10, seed=3)


class Counting:
    """A runner that counts the tokens it is fed."""

    def __init__(self, runner: Any) -> None:
        self._runner, self.fed, self.context = runner, [], runner.context

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self.fed.append(ids.shape[1])
        return self._runner.step(ids)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def stock(bundle: Any, tokens: int) -> tuple[int, ...]:
    """Return the greedy continuation of the stock model, without a cache."""
    ids = PROMPT
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, bundle.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tuple(int(i) for i in ids[0, PROMPT.shape[1] :])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("operators", [None, "fused", "plain"])
def test_greedy_and_sampled_text_is_the_stock_models(
    family: str, operators: Any, tiny_bundle: Factory, tmp_path: Path
) -> None:
    bundle = tiny_bundle(family)
    runner: Any = TorchRunner(bundle)
    if operators is not None:
        options = ExportOptions(formats=("onnx",), operators=operators, decode_steps=2, longest_tokens=8)
        export.run(bundle, options, tmp_path)
        runner = export.open_artifact(tmp_path / "onnx")
    counting = Counting(runner)
    (answer,) = sampled_answers(counting, PROMPT, GREEDY, ())
    assert answer.ids == stock(bundle, 12)
    assert (answer.tokens, answer.end) == (12, None)
    counting.fed.clear()
    found = list(sampled_answers(counting, PROMPT, WARM, (), 4))
    assert counting.fed == [12, *[1] * 36], "the prompt is computed once, the last token of an answer never"
    assert len({one.ids for one in found}) > 1
    again = list(sampled_answers(TorchRunner(bundle), PROMPT, WARM, (), 4))
    assert [one.ids for one in again] == [one.ids for one in found]
    for one in found:
        assert one.mean_log_probability == pytest.approx(log_probability(runner, PROMPT, one), abs=1e-4)


def test_an_answer_ends_at_an_end_or_with_the_context(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    greedy = stock(bundle, 12)
    end = next(token for i, token in enumerate(greedy) if token not in greedy[:i] and i > 0)
    place = greedy.index(end)
    (answer,) = sampled_answers(TorchRunner(bundle), PROMPT, GREEDY, {end})
    assert (answer.ids, answer.end, answer.tokens) == (greedy[:place], end, place + 1)
    (answer,) = sampled_answers(TorchRunner(bundle), torch.arange(60)[None], GREEDY, ())
    assert (len(answer.ids), answer.end) == (4, None)


def test_what_cannot_be_sampled_is_refused(tiny_bundle: Factory) -> None:
    runner = TorchRunner(tiny_bundle())
    with pytest.raises(RecipeError, match="best_of=0"):
        list(sampled_answers(runner, PROMPT, WARM, (), 0))
    with pytest.raises(RecipeError, match="all answers would be equal"):
        list(sampled_answers(runner, PROMPT, GREEDY, (), 2))
    for prompt in (torch.zeros(1, 0, dtype=torch.int64), torch.arange(64)[None]):
        with pytest.raises(DataError, match="1 to 63 fit into the context of 64"):
            list(sampled_answers(runner, prompt, WARM, ()))
    with pytest.raises(RecipeError, match="context of 64 tokens; 65 were fed"):
        runner.step(torch.zeros(1, 65, dtype=torch.int64))


def test_torch_takes_adapters_and_is_itself_again(tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path) -> None:
    from dwindle.adapters import Adapter
    from dwindle.errors import UnsupportedModel

    bundle = quantized(tiny_bundle(), QuantizeOptions(scheme="integer", bits=4))[0]
    folder = write_adapter(bundle, tmp_path / "a", kind="dora")
    with torch.no_grad():
        before = bundle.model(PROMPT).logits[0]
        wanted = Adapter.load(folder).on(bundle).model(PROMPT).logits[0]
    runner = TorchRunner(bundle)
    assert runner.load_adapter(folder) == "a"
    assert list(runner.adapters) == ["a"]
    for name in ("a", None, "a"):
        runner.activate(name)
        assert (runner.step(PROMPT) - (before if name is None else wanted)).abs().max() < 1e-4
    runner.close()
    with torch.no_grad():
        assert torch.equal(bundle.model(PROMPT).logits[0], before)
    with pytest.raises(RecipeError, match="trained on tiny"):
        runner.load_adapter(write_adapter(tiny_bundle(seed=2), tmp_path / "other"))
    with pytest.raises(UnsupportedModel, match=r"no adapter_card\.json"):
        runner.load_adapter(tmp_path)


def candidate(passed: bool | None, log_p: float, reward: float | None = None, tokens: int = 2) -> Candidate:
    verdict = None if passed is None else Verdict(passed, "")
    return Candidate(Answer((1,), log_p * tokens, tokens, 2), "", verdict, reward)


def test_the_best_is_picked_by_its_verifier() -> None:
    found = [candidate(False, -0.1), candidate(True, -0.9), candidate(True, -0.5)]
    assert best(found, by_checker=True) == 2
    assert best(found, by_checker=False) == 0
    assert best([candidate(False, -0.3), candidate(False, -0.2)], by_checker=True) == 1
    assert best([candidate(True, -0.1, reward=0.1), candidate(False, -0.9, reward=0.4)], by_checker=False) == 1


def test_accuracy_against_n_counts_the_first_n() -> None:
    prompts = [[candidate(False, -0.1), candidate(True, -0.2), candidate(False, -0.3)],
               [candidate(True, -0.5), candidate(False, -0.4), candidate(False, -0.1, tokens=5)]]  # fmt: skip
    rows = curve(prompts, lambda found: best(found, by_checker=True))
    assert [(row.n, row.accuracy, row.solved, row.tokens) for row in rows] == [
        (1, 0.5, 0.5, 2.0), (2, 1.0, 1.0, 4.0), (3, 1.0, 1.0, 7.5)]  # fmt: skip
    rows = curve(prompts, lambda found: best(found, by_checker=False), verifier_passes=2)
    assert [(row.n, row.accuracy, row.verifier_tokens) for row in rows] == [
        (1, 0.5, 4.0),
        (2, 0.0, 8.0),
        (3, 0.0, 15.0),
    ]
    assert curve([[candidate(None, -1.0)]], lambda found: 0)[0].accuracy is None


def test_a_reward_is_what_an_adapter_favours_over_its_base(
    tiny_bundle: Factory, write_adapter: Factory, tmp_path: Path
) -> None:
    bundle = tiny_bundle()
    runner = TorchRunner(bundle)
    runner.load_adapter(write_adapter(bundle, tmp_path / "liked", seed=8))
    runner.activate("liked")
    (favoured,) = sampled_answers(runner, PROMPT, GREEDY, ())
    runner.activate(None)
    (plain,) = sampled_answers(runner, PROMPT, GREEDY, ())
    first, second = reward_scores(runner, PROMPT, [favoured, plain], "liked")
    assert first > 0 > second
