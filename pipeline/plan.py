"""What a recipe would do, checked as far as it can be without doing it: `dwindle run --dry-run`."""

from __future__ import annotations

import dataclasses
from typing import Any

from dwindle.adapters import read_task
from dwindle.anatomy import Anatomy, anatomy_of, require_dense
from dwindle.data import DataOptions
from dwindle.data.sources import check_sources
from dwindle.devices.device_profile import HOST, load_profile
from dwindle.errors import DataError, RecipeError
from dwindle.pipeline.export_plan import planned_exports
from dwindle.pipeline.model_config import decoder_config
from dwindle.pipeline.recipe import Recipe

__all__ = ["plan", "require_carried", "require_stages", "require_targets"]


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the teacher, the data and every step with its full options, and the same as `lines` of text.

    Raises RecipeError for a format that no variant fits and a target that nobody knows, DataError for data that is not
    there, and what reading the teacher's config raises.
    """
    places = (*recipe.data.train, recipe.data.calibration, recipe.data.evaluation)
    check_sources([place for place in places if place is not None], recipe.data.text_column)
    require_targets(recipe)
    anatomy = anatomy_of(decoder_config(recipe.teacher))
    require_carried(recipe, anatomy)
    require_stages(recipe, anatomy)
    lines = [
        f"teacher   {recipe.teacher} ({anatomy.model_type}, {anatomy.layers} layers, width {anatomy.width}, "
        f"{_ffn(anatomy)}, vocabulary {anatomy.vocab:,})",
        f"train     {', '.join(recipe.data.train)}",
    ]
    steps = []
    for index, step in enumerate(recipe.steps):
        for variant in step.variants:
            options = dataclasses.asdict(recipe.options[index, variant])
            if options.get("method") != "soft_top_k":
                options.pop("masks", None)
            steps.append({"name": step.name, "variant": variant, "options": options})
            label = step.name + (f" ({variant})" if variant else "")
            shown = ", ".join(f"{k}={v}" for k, v in options.items() if k != "tasks" and v not in (None, (), {}))
            lines.append(f"{index + 1}. {label}: {shown}")
            if step.name == "adapt":
                for task in recipe.options[index, variant].tasks:
                    found = read_task(task, options["seed"])
                    lines.append(f"   {task.name}: {len(found.train):,} records, {len(found.held_out):,} held out")
    for export in planned_exports(recipe):
        lines.append(
            f"   export/{export.folder} from {'the float model' if export.is_float else export.variant or 'the model'}"
        )
    return {"teacher": recipe.teacher, "steps": steps, "lines": lines}


def _ffn(anatomy: Anatomy) -> str:
    """Return what a table says of the FFNs."""
    parts = [f"FFN {max(anatomy.ffn_width)}"] if max(anatomy.ffn_width) else []
    mixture = next(filter(None, anatomy.experts), None)
    return ", ".join(parts + ([f"{mixture.count} experts of {mixture.width:,} units"] if mixture else []))


def require_carried(recipe: Recipe, anatomy: Anatomy) -> None:
    """Raise UnsupportedModel for steps of the recipe that do not carry a model like the teacher, before any work."""
    for name in ("quantize", "recover", "adapt", "export"):
        if any(step.name == name for step in recipe.steps):
            require_dense(anatomy, name)


def require_stages(recipe: Recipe, anatomy: Anatomy) -> None:
    """Raise RecipeError for training steps whose own text is missing or whose windows are longer than the teacher
    takes: a curriculum's last stage is not to fail after days of the first.
    """
    wrong = []
    for (index, _), options in recipe.options.items():
        own = getattr(options, "data", None)
        if not isinstance(own, DataOptions):
            continue
        where = f"steps[{index}].{recipe.steps[index].name}.data"
        if own.context is not None and own.context > anatomy.context:
            wrong.append(
                f"{where}: context={own.context:,} is longer than the teacher's {anatomy.context:,} (shorten it, or "
                "stretch the teacher by rope_scaling in its config.json: docs/data.md, Curricula)"
            )
        try:
            check_sources(own.train, own.text_column)
        except DataError as error:
            wrong.append(f"{where}: {str(error).removesuffix('.')}")
    if wrong:
        raise RecipeError("; ".join(dict.fromkeys(wrong)) + ".")


def require_targets(recipe: Recipe) -> None:
    """Raise RecipeError, naming all of them, for targets of the validate step that are no sound device profile."""
    wrong = []
    for (index, _), options in recipe.options.items():
        for name in options.targets if recipe.steps[index].name == "validate" else ():
            try:
                if name != HOST:
                    load_profile(name)
            except RecipeError as error:
                wrong.append(f"steps[{index}].validate.targets: {error}")
    if wrong:
        raise RecipeError("\n".join(wrong))
