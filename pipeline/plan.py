"""What a recipe would do, checked as far as it can be without doing it: `dwindle run --dry-run`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dwindle.anatomy import anatomy_of
from dwindle.errors import RecipeError
from dwindle.pipeline.export_plan import planned_exports
from dwindle.pipeline.recipe import Recipe

__all__ = ["plan"]


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the teacher, the data and every step with its full options, and the same as `lines` of text.

    Raises RecipeError for a format that no variant fits, and what reading the teacher's config raises.
    """
    from transformers import AutoConfig

    missing = [
        p
        for p in (*recipe.data.train, recipe.data.calibration, recipe.data.evaluation)
        if p is not None and ("/" in p or p.endswith(".txt")) and not Path(p.split("::")[0]).exists()
    ]
    if missing:
        raise RecipeError(f"data: not found: {', '.join(missing)}.")
    config = AutoConfig.from_pretrained(recipe.teacher, trust_remote_code=recipe.trust_remote_code)
    anatomy = anatomy_of(config)
    lines = [
        f"teacher   {recipe.teacher} ({anatomy.model_type}, {anatomy.layers} layers, width {anatomy.width}, "
        f"FFN {anatomy.ffn_width[0]}, vocabulary {anatomy.vocab:,})",
        f"train     {', '.join(recipe.data.train)}",
    ]
    steps = []
    for index, step in enumerate(recipe.steps):
        for variant in step.variants:
            options = dataclasses.asdict(recipe.options[index, variant])
            steps.append({"name": step.name, "variant": variant, "options": options})
            label = step.name + (f" ({variant})" if variant else "")
            shown = ", ".join(f"{k}={v}" for k, v in options.items() if v not in (None, (), {}))
            lines.append(f"{index + 1}. {label}: {shown}")
    for export in planned_exports(recipe):
        lines.append(
            f"   export/{export.folder} from {'the float model' if export.is_float else export.variant or 'the model'}"
        )
    return {"teacher": recipe.teacher, "steps": steps, "lines": lines}
