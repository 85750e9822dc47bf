"""Checkers: does an answer hold? Used to reject synthetic text, to filter traces and to pick the best of several.

    exact              the answer is the record's reference, white space at the ends aside
    contains           the reference stands in the answer
    arithmetic         every sum the answer claims is right, and its last `#### 42` is the reference's (or the prompt's)
    python             the answer's code runs to its end in the sandbox, the record's tests behind it
    json[:SCHEMA.json] the answer is JSON and matches the schema (the record's, unless a file is named)
    regex:PATTERN      the pattern is found in the answer, within a second
    script:FILE        a Python file of one's own, run in the sandbox: JSON {prompt, answer, record} on stdin, exit code
                       0 is a pass, the last line it prints says why

The reference is the record's `reference`, `answer`, `completion` or `target`, the first there is; `exact:KEY` and
`contains:KEY` name another. Tests are the record's `tests` (code, or a list of statements). Code and JSON may stand in
a fenced block. A checker that finds nothing to check does not pass. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import regex

from dwindle.arithmetic import agrees, claimed_steps, final_number, number, value
from dwindle.errors import RecipeError, did_you_mean
from dwindle.json_schema import check_schema, schema_problem
from dwindle.sandbox import SandboxResult, run_python

__all__ = ["CHECKERS", "Checker", "Verdict", "make_checker"]

_REFERENCES = ("reference", "answer", "completion", "target")
_REGEX_SECONDS = 1.0
_FENCE = re.compile(r"```(?:[ \t]*([\w+-]*)[ \t]*)\n(.*?)(?:```|\Z)", re.DOTALL)
_EXPRESSION = re.compile(r"[\d.$(][\d\s.,$%()×÷x*/+-]*[\d)%]")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer passed, and why (not)."""

    passed: bool
    why: str


_Check = Callable[[str, str, Mapping[str, Any]], Verdict]


@dataclass(frozen=True)
class Checker:
    """A checker as it was asked for. Call it with (prompt, answer, record)."""

    spec: str
    check: _Check
    sha256: str | None = None
    """Hash of the script or schema file it reads."""

    def __call__(self, prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        """Return the verdict on an answer."""
        return self.check(prompt, answer, record)


def make_checker(spec: str) -> Checker:
    """Return the checker of a spec; RecipeError for an unknown one or one whose file or pattern cannot be used."""
    name, colon, argument = spec.partition(":")
    if name not in CHECKERS:
        raise RecipeError(f"checker {spec!r} is unknown{did_you_mean(name, CHECKERS)}.")
    wants = _ARGUMENTS.get(name)
    if (colon and not argument) or (wants is None and argument) or (name in ("regex", "script") and not argument):
        raise RecipeError(f"checker {spec!r}: write {name}{f':{wants}' if wants else ' alone'}.")
    check, digest = CHECKERS[name](argument)
    return Checker(spec, check, digest)


def _reference(record: Mapping[str, Any], key: str) -> str | None:
    found = next((record[k] for k in ([key] if key else _REFERENCES) if record.get(k) is not None), None)
    return None if found is None else str(found)


def _no_reference(key: str) -> Verdict:
    return Verdict(False, f"the record has no {key or ', '.join(_REFERENCES[:-1]) + ' or ' + _REFERENCES[-1]}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def _exact(key: str) -> tuple[_Check, None]:
    def check(_prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        wanted = _reference(record, key)
        if wanted is None:
            return _no_reference(key)
        same = answer.strip() == wanted.strip()
        return Verdict(same, "equal" if same else f"{_short(answer)!r} is not {_short(wanted)!r}")

    return check, None


def _contains(key: str) -> tuple[_Check, None]:
    def check(_prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        wanted = _reference(record, key)
        if wanted is None or not wanted.strip():
            return _no_reference(key)
        inside = wanted.strip() in answer
        return Verdict(inside, f"{_short(wanted)!r} {'found' if inside else 'not found'}")

    return check, None


def _arithmetic(_: str) -> tuple[_Check, None]:
    return _arithmetic_verdict, None


def _arithmetic_verdict(prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
    steps = claimed_steps(answer)
    for expression, claimed in steps:
        try:
            true = value(expression)
            right = agrees(true, claimed)
        except ValueError as error:
            return Verdict(False, str(error))
        if not right:
            return Verdict(False, f"{expression} is {_decimal(true)}, not {claimed}")
    wanted = _wanted_number(prompt, record)
    given = final_number(answer)
    if wanted is not None:
        if given is None:
            try:
                number(answer)
                given = answer.strip().rstrip(".")
            except ValueError:
                given = steps[-1][1] if steps else None
        if given is None:
            return Verdict(False, "no final number (#### 42)")
        if not agrees(wanted, given):
            return Verdict(False, f"the result is {_short(given)}, not {_decimal(wanted)}")
    if not steps and wanted is None:
        return Verdict(False, "nothing to compute")
    return Verdict(True, f"{len(steps)} step(s) right" + (f", result {given}" if wanted is not None else ""))


def _wanted_number(prompt: str, record: Mapping[str, Any]) -> Fraction | None:
    """Return the number the answer must come to: the reference's, else that of the one sum in the prompt."""
    reference = _reference(record, "")
    if reference is not None:
        try:
            return number(final_number(reference) or reference)
        except ValueError:
            return None
    sums = [found for found in _EXPRESSION.findall(prompt) if re.search(r"[\d)]\s*[-+*/×÷x]\s*[\d(]", found)]
    try:
        return value(sums[0]) if len(sums) == 1 else None
    except ValueError:
        return None


def _decimal(found: Fraction) -> str:
    """Return a number to be read: whole, as a decimal, or as a fraction where it is too large for one."""
    if found.denominator == 1:
        return _short(str(found.numerator))
    try:
        return str(float(found))
    except OverflowError:
        return _short(str(found))


def _fenced(answer: str, *languages: str) -> str:
    """Return the fenced blocks of a language joined (unnamed ones count), or the whole answer if there are none."""
    blocks = [body for language, body in _FENCE.findall(answer) if not language or language.lower() in languages]
    return "\n".join(blocks) if blocks else answer


def _python(_: str) -> tuple[_Check, None]:
    def check(_prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        code = _fenced(answer, "python", "py", "python3")
        if not code.strip():
            return Verdict(False, "no code")
        tests = record.get("tests") or ""
        tests = tests if isinstance(tests, str) else "\n".join(map(str, tests))
        reached = hashlib.sha256(f"{code}\0{tests}".encode("utf-8", "surrogatepass")).hexdigest()
        result = run_python(f"{code}\n{tests}\nprint({reached!r})\n")
        if result.exit_code == 0 and not result.stdout.endswith(f"{reached}\n"):
            return Verdict(False, "the program left before its end")
        return _ran(result, "runs, tests pass" if tests else "runs")

    return check, None


def _ran(result: SandboxResult, passed: str) -> Verdict:
    if result.timed_out:
        return Verdict(False, "ran out of time")
    if result.truncated:
        return Verdict(False, "wrote too much output")
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    if result.exit_code:
        return Verdict(False, _short(lines[-1]) if lines else f"exit code {result.exit_code}")
    return Verdict(True, passed)


def _json(file: str) -> tuple[_Check, str | None]:
    fixed, digest = None, None
    if file:
        text = _read(file, "json")
        fixed, digest = _schema_of(text, file), hashlib.sha256(text.encode()).hexdigest()

    def check(_prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        try:
            found = json.loads(_fenced(answer, "json"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return Verdict(False, f"no JSON ({_short(str(error))})")
        schema = fixed
        if schema is None and record.get("schema") is not None:
            given = record["schema"]
            schema = _schema_of(given if isinstance(given, str) else json.dumps(given), "the record's schema")
        problem = None if schema is None else schema_problem(found, schema)
        return Verdict(problem is None, problem or ("JSON" if schema is None else "matches the schema"))

    return check, digest


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _schema_of(text: str, where: str) -> Any:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{where}: no JSON ({error}).") from error
    check_schema(schema, where)
    return schema


def _regex(pattern: str) -> tuple[_Check, None]:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise RecipeError(f"checker regex: {pattern!r} is no regular expression ({error}).") from error

    def check(_prompt: str, answer: str, _record: Mapping[str, Any]) -> Verdict:
        try:
            found = compiled.search(answer, timeout=_REGEX_SECONDS)
        except TimeoutError:
            return Verdict(False, f"the pattern took longer than {_REGEX_SECONDS:g} s")
        return Verdict(found is not None, "no match" if found is None else f"found {_short(found[0])!r}")

    return check, None


def _script(file: str) -> tuple[_Check, str]:
    code = _read(file, "script")

    def check(prompt: str, answer: str, record: Mapping[str, Any]) -> Verdict:
        given = json.dumps({"prompt": prompt, "answer": answer, "record": dict(record)}, default=str)
        result = run_python(code, stdin=given)
        said = result.stdout.strip().splitlines()
        verdict = _ran(result, _short(said[-1]) if said else "passed")
        return Verdict(False, _short(said[-1])) if said and result.exit_code and not result.stderr else verdict

    return check, hashlib.sha256(code.encode()).hexdigest()


def _read(file: str, kind: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise RecipeError(f"checker {kind}: {file} cannot be read ({reason}). Correct the path.") from error


CHECKERS: dict[str, Callable[[str], tuple[_Check, str | None]]] = {
    "exact": _exact, "contains": _contains, "arithmetic": _arithmetic, "python": _python, "json": _json,
    "regex": _regex, "script": _script,
}  # fmt: skip
"""Name -> what makes the check from what stands behind the colon."""
_ARGUMENTS = {"exact": "KEY", "contains": "KEY", "json": "SCHEMA.json", "regex": "PATTERN", "script": "FILE"}
