"""The prune step: plan, apply, round to the stored type, record."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dwindle.clock import StepClock
from dwindle.prune.keep_plan import KeepPlan, plan
from dwindle.prune.options import PruneOptions
from dwindle.prune.surgery import apply
from dwindle.report import StepRecord
from dwindle.storage import hash_json
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["run"]


def run(
    bundle: ModelBundle,
    options: PruneOptions,
    calibration: TokenSet | None = None,
    *,
    keep_plan: KeepPlan | None = None,
) -> tuple[ModelBundle, StepRecord]:
    """Return a smaller bundle and its record (sizes only; a `Meter` fills in quality).

    `keep_plan` applies a plan made earlier, instead of one made from the options and the calibration data.
    """
    with StepClock() as clock:
        chosen = plan(bundle, options, calibration) if keep_plan is None else keep_plan
        inputs = {"plan": hash_json(chosen.to_json())}
        if keep_plan is None and calibration is not None:
            inputs["calibration"] = calibration.sha256
        pruned = bundle.derive(apply(bundle, chosen), "prune", asdict(options), inputs).stored_dtype_rounded()
        record_sizes = bundle.size(), pruned.size()
    details = {
        "method": chosen.method,
        "ffn_width": [chosen.ffn_width, chosen.kept_width],
        "removed": 1 - chosen.parameters_after / chosen.parameters_before,
        "kept_score": list(chosen.kept_score),
        "plan": chosen.to_json(),
    }
    return pruned, StepRecord("prune", *record_sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                              details=details)  # fmt: skip
