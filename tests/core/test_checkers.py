"""Checkers: each passes what holds, fails what does not, and says why."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dwindle.checkers import CHECKERS, make_checker
from dwindle.errors import RecipeError
from dwindle.json_schema import check_schema, schema_problem


def check(spec: str, answer: str, record: Mapping[str, Any] | None = None, prompt: str = "") -> tuple[bool, str]:
    verdict = make_checker(spec)(prompt, answer, record or {})
    return verdict.passed, verdict.why


def test_exact_and_contains_read_the_reference() -> None:
    assert check("exact", " 42\n", {"reference": "42"})[0]
    assert not check("exact", "42.", {"answer": "42"})[0]
    assert check("exact:label", "yes", {"label": "yes", "answer": "no"})[0]
    assert check("contains", "it is 42.", {"target": 42})[0]
    assert check("contains", "it is 41.", {"target": 42}) == (False, "'42' not found")
    assert check("exact", "a") == (False, "the record has no reference, answer, completion or target")
    assert check("contains:k", "a") == (False, "the record has no k")


@pytest.mark.parametrize(("answer", "record", "prompt", "passed", "why"), [
    ("48/2 = <<48/2=24>>24, 48 + 24 = <<48+24=72>>72\n#### 72", {"answer": "so\n#### 72"}, "", True, "2 step(s) right, result 72"),
    ("<<48/2=25>>25\n#### 72", {"answer": "#### 72"}, "", False, "48/2 is 24, not 25"),
    ("<<48/2=24>>24\n#### 24", {"answer": "#### 72"}, "", False, "the result is 24, not 72"),
    ("it is 72", {"answer": "72"}, "", False, "no final number (#### 42)"),
    ("10 / 3 = 3.33", {}, "", True, "1 step(s) right"),
    ("10 / 3 = 3", {}, "", False, "10 / 3 is 3.3333333333333335, not 3"),
    ("#### 84", {}, "What is 12 * 7?", True, "0 step(s) right, result 84"),
    ("84", {}, "What is 12 * 7?", True, "0 step(s) right, result 84"),
    ("85", {}, "What is 12 * 7?", False, "the result is 85, not 84"),
    ("five apples", {}, "How many?", False, "nothing to compute"),
    ("<<2**99999=1>>", {}, "", False, "a power 99999 of a number of 2 bits is not computed"),
    ("<<__import__('os').getpid()=1>>", {}, "", False, "\"__import__('os').getpid()\" is not arithmetic (Call)"),
])  # fmt: skip
def test_arithmetic_is_computed(answer: str, record: dict[str, Any], prompt: str, passed: bool, why: str) -> None:
    assert check("arithmetic", answer, record, prompt) == (passed, why)


def test_python_runs_with_the_records_tests() -> None:
    answer = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert check("python", answer) == (True, "runs")
    assert check("python", answer, {"tests": "assert add(1, 2) == 3"}) == (True, "runs, tests pass")
    assert check("python", answer, {"tests": ["assert add(1, 2) == 4"]}) == (False, "AssertionError")
    assert check("python", "def broken(:") == (False, "SyntaxError: invalid syntax")
    assert check("python", "") == (False, "no code")
    assert check("python", "import os; os._exit(0)", {"tests": "assert False"}) == (
        False,
        "the program left before its end",
    )
    assert check("python", "print('x' * (2 << 20))") == (False, "wrote too much output")


def test_json_matches_its_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    assert check("json", '```json\n{"n": 1}\n```', {"schema": schema}) == (True, "matches the schema")
    assert check(f"json:{tmp_path}/s.json", '{"n": "1"}') == (False, "$.n: a string, needed integer")
    assert check("json", "[1]", {"schema": json.dumps(schema)}) == (False, "$: an array, needed object")
    assert check("json", "{}", {}) == (True, "JSON")
    assert not check("json", "{'n': 1}")[0]
    assert check("json", "NaN") == (False, "no JSON (NaN is no JSON)")
    assert not check("json", "[" * 100_000)[0]


@pytest.mark.parametrize(("value", "schema", "problem"), [
    (1, {"enum": [1, 2]}, None),
    (3, {"enum": [1, 2]}, "$: 3 is none of [1, 2]"),
    (True, {"const": 1}, "$: True is not 1"),
    (True, {"type": "number"}, "$: a boolean, needed number"),
    ({"a": 1, "b": 2}, {"properties": {"a": True}, "additionalProperties": False}, "$: b not allowed"),
    ({"a": 1}, {"additionalProperties": {"type": "string"}}, "$.a: an integer, needed string"),
    ([1, 1], {"uniqueItems": True}, "$: an entry stands twice"),
    ("ab", {"minLength": 3}, "$: fewer than 3 characters"),
    ("ab", {"pattern": "^b"}, "$: no match of ^b"),
    (5, {"anyOf": [{"maximum": 4}, {"minimum": 6}]}, "$: 0 of anyOf match"),
    (5, {"oneOf": [{"maximum": 6}, {"minimum": 4}]}, "$: 2 of oneOf match"),
    (5, {"allOf": [{"maximum": 6}, {"multipleOf": 2}]}, "$: no multiple of 2"),
    (5, {"not": {"type": "integer"}}, "$: matches what 'not' forbids"),
    (5, False, "$: nothing is allowed here"),
    ({}, {"required": ["a", "b"]}, "$: a, b missing"),
    (5.0, {"type": ["string", "integer"]}, None),
])  # fmt: skip
def test_the_subset_of_json_schema(value: Any, schema: Any, problem: str | None) -> None:
    check_schema(schema)
    assert schema_problem(value, schema) == problem


@pytest.mark.parametrize(("schema", "said"), [
    ({"minimun": 1}, "'minimun' is not supported .did you mean 'minimum'"),
    ({"properties": {"a": {"$ref": "#"}}}, "properties.a: '\\$ref' is not supported"),
    ({"type": "int"}, "type 'int' is unknown"),
    ({"items": [1]}, "found list"),
    ({"pattern": "("}, "no regular expression"),
])  # fmt: skip
def test_a_schema_that_says_more_than_is_read_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_schema(schema)


def test_regex_is_searched_and_cannot_hang() -> None:
    assert check("regex:^\\d+$", "42") == (True, "found '42'")
    assert check("regex:x:y", "a") == (False, "no match")
    begun = time.monotonic()
    assert check("regex:^(a|aa)+$", "a" * 60 + "c") == (False, "the pattern took longer than 1 s")
    assert (
        check("json", json.dumps("a" * 60 + "c"), {"schema": {"pattern": "^(a|aa)+$"}})[1]
        == "$: the pattern took longer than 1 s"
    )
    assert time.monotonic() - begun < 6


def test_a_script_of_ones_own_decides(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text("import json, sys\ngiven = json.load(sys.stdin)\nprint(len(given['answer']), given['record']['k'])\n"
                      "sys.exit(given['answer'] != given['prompt'])\n")  # fmt: skip
    assert check(f"script:{script}", "ab", {"k": 1}, "ab") == (True, "2 1")
    assert check(f"script:{script}", "abc", {"k": 1}, "ab") == (False, "3 1")
    script.write_text("raise KeyError('no such')")
    assert check(f"script:{script}", "ab") == (False, "KeyError: 'no such'")
    script.write_text("while True: pass")
    assert check(f"script:{script}", "ab") == (False, "ran out of time")
    assert make_checker(f"script:{script}").sha256 is not None


@pytest.mark.parametrize(("spec", "said"), [
    ("exakt", "did you mean 'exact'"),
    ("arithmetic:x", "write arithmetic alone"),
    ("regex:", "write regex:PATTERN"),
    ("regex", "write regex:PATTERN"),
    ("regex:(", "no regular expression"),
    ("script:/no/such.py", "cannot be read .No such file"),
    ("json:/no/such.json", "cannot be read .No such file"),
])  # fmt: skip
def test_a_checker_that_cannot_be_made_says_so(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_checker(spec)


def test_a_schema_file_must_be_json(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(RecipeError, match="no JSON"):
        make_checker(f"json:{tmp_path}/s.json")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="no UTF-8 text"):
        make_checker(f"json:{tmp_path}/b.json")


def test_every_checker_is_described() -> None:
    import dwindle.checkers

    assert all(f"\n    {name}" in str(dwindle.checkers.__doc__) for name in CHECKERS)


def test_numbers_too_large_or_too_small_to_print_are_judged_all_the_same() -> None:
    assert check("arithmetic", "2**2000/3 = 5")[1].startswith("2**2000/3 is 1148")
    assert check("arithmetic", "0.0000001", {"answer": "0.0000001"})[0]
    assert check("arithmetic", "9" * 400 + ".5", {"answer": "3"})[1].endswith("..., not 3")


def test_the_decimals_of_a_bare_number_count() -> None:
    ask = "How much is 10 / 3?"
    assert check("arithmetic", "3.3", prompt=ask)[0]
    assert check("arithmetic", "3.33.", prompt=ask)[0]
    assert not check("arithmetic", "3.30", prompt=ask)[0]


@pytest.mark.parametrize(
    "schema",
    [{"minItems": "2"}, {"maxLength": -1}, {"minimum": "0"}, {"multipleOf": 0}, {"properties": []}, {"enum": 5},
     {"anyOf": {}}, {"required": "n"}, {"type": [["string"]]}],
)  # fmt: skip
def test_a_schema_with_nonsense_behind_a_keyword_is_refused(schema: Any) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(schema))}: .* .needed: "):
        check_schema({"properties": {"n": schema}})


def test_multiples_are_exact() -> None:
    assert schema_problem(0.3, {"multipleOf": 0.1}) is None
    assert schema_problem(10**40 + 1, {"multipleOf": 2}) == "$: no multiple of 2"
    assert schema_problem(1e400, {"multipleOf": 2}) == "$: no multiple of 2"
