"""A recipe: one YAML file that says teacher, data and steps. Parsing it loads no torch.

    version: 1
    teacher: {model: FOLDER_OR_ID}
    data: {train: [...], calibration: ..., evaluation: ...}
    steps:
      - prune: {ffn_keep: 0.5}
      - prune_and_distill: {rounds: 3, prune: {...}, distill: {...}}        # `prune_rounds`
      - quantize: {apple: {scheme: palettize}, onnx: {scheme: integer}}     # variants

Unknown keys, wrong types, steps in an impossible order: all are collected and raised as one RecipeError.
`Recipe.options` turns the text into the option dataclasses of the steps (that is when their rooms are imported).
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dwindle.errors import RecipeError, did_you_mean
from dwindle.pipeline import prune_rounds
from dwindle.pipeline.option_values import fill
from dwindle.pipeline.strict_yaml import read_yaml

__all__ = ["ORDER", "Recipe", "StepSpec", "parse_overrides"]

ORDER = {"correct_teacher": 0, "prune": 0, "distill": 0, "quantize": 1, "recover": 2, "adapt": 3, "export": 4,
         "validate": 5}  # fmt: skip
"""A step may follow a step of the same or a lower rank: prune and distill may alternate, after quantize the codes are
final and only adapters are trained on them, nothing is validated before it is exported."""

OPTIONS = {
    "data": ("dwindle.data", "DataOptions"),
    "prune": ("dwindle.prune", "PruneOptions"),
    "correct_teacher": ("dwindle.distill", "CorrectTeacherOptions"),
    "distill": ("dwindle.distill", "DistillOptions"),
    "quantize": ("dwindle.quantize", "QuantizeOptions"),
    "recover": ("dwindle.adapters", "RecoverOptions"),
    "adapt": ("dwindle.adapters", "AdaptStepOptions"),
    "export": ("dwindle.pipeline.export_plan", "ExportStepOptions"),
    "validate": ("dwindle.devices", "ValidateOptions"),
}
"""Where the option type of each section lives; its field names are the keys of the recipe."""

_STEPS = (*ORDER, prune_rounds.NAME)
"""What may stand in `steps`."""
_NOT_VARIANTS = ("float", "student", "teacher")
"""What artifacts and samples of other models than a variant's are called."""
_MOST_STEPS = 100
_TOP = ("version", "name", "teacher", "data", "steps", "seed")
_TEACHER = ("model", "trust_remote_code")


@dataclass(frozen=True)
class StepSpec:
    """One step as written: `variants` maps a variant's name (None for the only one) to its raw options."""

    name: str
    variants: Mapping[str | None, Mapping[str, Any]]
    place: str = ""
    """Where it stands in the recipe, for messages."""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `raw` is what is written to the run folder as recipe.yaml."""

    raw: Mapping[str, Any]
    steps: tuple[StepSpec, ...]
    seed: int = 0
    options: Mapping[tuple[int, str | None], Any] = field(default_factory=dict, compare=False)
    """(index of the step, variant) -> its frozen options."""
    data: Any = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Return the recipe's name; shown in the report."""
        return str(self.raw.get("name") or "dwindle run")

    @property
    def teacher(self) -> str:
        """Return the teacher's folder or Hugging Face id."""
        return str(self.raw["teacher"]["model"])

    @property
    def trust_remote_code(self) -> bool:
        """Return whether the teacher may bring its own code. Off unless the recipe says so."""
        return bool(self.raw["teacher"].get("trust_remote_code", False))

    def to_yaml(self) -> str:
        """Return the recipe as YAML, overrides included."""
        return yaml.safe_dump(dict(self.raw), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
        """Return the recipe in `path` with `key=value` overrides applied; raise RecipeError with every mistake."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RecipeError(f"{path}: no such recipe. Recipes to start from are in recipes/.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as a recipe ({error}).") from error
        return cls.parse(read_yaml(text, str(path)), overrides, where=str(path))

    @classmethod
    def parse(cls, raw: Any, overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
        """Return the recipe for an already loaded mapping."""
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{where}: found {type(raw).__name__}, needed a mapping with the keys {', '.join(_TOP)}.")
        merged = _with_overrides(raw, parse_overrides(overrides))
        problems: list[str] = []
        steps = _check_shape(merged, problems)
        seed = merged.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            problems.append(f"seed: {seed!r} is no whole number.")
            seed = 0
        options: dict[tuple[int, str | None], Any] = {}
        for index, step in enumerate(steps):
            for variant, values in step.variants.items():
                place = step.place + (f".{variant}" if variant else "")
                kind = _option_type(step.name)
                options[index, variant] = fill(kind, _seeded(kind, values, seed), place, problems)
        data_kind = _option_type("data")
        data = fill(data_kind, _seeded(data_kind, merged.get("data") or {}, seed), "data", problems)
        _check_adapter_names(steps, options, problems)
        problems = list(dict.fromkeys(problems))  # rounds share their options, and their mistakes
        if problems:
            raise RecipeError(
                f"{where}: {len(problems)} mistake{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(problems)
            )
        return cls(raw=merged, steps=tuple(steps), seed=int(seed), options=options, data=data)


def _check_adapter_names(steps: list[StepSpec], options: Mapping[tuple[int, str | None], Any],
                         problems: list[str]) -> None:  # fmt: skip
    """Add tasks that are called as the recovery adapter is, or whose folder would be another variant's task's too."""
    variants: list[str | None] = next((list(s.variants) for s in steps if s.name == "quantize"), [None])
    for index, step in enumerate(steps):
        names = [task.name for task in getattr(options.get((index, None)), "tasks", ())]
        if "recovery" in names and any(s.name == "recover" for s in steps):
            problems.append(f"{step.place}: a task is called recovery, as the adapter of recover is. Rename the task.")
        folders = [f"{variant}-{name}" for variant in variants for name in names]
        if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
            problems.append(f"{step.place}: variant and task make one folder twice ({', '.join(twice)}). Rename one.")


def _option_type(section: str) -> type[Any]:
    module, name = OPTIONS[section]
    kind: type[Any] = getattr(importlib.import_module(module), name)
    return kind


def _seeded(kind: type[Any], values: Any, seed: Any) -> Any:
    """Return the values with the recipe's seed where the section, or options inside it, take one and name none."""
    if not isinstance(values, Mapping):
        return values
    hints, seeded = typing.get_type_hints(kind), dict(values)
    for field_ in dataclasses.fields(kind):
        name, inner = field_.name, hints[field_.name]
        if name == "seed":
            seeded.setdefault(name, seed)
        elif dataclasses.is_dataclass(inner) and any(f.name == "seed" for f in dataclasses.fields(inner)):
            seeded[name] = _seeded(typing.cast("type[Any]", inner), seeded.get(name, {}), seed)
    return seeded


def _check_shape(raw: Mapping[str, Any], problems: list[str]) -> list[StepSpec]:
    problems += [f"{key} is unknown{did_you_mean(str(key), _TOP)}." for key in raw if key not in _TOP]
    if raw.get("version") != 1:
        problems.append(f"version: found {raw.get('version')!r}, needed 1.")
    teacher = raw.get("teacher")
    if not isinstance(teacher, Mapping) or not isinstance(teacher.get("model"), str):
        problems.append(
            "teacher.model is missing: name a folder or Hugging Face id, or pass --set teacher.model=FOLDER."
        )
    else:
        problems += [f"teacher.{k} is unknown{did_you_mean(str(k), _TEACHER)}." for k in teacher if k not in _TEACHER]
        if not isinstance(teacher.get("trust_remote_code", False), bool):
            problems.append(f"teacher.trust_remote_code: {teacher['trust_remote_code']!r} is not true or false")
    listed = raw.get("steps")
    if isinstance(listed, list) and len(listed) > _MOST_STEPS:
        problems.append(f"steps: {len(listed):,} steps, at most {_MOST_STEPS} make sense.")
        return []
    if not isinstance(listed, list) or not listed:
        problems.append(f"steps: found {listed!r}, needed a list of steps ({', '.join(_STEPS)}).")
        return []
    steps = [step for i, entry in enumerate(listed) for step in _steps(i, entry, problems)]
    for before, after in itertools.pairwise(steps):
        if ORDER[after.name] < ORDER[before.name]:
            problems.append(
                f"steps: {after.name} after {before.name} makes no sense "
                f"(order: prune and distill, then quantize, recover, adapt, export, validate). Move {after.name} up."
            )
    for name in ("quantize", "recover", "adapt", "export", "validate"):
        if sum(step.name == name for step in steps) > 1:
            problems.append(f"steps: {name} stands more than once; give it variants, tasks or more formats instead.")
    if any(s.name == "recover" for s in steps) and not any(s.name == "quantize" for s in steps):
        problems.append("steps: recover needs a quantize before it; without one nothing was lost.")
    if any(s.name == "validate" for s in steps) and not any(s.name == "export" for s in steps):
        problems.append("steps: validate needs an export before it.")
    return steps


def _steps(index: int, entry: Any, problems: list[str]) -> list[StepSpec]:
    """Return the steps of one entry: one, or those of all rounds."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        problems.append(f"steps[{index}]: found {entry!r}, needed one step name with its options.")
        return []
    name, values = next(iter(entry.items()))
    place = f"steps[{index}].{name}"
    if name not in _STEPS:
        problems.append(f"{place} is unknown{did_you_mean(str(name), _STEPS)}.")
        return []
    if name != prune_rounds.NAME:
        return _step(str(name), values, place, problems)
    single = prune_rounds.rounds(values, place, problems)
    return [step for part, given in single for step in _step(part, given, f"{place}.{part}", problems)]


def _step(name: str, values: Any, place: str, problems: list[str]) -> list[StepSpec]:
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        problems.append(f"{place}: found {values!r}, needed keys and values.")
        return []
    has_variants = name == "quantize" and bool(values) and all(isinstance(v, Mapping) for v in values.values())
    if has_variants and any(not str(v).replace("-", "").replace("_", "").isalnum() for v in values):
        problems.append(f"{place}: variant names are letters, digits, - and _; found {', '.join(map(str, values))}.")
    if has_variants and (taken := [str(v) for v in values if str(v) in _NOT_VARIANTS]):
        problems.append(f"{place}: {', '.join(taken)} means another model of the report; call the variant otherwise.")
    return [StepSpec(name, {str(v): o for v, o in values.items()} if has_variants else {None: values}, place)]


def parse_overrides(settings: Iterable[str]) -> list[tuple[list[str], Any]]:
    """Return (dotted key, YAML value) for each `key=value`.

    >>> parse_overrides(["distill.tokens=20M", "data.train=[a.txt]"])
    [(['distill', 'tokens'], '20M'), (['data', 'train'], ['a.txt'])]
    """
    parsed = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip(".") or ".." in key:
            raise RecipeError(f"--set {setting}: found no key=value. Example: --set distill.tokens=20M")
        parsed.append((key.strip().split("."), read_yaml(value, f"--set {key}")))
    return parsed


def _with_overrides(raw: Mapping[str, Any], overrides: list[tuple[list[str], Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = _copied(raw)
    for keys, value in overrides:
        node: Any = merged
        path = list(keys)
        if path[0] in _STEPS:
            node, path = _find_step(merged, path[0], ".".join(keys)), path[1:]
            if not path:
                raise RecipeError(f"--set {'.'.join(keys)}: name an option too, as in {keys[0]}.OPTION=VALUE.")
        for key in path[:-1]:
            if not isinstance(node, dict):
                raise RecipeError(f"--set {'.'.join(keys)}: {key} has no keys below it.")
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict):
            raise RecipeError(f"--set {'.'.join(keys)}: {path[-1]} cannot be set below a plain value.")
        node[path[-1]] = value
    return merged


def _find_step(merged: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    listed = merged.get("steps")
    if isinstance(listed, list):
        merged["steps"] = listed = [{entry: {}} if entry == name else entry for entry in listed]
    found = [entry for entry in _mappings(listed) if name in entry]
    if len(found) != 1:
        in_rounds = name in ("prune", "distill") and prune_rounds.NAME in itertools.chain(*_mappings(listed))
        hint = f" Those of rounds are set as {prune_rounds.NAME}.{key}." if in_rounds else ""
        raise RecipeError(f"--set {key}: the recipe has {len(found)} steps named {name}, needed exactly one.{hint}")
    if found[0][name] is None:
        found[0][name] = {}
    step: dict[str, Any] = found[0][name]
    return step


def _mappings(listed: Any) -> list[dict[str, Any]]:
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return value
