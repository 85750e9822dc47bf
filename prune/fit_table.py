"""A fit plan as text: the candidates in rows, then why each target holds. Torch-free."""

from __future__ import annotations

from dwindle.prune.fit_plan import Candidate, FitPlan, worth
from dwindle.report import Metric

__all__ = ["fit_table"]

_HEADS = ("", "layers", "width", "FFN", "KV", "stored as", "parameters", "bytes", "tokens/s", "memory", "first token",
          "worth")  # fmt: skip


def fit_table(plan: FitPlan) -> str:
    """Return the plan for a person: rows of candidates, the targets of the chosen one, notes."""
    full = plan.full
    rows = [_HEADS, ("full model", *_sizes(full.layers, full.width, full.ffn_width, full.kv_heads), "",
                     _count(full.parameters), "", "", "", "", "")]  # fmt: skip
    rows += [_row(candidate) for candidate in plan.candidates]
    if any(candidate.measured for candidate in plan.candidates):
        kl = ["KL", "", *(f"{c.measured['kl_nats_per_token']:.4f}" if c.measured else "-" for c in plan.candidates)]
        rows = [(*row, cell) for row, cell in zip(rows, kl, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column in (0, 5) else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    where = f"{plan.title}, {plan.runtime} on its {plan.unit}, after {plan.prompt_tokens:,} tokens, cache for " \
        f"{plan.context:,}; all estimated"  # fmt: skip
    held = "the unfavourable ends count" if plan.pessimistic else "the middle counts, the range is in brackets"
    return "\n".join([where, "", *lines, "", f"Targets of the best ({held}):",
                      *(f"  {_why(plan, metric)}" for metric in plan.chosen.judged),
                      *(f"Note: {note}." for note in plan.notes)])  # fmt: skip


def _row(candidate: Candidate) -> tuple[str, ...]:
    shape, metrics = candidate.shape, candidate.metrics
    first = metrics["time_to_first_token_seconds"]
    return (
        candidate.kind, *_sizes(shape.layers, shape.width, shape.ffn_width, shape.kv_heads), str(candidate.storage),
        _count(shape.parameters), _size(candidate.bytes), f"{metrics['tokens_per_second'].value:,.1f}",
        _size(metrics["peak_memory_bytes"].value or 0), f"{first.value:.3f} s",
        _count(candidate.effective_parameters),
    )  # fmt: skip


def _sizes(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size:,}" for size in sizes)


def _why(plan: FitPlan, metric: Metric) -> str:
    """Return one line on a target: the number, its range, the limit, what makes the number, and whether it binds."""
    best = plan.chosen
    reasons = {
        "peak_memory_bytes": f"{_size(best.bytes)} of weights and {_size(best.kv_bytes_per_token * plan.context)} of "
                             "cache, their copies, and the runtime",
        "package_bytes": f"{best.shape.parameters:,} parameters as {best.storage}; graph and tokenizer come on top",
        "time_to_first_token_seconds": f"{plan.prompt_tokens:,} tokens through {_count(best.shape.parameters)} "
                                       "parameters",
    }  # fmt: skip
    cache = best.kv_bytes_per_token * plan.prompt_tokens
    reason = reasons.get(metric.name, f"a token reads {_size(best.streamed_bytes + cache)}, {_size(cache)} of it cache")
    spread = "" if metric.low is None or metric.high is None else f" ({_shown(metric, metric.low)} to " \
        f"{_shown(metric, metric.high)})"  # fmt: skip
    binds = "; this one binds" if metric.name == best.binding and worth(metric, plan.pessimistic) else ""
    return f"{metric.name} {_shown(metric, metric.value or 0)}{spread}, {metric.budget}: {reason}{binds}"


def _shown(metric: Metric, value: float) -> str:
    if metric.unit == "bytes":
        return _size(value)
    return f"{value:.3f} s" if metric.unit == "seconds" else f"{value:,.1f}"


def _size(count: float) -> str:
    """Return bytes as people write them.

    >>> _size(1_343_000_000), _size(5_242_880), _size(524_288)
    ('1.343 GB', '5.2 MB', '524.3 kB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.3f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _count(count: float) -> str:
    """Return a number of parameters as people write it.

    >>> _count(6_410_000_000), _count(5_834_496), _count(238_912)
    ('6.41B', '5.83M', '239K')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
