"""A keep plan for people: one row per layer with what it had, what it keeps, and how much of the score that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dwindle.prune.keep_plan import KeepPlan, LayerKeep

__all__ = ["plan_table"]


def plan_table(plan: KeepPlan) -> str:
    """Return the plan as text: the whole model's line first, then a row per layer of the full model."""
    before, after = plan.shape, plan.after
    kept = {keep.layer: keep for keep in plan.layers}
    width = f"hidden width {_change(before.width, after.width, plan.width_score)}"
    lines = [
        f"parameters {before.parameters:,} -> {after.parameters:,} ({after.parameters / before.parameters:.1%}), "
        f"layers {before.layers} -> {after.layers}, {width}{', along principal axes' if plan.rotated else ''}; "
        f"chosen by {plan.method}",
        f"{'layer':>5}  {'FFN units':26}  {'KV groups':22}  {'layer score':>11}",
    ]
    for layer in range(before.layers):
        score = f"{plan.layer_scores[layer]:11.4g}" if plan.layer_scores else f"{'':11}"
        lines.append(f"{layer:5}  {_row(plan, kept.get(layer))}  {score}".rstrip())
    return "\n".join(lines)


def _row(plan: KeepPlan, keep: LayerKeep | None) -> str:
    if keep is None:
        return f"{'dropped':26}  {'dropped':22}"
    units = _change(plan.shape.ffn_width, plan.after.ffn_width, keep.ffn_score)
    groups = _change(plan.shape.kv_heads, plan.after.kv_heads, keep.kv_score)
    return f"{units:26}  {groups:22}"


def _change(before: int, after: int, score: float) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({score:.1%})"
