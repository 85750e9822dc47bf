"""`dwindle fit`: the shape and bits that meet a device's budgets best, from a config alone or ranked by training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dwindle.errors import OutputError, RecipeError
from dwindle.pipeline.commands.shared import (
    data_option,
    device_option,
    emit,
    json_option,
    load,
    made_options,
    notify,
    put_setting,
    seed_option,
)

__all__ = ["fit"]

_EVALUATION_TOKENS = 16_384
"""Of the held-out text, on which candidates are compared."""


@click.command()
@click.option("-m", "--model", required=True, help="Model folder, Hugging Face id, or a config.json without weights.")
@click.option("--target", required=True, help="Device profile: iphone-15-pro, pixel-9, a YAML file, ...")
@click.option("--tokens-per-second", help="Decode at least so fast, as in 30.")
@click.option("--memory", help="Take at most so much, as in 1.5GB.  [default: what the profile says an app may use]")
@click.option("--time-to-first-token", help="Answer the prompt within, as in 500ms.")
@click.option("--bits", help="Bits of the weights, as in 4, or 3.5 for mixed bits.  [default: searched]")
@click.option("--vocabulary", help="Keep so many tokens of the vocabulary.  [default: all]")
@click.option(
    "--axis", "axes", multiple=True, help="What may be cut: ffn, heads, width, layers; repeat.  [default: all]"
)
@click.option("--pessimistic", is_flag=True, default=None, help="Decide by the unfavourable end of every estimate.")
@data_option("Text to rank candidates on, and to train on later.", required=False)
@click.option(
    "--distill-steps", help="Distill the best candidates so long and rank them by that; needs -d.  [default: 0]"
)
@click.option("-o", "--output", metavar="PLAN", type=click.Path(), help="Write the plan there as JSON, and beside it "
              "a recipe (.yaml) for `dwindle run`.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Anything else: runtime=onnx, "
              "context=2048, prompt_tokens=512, candidates=3, data.context=256, distill.batch_size=8 ...")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the plan as JSON, ranked by the prior alone; write nothing.")
@seed_option
@device_option
@json_option
def fit(model: str, data: tuple[str, ...], output: str | None, settings: tuple[str, ...], dry_run: bool, seed: int,
        torch_device: str, as_json: bool, tokens_per_second: str | None, memory: str | None,
        time_to_first_token: str | None, **values: Any) -> None:  # fmt: skip
    """Find the best shape and bits for a device: how many layers, how wide, stored how, to meet your targets.

    \b
    A 3B model for a phone, planned from the config of a 6.4B one (no weights needed):
      dwindle fit -m CONFIG.json --target iphone-15-pro --tokens-per-second 30 --memory 1.5GB -o plan.json
    Then make it, export it and hold it to the targets:
      dwindle run plan.yaml -o OUT --set teacher.model=MODEL --set 'data.train=[TEXT]'
    The best three of your own model, each distilled for 300 steps before one is chosen:
      dwindle fit -m MODEL --target pixel-9 --tokens-per-second 20 -d TEXT --distill-steps 300 -o plan.json

    All predictions are estimates with a range; parameters and bytes are exact. Exit code 2 if nothing fits: the message
    names the smallest reachable model.
    """
    from dwindle.devices import load_profile
    from dwindle.pipeline.model_config import model_config
    from dwindle.prune.fit import fit as search
    from dwindle.prune.fit_options import FitOptions
    from dwindle.prune.fit_table import fit_table

    own, of_data, of_distill = _settings(settings, values)
    asked = {"tokens_per_second": tokens_per_second, "memory": memory, "time_to_first_token": time_to_first_token}
    budgets = _budgets({name: value for name, value in asked.items() if value is not None}, own.pop("budgets", {}))
    options = made_options(FitOptions, {"seed": seed, **values, **own, "budgets": budgets}, "fit")
    places = _places(output)
    reading, training = _training(options, data, of_data, of_distill)
    if options.distill_steps and not data:
        raise RecipeError("fit: distill_steps needs text to train and to measure on. Give some with -d.")
    if options.distill_steps and Path(model).is_file():
        raise RecipeError(f"fit: distill_steps trains candidates cut out of the model, and {model} is a config without "
                          "weights. Give the model's folder.")  # fmt: skip
    profile = load_profile(options.target)
    known = model_config(model)
    plan = search(known.anatomy, known.config, profile, options, model=model, float_bits=known.float_bits)
    if options.distill_steps and not dry_run:
        plan = _ranked(plan, model, options, reading, training, torch_device)
    told = plan.to_json(data)
    if places and not dry_run:
        _write(places, told)
    text = f"{fit_table(plan)}\n{_next(model, output, told, data)}"
    emit(told, text, as_json or dry_run)


def _settings(settings: tuple[str, ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return what `--set` gives to the search, the data and the distillation; what a flag gives is not given twice."""
    from dwindle.pipeline.recipe import parse_overrides

    found: dict[str, dict[str, Any]] = {"": {}, "data": {}, "distill": {}}
    for keys, value in parse_overrides(settings):
        place, name = (keys[0], keys[1:]) if keys[0] in found and len(keys) > 1 else ("", keys)
        if not place and values.get(".".join(name)) not in (None, ()):
            flag = {"axes": "axis"}.get(name[0], name[0].replace("_", "-"))
            raise RecipeError(f"--set {name[0]}: --{flag} gives it already. Give one of the two.")
        put_setting(found[place], name, value)
    return tuple(found.values())


def _budgets(flags: dict[str, Any], given: Any) -> Any:
    """Return the targets of the flags and of `--set budgets`, which may be a list if there are no flags."""
    if not isinstance(given, Mapping):
        if flags:
            raise RecipeError(f"--set budgets={given!r} beside --{next(iter(flags)).replace('_', '-')}: give all of "
                              "them one way, or budgets.METRIC=LIMIT.")  # fmt: skip
        return given
    if twice := [name for name in flags if name in given]:
        raise RecipeError(f"--set budgets.{twice[0]}: --{twice[0].replace('_', '-')} gives it already. Give one of the "
                          "two.")  # fmt: skip
    return {**flags, **given}


def _training(options: Any, data: tuple[str, ...], of_data: dict[str, Any], of_distill: dict[str, Any]) -> Any:
    """Return how candidates are to be trained, checked before the search: the text's options, the distillation's."""
    if not (options.distill_steps or of_data or of_distill):
        return None, None  # and no torch
    from dwindle.data import DataOptions
    from dwindle.distill import DistillOptions

    sizes = {"train": data or "TEXT", "seed": options.seed, "evaluation_tokens": _EVALUATION_TOKENS, **of_data}
    steps = {"steps": options.distill_steps} if options.distill_steps else {}
    return (made_options(DataOptions, sizes, "data"),
            made_options(DistillOptions, {"seed": options.seed, **of_distill, **steps}, "distill"))  # fmt: skip


def _ranked(plan: Any, model: str, options: Any, reading: Any, training: Any, torch_device: str) -> Any:
    """Return the plan with its best candidates distilled and measured."""
    from dwindle.data import build_token_sets
    from dwindle.pipeline.fit_ranking import ranked

    teacher = load(model, torch_device)
    sets = build_token_sets(reading, teacher.tokenizer, teacher.anatomy.context)
    return ranked(plan, teacher, sets, training, options.candidates, notify)


def _places(output: str | None) -> tuple[Path, Path] | None:
    """Return where the plan and the recipe go. Raises OutputError for a folder, below a file, or one name for both."""
    if output is None:
        return None
    plan = Path(output)
    recipe = plan.with_suffix(".yaml") if plan.name else plan
    if plan.is_dir() or plan == recipe or recipe.is_dir():
        raise OutputError(f"{output}: the plan is a JSON file, and a recipe is written beside it as {recipe.name}. "
                          "Give a name such as plan.json; nothing was written.")  # fmt: skip
    below = next(parent for parent in plan.parents if parent.exists())
    if not below.is_dir():
        raise OutputError(f"{output}: {below} is a file. Choose another output; nothing was written.")
    return plan, recipe


def _write(places: tuple[Path, Path], told: Mapping[str, Any]) -> None:
    import yaml

    from dwindle.storage import write_json, write_text

    write_json(places[0], told)
    write_text(places[1], yaml.safe_dump(told["recipe"], sort_keys=False, allow_unicode=True))


def _next(model: str, output: str | None, told: Mapping[str, Any], data: tuple[str, ...]) -> str:
    """Return the lines that say what to do with the plan."""
    import yaml

    if output is None:
        steps = yaml.safe_dump({"steps": told["recipe"]["steps"]}, sort_keys=False, default_flow_style=None, width=110)
        return f"\nAs a recipe (-o PLAN.json writes it, with the plan):\n{steps.rstrip()}"
    recipe = Path(output).with_suffix(".yaml")
    text = "" if data else " --set 'data.train=[TEXT]'"
    place = Path(model)
    absent = place.exists() and not any(place.glob("*.safetensors"))
    weights = " --set teacher.model=MODEL" if absent else ""
    return f"\nWritten: {output}, {recipe}\nNext: dwindle run {recipe} -o OUT{weights}{text}"
