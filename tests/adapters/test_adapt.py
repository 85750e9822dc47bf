"""`adapt` end to end on tiny models: it learns the task on the exact codes, resumes exactly, stops early, forgets little."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.adapters import Adapter, AdaptOptions, RecoverOptions, TaskOptions, adapt, read_task, recover
from dwindle.adapters.adapt_options import AdaptStepOptions
from dwindle.adapters.early_stopping import BestAdapter
from dwindle.errors import GateFailed, OutputError, RecipeError
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

pytest.importorskip("peft")
Factory = Callable[..., Any]
OPTIONS = AdaptOptions(rank=4, steps=30, learning_rate=1e-2, batch_size=8, held_out_records=8)
ANIMALS = {"cat": "meow", "dog": "woof", "bird": "tweet"}


@pytest.fixture(scope="module")
def base(tiny_bundle: Factory) -> Any:
    return quantized(tiny_bundle("llama"), QuantizeOptions(scheme="palettize", bits=3))[0]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("task") / "sounds.jsonl"
    rows = [{"prompt": f"{n}: a {a} says", "completion": s, "choices": sorted(ANIMALS.values()), "worse": s[::-1]}
            for n in range(24) for a, s in ANIMALS.items()]  # fmt: skip
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_task(TaskOptions("sounds", (str(place),), choices="choices", separator=" ", licence="MIT"))


@pytest.fixture(scope="module")
def pairs(sounds: Any) -> Any:
    return read_task(TaskOptions("better", sounds.options.data, chosen="completion", rejected="worse"))


def general(bundle: Any, windows: int = 8) -> TokenSet:
    ids = torch.randint(97, 123, (windows, 33), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "train", "letters", "0" * 64, windows * 33, encoding_sha256(bundle.tokenizer))


def test_a_task_is_learned_on_the_exact_codes_and_comes_back_from_its_folder(
    base: Any, sounds: Any, tmp_path: Path
) -> None:
    before = base.content_sha256
    adapter, record = adapt(base, replace(OPTIONS, steps=50), records=sounds, general=general(base))
    told = record.details
    assert told["metrics_after"]["label_accuracy"] >= 0.9 > told["metrics_before"]["label_accuracy"]
    assert told["metrics_after"]["exact_match"] >= 0.5 > told["metrics_before"]["exact_match"]
    assert told["objective"] == "sft"
    assert told["replayed_windows"] == 3
    assert base.content_sha256 == before
    assert record.after.bytes == base.size().bytes + adapter.bytes
    assert min(told["held_out_losses"], key=told["held_out_losses"].get) == str(told["best_step"])
    adapter.save(tmp_path / "sounds")
    again = Adapter.load(tmp_path / "sounds")
    assert again.card == adapter.card
    assert (again.card.task, again.card.licence, again.card.metrics) == ("sounds", "MIT", told["metrics_after"])


def test_preferences_are_learned_from_the_base_with_the_adapter_disabled(base: Any, pairs: Any) -> None:
    options = replace(OPTIONS, dpo_learning_rate=5e-3, held_out_records=24)
    _, record = adapt(base, options, records=pairs)
    assert record.details["first_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert record.details["last_loss"] < 0.5
    assert record.details["metrics_after"]["win_rate"] > record.details["metrics_before"]["win_rate"]


def test_the_reference_is_where_training_starts_unless_the_bare_base_is_named(
    base: Any, pairs: Any, tiny_bundle: Factory
) -> None:
    teacher = tiny_bundle("llama")
    start = recover(base, RecoverOptions(rank=4, steps=5, learning_rate=1e-2, batch_size=2), teacher=teacher,
                    train_tokens=general(base))[0]  # fmt: skip
    options = replace(OPTIONS, steps=1)
    adapter, record = adapt(base, options, records=pairs, start=start)
    assert record.details["first_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert record.details["started_from"] == "recovery"
    assert adapter.card.started_from == start.sha256
    other = adapt(base, replace(options, reference="base"), records=pairs, start=start)[1]
    assert abs(other.details["first_loss"] - 0.6931472) > 1e-4


@pytest.mark.parametrize("preferences", [False, True])
def test_a_cut_off_run_ends_with_the_same_bits(base: Any, sounds: Any, pairs: Any, tmp_path: Path,
                                               preferences: bool) -> None:  # fmt: skip
    class Cut(Exception):
        pass

    def cut(line: Any) -> None:
        if line.step == 8:
            raise Cut

    options = replace(OPTIONS, steps=12, checkpoint_every=5, evaluate_every=3, dropout=0.1, dpo_learning_rate=5e-3)
    records = pairs if preferences else sounds
    whole, told = adapt(base, options, records=records)
    with pytest.raises(Cut):
        adapt(base, options, records=records, folder=tmp_path / "work", on_step=cut)
    resumed, record = adapt(base, options, records=records, folder=tmp_path / "work")
    assert resumed.sha256 == whole.sha256
    assert record.details["held_out_losses"] == told.details["held_out_losses"]
    again = adapt(base, options, records=records, folder=tmp_path / "work")[0]
    assert again.sha256 == whole.sha256


def test_training_ends_when_the_held_out_loss_rises_and_the_best_is_kept(
    base: Any, sounds: Any, tmp_path: Path
) -> None:
    few = replace(sounds, train=sounds.train[:4])
    options = replace(OPTIONS, steps=200, evaluate_every=2, patience=2, learning_rate=5e-2)
    adapter, record = adapt(base, options, records=few, folder=tmp_path / "work")
    told = record.details
    assert told["steps"] < told["planned_steps"] == 200
    assert told["best_step"] == told["steps"] - 4
    again, second = adapt(base, options, records=few, folder=tmp_path / "work")
    assert second.details["held_out_losses"] == told["held_out_losses"]
    assert second.details["best_step"] == told["best_step"]
    assert again.sha256 == adapter.sha256
    assert second.details["steps"] == told["steps"]


def test_where_nothing_is_learned_the_start_is_kept_and_it_is_said(base: Any, sounds: Any) -> None:
    start = adapt(base, replace(OPTIONS, steps=12), records=sounds)[0]
    wild = replace(OPTIONS, steps=2, learning_rate=300.0, warmup_share=0.0)
    adapter, record = adapt(base, wild, records=sounds, start=start)
    assert record.details["best_step"] == 0
    assert "an improvement by adapt (sounds)" in record.skipped[0].what
    assert adapter.sha256 == start.sha256


def test_shapes_and_objectives_that_do_not_go_together_are_refused(base: Any, sounds: Any, pairs: Any) -> None:
    start = adapt(base, replace(OPTIONS, steps=1), records=sounds)[0]
    with pytest.raises(RecipeError, match=r"keeps the shape.*rank=8 \(it has 4\); kind=dora \(it has lora\)"):
        adapt(base, replace(OPTIONS, rank=8, kind="dora"), records=sounds, start=start)
    with pytest.raises(RecipeError, match=r"targets=q \(it has 14 linears\)"):
        adapt(base, replace(OPTIONS, targets=("q",)), records=sounds, start=start)
    with pytest.raises(RecipeError, match=r"'sounds' has completions\. Name its chosen and rejected"):
        adapt(base, replace(OPTIONS, objective="dpo"), records=sounds)
    other = replace(start, card=replace(start.card, base_sha256="0" * 64))
    with pytest.raises(RecipeError, match="trained on"):
        adapt(base, OPTIONS, records=sounds, start=other)
    with pytest.raises(RecipeError, match=r"up_prj \(nearest: up_proj\)"):
        adapt(base, replace(OPTIONS, targets=("up_prj",)), records=sounds)
    with pytest.raises(RecipeError, match="rank=64 is larger than 14 linears"):
        adapt(base, replace(OPTIONS, rank=64), records=sounds)
    assert adapt(base, replace(OPTIONS, steps=1, objective="sft"), records=pairs)[1].details["objective"] == "sft"


@pytest.mark.parametrize(("values", "words"), [
    ({"objective": "ppo"}, "sft or dpo"), ({"epochs": 0}, "epochs=0"), ({"beta": -1}, "beta=-1"),
    ({"reference": "teacher"}, "start or base"), ({"nll_weight": -1}, "nll_weight"), ({"replay": 1}, "replay=1"),
    ({"patience": 0}, "patience=0"), ({"evaluations": 0}, "evaluations=0"), ({"rank": 0}, "rank=0"),
])  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        AdaptOptions(**values)


def test_a_step_has_tasks_of_different_names() -> None:
    task = TaskOptions("a", ("a.jsonl",))
    with pytest.raises(RecipeError, match="no tasks"):
        AdaptStepOptions()
    with pytest.raises(RecipeError, match="tasks of one name: a"):
        AdaptStepOptions(tasks=(task, task))
    assert AdaptStepOptions(tasks=(task,), rank=8).each == AdaptOptions(rank=8)


def test_the_card_tells_the_shape_that_was_taken_over(base: Any, sounds: Any) -> None:
    start, _ = adapt(base, replace(OPTIONS, steps=1, targets=("q",)), records=sounds)
    again, _ = adapt(base, replace(OPTIONS, steps=1, rank=16), records=sounds, start=start)
    found = again.card.options
    assert (found["rank"], found["alpha"], found["kind"]) == (4, 8, "lora")
    assert found["targets"] == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_other_held_out_records_are_another_run(base: Any, sounds: Any, tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=2, held_out_records=8)
    adapt(base, options, records=sounds, folder=tmp_path / "run")
    with pytest.raises(RecipeError, match="another run"):
        adapt(base, replace(options, held_out_records=2), records=sounds, folder=tmp_path / "run")


def test_a_place_in_other_use_is_left_alone_and_equal_adapters_have_equal_files(
    base: Any, sounds: Any, tmp_path: Path
) -> None:
    made, _ = adapt(base, replace(OPTIONS, steps=1), records=sounds)
    made.save(tmp_path / "a")
    made.save(tmp_path / "a")
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(base.anatomy.linear_names())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds something else than an adapter \(thesis\.txt\)"):
        made.save(tmp_path / "b")
    with pytest.raises(OutputError, match="is a file"):
        made.save(tmp_path / "b" / "thesis.txt")
    assert (tmp_path / "b" / "thesis.txt").read_text() == "years of work"


def test_a_held_out_loss_that_is_no_number_fails_the_run(base: Any, tmp_path: Path) -> None:
    best = BestAdapter(lambda _: float("nan"), 3, tmp_path / "run", "0")
    with pytest.raises(GateFailed, match="the held-out loss after 0 steps is nan"):
        best.start(base.model)
