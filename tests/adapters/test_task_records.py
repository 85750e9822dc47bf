"""Task data: every form and file loads by a declared schema, and every bad record is told at once."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import read_task
from dwindle.errors import DataError, RecipeError

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(20)]


def jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl_json_csv_parquet_and_saved_data_sets_give_the_same_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS}))
    (tmp_path / "lists.json").write_text(json.dumps([list(row.values()) for row in ROWS]))
    with (tmp_path / "rows.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
    wanted = read_task(TaskOptions("sum", (jsonl(tmp_path / "rows.jsonl", ROWS),)))
    assert (len(wanted.train), len(wanted.held_out)) == (18, 2)
    for place in ("rows.json::train", "rows.csv", "rows.parquet", "saved", "lists.json"):
        columns = ("prompt", "completion") if place == "lists.json" else ()
        found = read_task(TaskOptions("sum", (str(tmp_path / place),), columns=columns))
        texts = [(r.prompt, r.completion) for r in (*found.train, *found.held_out)]
        assert texts == [(r.prompt, r.completion) for r in (*wanted.train, *wanted.held_out)], place


def test_class_labels_of_data_sets_come_back_as_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "mood": datasets.ClassLabel(names=["sad", "glad"])})
    rows = {"text": [f"text {n}" for n in range(11)], "mood": [*(n % 2 for n in range(10)), -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    options = TaskOptions("mood", (str(tmp_path / "saved"),), prompt="text", label="mood", bad_records="drop")
    found = read_task(options)
    assert found.labels == ("glad", "sad")
    assert "empty label" in found.skipped[0].why + found.skipped[0].what


def test_templates_join_columns_and_prompts_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"i": f"Spell {n % 7}", "x": "", "out": f"answer {n}"} for n in range(40)]
    found = read_task(TaskOptions("spell", (jsonl(tmp_path / "a.jsonl", rows),), prompt="{i}\n{x}", completion="out",
                                  held_out_share=0.3))  # fmt: skip
    assert not {r.prompt for r in found.train} & {r.prompt for r in found.held_out}
    assert len(found.train) + len(found.held_out) == 40
    assert found.train[0].prompt.startswith("Spell ")
    assert read_task(found.options) == found
    assert read_task(found.options, seed=1) != found


def test_prompts_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    train, test = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", ROWS[:5])
    found = read_task(TaskOptions("sum", (train,), held_out=(test,)))
    assert (len(found.train), len(found.held_out)) == (15, 5)
    assert "5 training records" in found.skipped[0].what
    with pytest.raises(DataError, match=r"0 records to train on, 20 held out; both are needed \(20 have prompts"):
        read_task(TaskOptions("sum", (train,), held_out=(train,)))


def test_traces_are_records_of_their_own(tmp_path: Path) -> None:
    rows = [{**row, "work": f"Try 1. No. So {row['completion']}"} for row in ROWS]
    options = TaskOptions("sum", (jsonl(tmp_path / "a.jsonl", rows),), traces="work", trace_prompt="{prompt} Think.")
    found = read_task(options)
    traces = [r for r in found.train if r.is_trace]
    assert len(traces) == len([r for r in found.train if not r.is_trace])
    assert traces[0].prompt.endswith(" Think.")
    assert traces[0].completion.startswith("Try 1.")
    held = {r.prompt for r in found.held_out if not r.is_trace}
    assert held == {r.prompt.removesuffix(" Think.") for r in found.held_out if r.is_trace}
    apart = read_task(replace(options, held_out=(jsonl(tmp_path / "b.jsonl", rows[:5]),)))
    assert {r.asked for r in apart.train if r.is_trace} == {row["prompt"] for row in rows[5:]}


def test_a_checker_leaves_out_traces_that_do_not_arrive(tmp_path: Path) -> None:
    rows = [{**row, "work": f"Try again. So {row['completion'] if n % 4 else 'seven'}."} for n, row in enumerate(ROWS)]
    options = TaskOptions("sum", (jsonl(tmp_path / "a.jsonl", rows),), traces="work", checker="contains:reference")
    found = read_task(options)
    traces = [r for r in (*found.train, *found.held_out) if r.is_trace]
    assert len(traces) == 15
    assert "5 answers" in found.skipped[0].what
    assert "a.jsonl:1 (" in found.skipped[0].why
    with pytest.raises(RecipeError, match=r"checker 'contans' is unknown \(did you mean 'contains'\?\)"):
        read_task(replace(options, checker="contans"))


def test_a_checker_holds_every_file_to_its_own_answers(tmp_path: Path) -> None:
    places = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name} {n}", "completion": f"{name}{n}"} for n in range(10)]
        places.append(jsonl(tmp_path / name / "same.jsonl", rows))
    found = read_task(TaskOptions("sum", tuple(places), checker="exact"))
    assert len(found.train) + len(found.held_out) == 20


def test_columns_named_by_numbers_are_filled_in(tmp_path: Path) -> None:
    place = jsonl(tmp_path / "a.jsonl", [{"0": f"q{n}", "1": "{a}"} for n in range(4)])
    found = read_task(TaskOptions("sum", (place,), prompt="{0}!", completion="{{{1}}}"))
    assert {(r.prompt[0], r.prompt[2:], r.completion) for r in found.train} == {("q", "!", "{{a}}")}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "saved"])
def test_an_entry_that_a_place_cannot_have_is_refused(tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="Leave '::test' out"):
        read_task(TaskOptions("sum", (f"{tmp_path / name}::test",)))
    with pytest.raises(DataError, match="no entry or split is named"):
        read_task(TaskOptions("sum", (f"{tmp_path / name}::",)))


def test_every_bad_record_is_told_by_kind(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "", "completion": "x"}, {"prompt": "a", "completion": " "}, {"prompt": "b"}, "no json {",
            [1, 2], {"prompt": "c", "completion": {"text": "d"}}]  # fmt: skip
    place = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        read_task(TaskOptions("sum", (place,)))
    told = str(error.value)
    assert "1 with empty prompt: a.jsonl:21" in told
    assert "2 with empty completion: a.jsonl:22, a.jsonl:23" in told
    assert "no JSON" in told
    assert "a.jsonl:24" in told
    assert "a list of 2 values" in told
    assert "1 with a dict in column 'completion', where text is needed: a.jsonl:26" in told
    kept = read_task(TaskOptions("sum", (place,), bad_records="drop"))
    assert len(kept.train) + len(kept.held_out) == 20
    assert len(kept.skipped) == 5


def test_labels_outside_the_set_are_told_with_the_nearest(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "mood": "glad" if n % 2 else "sad"} for n in range(10)] + [{"text": "x", "mood": "gladd"}]
    place = jsonl(tmp_path / "a.jsonl", rows)
    options = TaskOptions("mood", (place,), prompt="text", label="mood", labels=("glad", "sad"))
    with pytest.raises(DataError, match=r"1 with a label outside the label set: a\.jsonl:11 \(gladd, nearest: glad\)"):
        read_task(options)


def test_pairs_with_equal_sides_and_empty_ones_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "good": "yes", "bad": "no"} for n in range(6)]
    rows += [{"prompt": "q", "good": "same ", "bad": "same"}, {"prompt": "r", "good": "yes", "bad": ""}]
    options = TaskOptions("polite", (jsonl(tmp_path / "a.jsonl", rows),), chosen="good", rejected="bad")
    with pytest.raises(DataError, match=r"1 with equal sides: a\.jsonl:7\n  1 with empty rejected: a\.jsonl:8"):
        read_task(options)


def test_a_right_answer_must_be_among_its_choices(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "a", "choices": ["a", "b"]},
        {"prompt": "q", "completion": "c", "choices": []},
    ]
    options = TaskOptions("pick", (jsonl(tmp_path / "a.jsonl", rows),), choices="choices")
    assert "label_accuracy" in options.measures
    with pytest.raises(DataError, match=r"1 with a completion that is none of its choices: a\.jsonl:2"):
        read_task(options)


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompt": "promt"}, r"prompt: no column 'promt' \(did you mean 'prompt'\?\)"),
    ({"completion": "{completion} {anser}"}, r"completion: no column 'anser'"),
    ({"traces": "work"}, r"traces: no column 'work'"),
])  # fmt: skip
def test_a_schema_that_does_not_match_names_the_columns(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    place = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=words + ".*The columns are prompt, completion"):
        read_task(TaskOptions("sum", (place,), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.json", "{\"train\": []}", r"a JSON object; name one of its entries: .*a\.json::train"),
    ("a.json", "3", "a JSON int"),
    ("a.json", "[", "no JSON"),
    ("a.xml", "<a/>", r"read from \.jsonl, \.json, \.csv and \.parquet, not from \.xml"),
    ("a.jsonl", "\n", "no rows"),
    ("a.jsonl", "[1, 2]\n3\n", r"none of 2 rows can be read: a\.jsonl:1: a list of 2 values \(name them with columns\)"),
    ("a.jsonl", '{"prompt": "p", "completion": "c"}', "0 records to train on|both are needed"),
    ("a.parquet", "x", "no readable parquet"),
])  # fmt: skip
def test_places_that_cannot_be_read_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_task(TaskOptions("sum", (str(tmp_path / name),)))


def test_missing_places_splits_and_encodings_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="no such file"):
        read_task(TaskOptions("sum", (str(tmp_path / "none.csv"),)))
    with pytest.raises(DataError, match="could not be read"):
        read_task(TaskOptions("sum", ("nobody/no-such-data-set",)))
    (tmp_path / "latin.csv").write_bytes("prompt,completion\nä,ö\n".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8"):
        read_task(TaskOptions("sum", (str(tmp_path / "latin.csv"),)))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no split 'tst' \(did you mean 'test'\?\)"):
        read_task(TaskOptions("sum", (f"{tmp_path / 'saved'}::tst",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data set can be read"):
        read_task(TaskOptions("sum", (str(tmp_path / "empty"),)))
    (tmp_path / "a.json").write_text('{"train": []}')
    with pytest.raises(DataError, match=r"no entry 'trian' \(did you mean 'train'\?\)"):
        read_task(TaskOptions("sum", (f"{tmp_path / 'a.json'}::trian",)))


@pytest.mark.parametrize(("values", "words"), [
    ({"chosen": "a"}, "chosen and rejected go together"),
    ({"completion": "a", "label": "b"}, "completion and label exclude each other"),
    ({"labels": ("a",)}, "label names no column"),
    ({"label": "a", "choices": "b"}, "choices are for tasks with completions"),
    ({"label": "a", "traces": "b"}, "traces are for tasks with completions"),
    ({"metrics": ("rogue_l",)}, r"rogue_l is unknown \(did you mean 'rouge_l'\?\)"),
    ({"metrics": ("win_rate",)}, "win_rate cannot be measured on completions"),
    ({"metrics": ("label_accuracy",)}, "label_accuracy needs choices or labels"),
    ({"name": "../a"}, "must begin with a letter"),
    ({"data": ()}, "at least one place"),
    ({"held_out_share": 1}, "between 0 and 1"),
    ({"max_records": 0}, "at least 1, or none"),
    ({"template": "jinja"}, "auto, chat or plain"),
    ({"bad_records": "ignore"}, "refuse or drop"),
    ({"prompt": "{a"}, "is no template"),
    ({"prompt": "{a.b}"}, r"\{a\.b\} is no column"),
    ({"answer": "("}, "no regular expression"),
    ({"answer": "a"}, "has no group"),
])  # fmt: skip
def test_schemas_that_cannot_be_meant_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        TaskOptions(**{"name": "sum", "data": ("a.csv",), **values})


def test_the_real_sets_load_by_a_declared_schema(assets: Path) -> None:
    data = assets / "data"
    bank = read_task(TaskOptions("bank", (str(data / "tasks/banking77_train.csv"),), prompt="text", label="category",
                                 held_out=(str(data / "tasks/banking77_test.csv"),)))  # fmt: skip
    assert len(bank.labels) == 77
    clinc = str(data / "tasks/clinc150_small.json")
    intents = read_task(TaskOptions("intents", (f"{clinc}::train", f"{clinc}::oos_train"), columns=("text", "intent"),
                                    prompt="text", label="intent", held_out=(f"{clinc}::test",)))  # fmt: skip
    assert len(intents.labels) == 151
    instruct = TaskOptions("instruct", (str(data / "instruct/instruction-data.json"),), prompt="{instruction}\n{input}",
                           completion="output")  # fmt: skip
    assert len(read_task(instruct).train) > 900
    pairs = TaskOptions("polite", (str(data / "preference/instruction-data-with-preference.json"),),
                        prompt="{instruction}\n{input}", chosen="chosen", rejected="rejected", bad_records="drop")  # fmt: skip
    assert len(read_task(pairs).train) > 900
    sums = TaskOptions("sums", (str(data / "math/gsm8k_train.jsonl"),), prompt="question", completion="answer",
                       answer=r"#### (.*)")  # fmt: skip
    assert len(read_task(sums).train) > 6000
