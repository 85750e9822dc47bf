"""Prune: decide what to keep, cut it out, get a plain smaller checkpoint."""

from __future__ import annotations

from dwindle.prune.keep_plan import KeepPlan, plan
from dwindle.prune.options import PruneOptions
from dwindle.prune.step import run
from dwindle.prune.surgery import apply

__all__ = ["KeepPlan", "PruneOptions", "apply", "plan", "run"]
