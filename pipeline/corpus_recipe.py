"""A corpus recipe: one YAML file that says sources, stages and splits. Parsing it loads no torch.

    version: 1
    name: stories
    seed: 0
    folders: {assets: /data/assets}        # {assets} in a place; {stdlib} is this Python's standard library
    sources:
      - {name: tales, place: "{assets}/tales.jsonl", licence: MIT, text: story}
    licences: {allowed: [MIT, CC-BY-*], forbidden: []}
    steps:
      - normalization
      - near_duplicates: {edited: 0.8}
    splits: {calibration: 0.01, evaluation: 0.02}
    format: jsonl.zst

`--set` takes dotted keys: `folders.assets=DIR`, `sources.tales.weight=2`, `near_duplicates.edited=0.9`. All mistakes
come in one RecipeError.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, did_you_mean
from dwindle.pipeline.option_values import fill
from dwindle.pipeline.recipe import parse_overrides
from dwindle.pipeline.strict_yaml import read_yaml

if TYPE_CHECKING:
    from dwindle.data.curation.corpus_options import CorpusOptions

__all__ = ["STAGES", "load_corpus_recipe"]

STAGES = {
    "normalization": "curation.normalization:Normalization",
    "exact_duplicates": "curation.exact_duplicates:ExactDuplicates",
    "language": "curation.language:LanguageFilter",
    "quality": "curation.quality:Quality",
    "code_quality": "curation.code_quality:CodeQuality",
    "repetition": "curation.repetition:Repetition",
    "near_duplicates": "curation.clusters:NearDuplicateOptions",
    "decontamination": "curation.decontamination:Decontamination",
    "personal_data": "curation.personal_data:PersonalData",
    "synthesize": "synthesis.stage:Synthesize",
    "teacher_score": "curation.teacher_score:TeacherScore",
    "rebalance": "curation.rebalance:Rebalance",
}
"""Step -> module of `dwindle.data` and type; the type's fields are the step's keys."""

_TOP = ("version", "name", "seed", "folders", "sources", "licences", "steps", "splits", "format")
_LICENCES = ("allowed", "forbidden")
_PLACES = ("place", "teacher", "student", "encoder", "model")
"""Keys whose values may name a folder as {folder}."""


def load_corpus_recipe(path: Path | str, overrides: Iterable[str] = ()) -> CorpusOptions:
    """Return what a corpus recipe says, with `key=value` overrides applied. Raises RecipeError with every mistake."""
    path = Path(path)
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe. One to start from is recipes/corpus.yaml.") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: a folder, needed a recipe: a YAML file that names this folder under sources "
                          "(dwindle data build --help has a small one).") from error  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe ({error}).") from error
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{path}: found {type(raw).__name__}, needed a mapping with the keys {', '.join(_TOP)}. "
                          "Text is named in a recipe (dwindle data build --help has a small one).")  # fmt: skip
    merged = dict(raw)
    for keys, value in parse_overrides(overrides):
        _set(merged, keys, value)
    problems: list[str] = []
    options = _options(merged, problems)
    if problems or options is None:
        many = "s" * (len(problems) > 1)
        raise RecipeError(f"{path}: {len(problems)} mistake{many}:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return options


def _options(raw: dict[str, Any], problems: list[str]) -> CorpusOptions | None:
    from dwindle.data.curation.corpus_options import CorpusOptions

    problems += [f"{key} is unknown{did_you_mean(str(key), _TOP)}." for key in raw if key not in _TOP]
    if raw.get("version") != 1:
        problems.append(f"version: found {raw.get('version')!r}, needed 1.")
    raw = _with_folders(raw, problems)
    licences: Any = raw.get("licences") or {}
    if not isinstance(licences, Mapping):
        problems.append(f"licences: found {licences!r}, needed allowed and forbidden.")
        licences = {}
    problems += [f"licences.{key} is unknown{did_you_mean(str(key), _LICENCES)}." for key in licences
                 if key not in _LICENCES]  # fmt: skip
    values: dict[str, Any] = {
        "sources": raw.get("sources") or (),
        "splits": raw.get("splits") or {},
        **{key: raw[key] for key in ("name", "seed", "format") if key in raw},
        **{f"{key}_licences": licences[key] for key in _LICENCES if key in licences},
    }
    stages = tuple(_stages(raw.get("steps") or (), problems))
    made: CorpusOptions | None = fill(CorpusOptions, values, "corpus", problems)
    try:
        return None if made is None else dataclasses.replace(made, stages=stages)
    except RecipeError as error:
        problems.append(str(error))
        return None


def _stages(listed: Any, problems: list[str]) -> Iterable[Any]:
    if not isinstance(listed, list | tuple):
        problems.append(f"steps: found {listed!r}, needed a list of steps ({', '.join(STAGES)}).")
        return
    for index, entry in enumerate(listed):
        named: Any = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(named, Mapping) or len(named) != 1:
            problems.append(f"steps[{index}]: found {entry!r}, needed one step name with its options.")
            continue
        name, values = next(iter(named.items()))
        if name not in STAGES:
            problems.append(f"steps[{index}].{name} is unknown{did_you_mean(str(name), STAGES)}.")
            continue
        module, _, kind = STAGES[name].partition(":")
        type_ = getattr(importlib.import_module(f"dwindle.data.{module}"), kind)
        made = fill(type_, {} if values is None else values, f"steps[{index}].{name}", problems)
        if made is not None:
            yield _WRAPPED.get(name, lambda options: options)(made)


def _near_duplicates(options: Any) -> Any:
    from dwindle.data.curation.near_duplicates import NearDuplicates

    return NearDuplicates(options)


_WRAPPED: dict[str, Callable[[Any], Any]] = {"near_duplicates": _near_duplicates}


def _with_folders(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the recipe with {folder} in places replaced."""
    given = raw.get("folders") or {}
    if not isinstance(given, Mapping) or not all(isinstance(place, str) for place in given.values()):
        problems.append(f"folders: found {given!r}, needed names and folders.")
        given = {}
    folders = {"stdlib": sysconfig.get_paths()["stdlib"], **given}

    def replaced(match: re.Match[str]) -> str:
        if match[1] not in folders:
            problems.append(f"{{{match[1]}}} names no folder{did_you_mean(match[1], folders)}; "
                            f"give it as --set folders.{match[1]}=DIR.")  # fmt: skip
            return match[0]
        return str(folders[match[1]])

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {k: walk(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        return re.sub(r"\{([\w-]+)\}", replaced, value) if isinstance(value, str) and key in _PLACES else value

    return {key: walk(value, str(key)) for key, value in raw.items() if key != "folders"}


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a dotted key; `sources.NAME` and the name of a step find their entry in the list."""
    where = ".".join(keys)
    if keys[0] in STAGES:
        listed = raw.get("steps") or []
        places = [
            i for i, entry in enumerate(listed) if entry == keys[0] or (isinstance(entry, Mapping) and keys[0] in entry)
        ]
        if len(places) != 1 or len(keys) < 2:
            raise RecipeError(f"--set {where}: the recipe has {len(places)} steps named {keys[0]}, needed one, and "
                              "OPTION=VALUE for it.")  # fmt: skip
        entry = listed[places[0]]
        options = {} if isinstance(entry, str) or entry[keys[0]] is None else dict(entry[keys[0]])
        raw["steps"] = [*listed[: places[0]], {keys[0]: options}, *listed[places[0] + 1 :]]
        _put(options, keys[1:], value, where)
    elif keys[0] == "sources" and len(keys) > 1:
        named = {one.get("name"): one for one in raw.get("sources") or [] if isinstance(one, dict)}
        if keys[1] not in named or len(keys) < 3:
            raise RecipeError(
                f"--set {where}: no source{did_you_mean(keys[1], map(str, named))} with an option to set."
            )
        _put(named[keys[1]], keys[2:], value, where)
    else:
        _put(raw, keys, value, where)


def _put(node: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    for key in keys[:-1]:
        inner = node.get(key) or {}
        if not isinstance(inner, Mapping):
            raise RecipeError(f"--set {where}: {key} has no keys below it.")
        copied = dict(inner)
        node[key] = copied
        node = copied
    node[keys[-1]] = value
