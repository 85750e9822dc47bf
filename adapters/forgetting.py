"""What a base lost to a task: how far its predictions on general text have moved.

    KL(before || after)     mean per token, on text that is neither the task's nor trained on

`before` is the model that the task's training started from: the base, with the recovery adapter where there was one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dwindle.adapters.adapter import Adapter
from dwindle.measure import Meter
from dwindle.report import StepRecord
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["general_kl", "with_forgetting"]


def general_kl(adapter: Adapter, base: ModelBundle, evaluation: TokenSet, start: Adapter | None = None) -> float:
    """Return KL(before || after) in nats per token of a general text."""
    found = Meter(evaluation, teacher=base if start is None else start.on(base)).measure(adapter.on(base))
    return float(found.kl_nats_per_token or 0.0)


def with_forgetting(
    adapter: Adapter, record: StepRecord, base: ModelBundle, evaluation: TokenSet, start: Adapter | None = None
) -> tuple[Adapter, StepRecord]:
    """Return adapter and record with `general_kl`, and the nats/token on general text before and after."""
    before = base if start is None else start.on(base)
    meter = Meter(evaluation, teacher=before)
    was, now = meter.measure(before), meter.measure(adapter.on(base))
    quality = ("nats_per_token", "bits_per_byte", "kl_nats_per_token", "top1_agreement")
    first, last = (replace(size, **{name: getattr(measured, name) for name in quality})
                   for size, measured in ((record.before, was), (record.after, now)))  # fmt: skip
    found = {"general_kl": now.kl_nats_per_token, "general_nats_per_token": now.nats_per_token}
    known = {name: value for name, value in found.items() if value is not None}
    details = {**record.details, "metrics_after": {**record.details["metrics_after"], **known}}
    carded = replace(adapter, card=replace(adapter.card, metrics={**adapter.card.metrics, **known}))
    return carded, replace(record, before=first, after=last, details=details)
