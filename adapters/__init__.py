"""Adapters: low-rank changes of a frozen base, trained on its exact codes, carried beside it.

options     rank, kind, targets; what recovery takes
attach      PEFT's layers on float linears or packed codes
recovery    give a quantized model back what it lost
adapter     the folder: PEFT's files and a card that names the base
merge       fold a PEFT adapter into a float model, exactly; peft_folder reads one without PEFT
"""

from __future__ import annotations

from dwindle.adapters.adapter import Adapter, AdapterCard
from dwindle.adapters.merge import merge, merged_weight
from dwindle.adapters.options import AdapterOptions, RecoverOptions
from dwindle.adapters.peft_folder import LowRank, read_adapter
from dwindle.adapters.recovery import measured, recover

__all__ = ["Adapter", "AdapterCard", "AdapterOptions", "LowRank", "RecoverOptions", "measured", "merge",
           "merged_weight", "read_adapter", "recover"]  # fmt: skip
