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
        *_tokens(plan),
        f"{'layer':>5}  {'FFN units':26}  {_expert_head(plan)}{'KV groups':22}  {'layer score':>11}",
    ]
    for layer in range(before.layers):
        score = f"{plan.layer_scores[layer]:11.4g}" if plan.layer_scores else f"{'':11}"
        lines.append(f"{layer:5}  {_row(plan, kept.get(layer))}  {score}".rstrip())
    return "\n".join(lines)


def _tokens(plan: KeepPlan) -> list[str]:
    if plan.vocabulary is None:
        return []
    found = plan.vocabulary
    return [
        f"vocabulary {found.vocabulary:,} -> {len(found.tokens):,} ({found.coverage:.3%} of {found.corpus_tokens:,} "
        f"tokens counted are kept ones; {found.seen:,} different ones were, {found.essential:,} stay in any case)"
    ]


def _row(plan: KeepPlan, keep: LayerKeep | None) -> str:
    if keep is None:
        experts = f"{'dropped':20}  {'dropped':26}  " if plan.shape.experts else ""
        return f"{'dropped':26}  {experts}{'dropped':22}"
    before, after = plan.shape, plan.after
    mixed = before.has_experts(keep.layer)
    ffn_width = after.shared_width if mixed else after.ffn_width
    units = _change(before.units(keep.layer), ffn_width, keep.ffn_score) if before.units(keep.layer) else "none"
    groups = _change(before.kv_heads, after.kv_heads, keep.kv_score)
    if not before.experts:
        return f"{units:26}  {groups:22}"
    experts = _change(before.experts, after.experts, keep.experts_score) if mixed else "none"
    width = _change(before.expert_width, after.expert_width, keep.expert_units_score) if mixed else "none"
    return f"{units:26}  {experts:20}  {width:26}  {groups:22}"


def _expert_head(plan: KeepPlan) -> str:
    return f"{'experts':20}  {'units of each':26}  " if plan.shape.experts else ""


def _change(before: int, after: int, score: float) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,} ({score:.1%})"
