"""Adapters: low-rank changes of a frozen base. In this form: fold a PEFT adapter into a float model, exactly."""

from __future__ import annotations

from dwindle.adapters.merge import merge, merged_weight
from dwindle.adapters.peft_folder import LowRank, read_adapter

__all__ = ["LowRank", "merge", "merged_weight", "read_adapter"]
