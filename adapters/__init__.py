"""Adapters: low-rank changes of a frozen base, trained on its exact codes, carried beside it.

options     rank, kind, targets; what recovery takes
attach      PEFT's layers on float linears or packed codes
recovery    give a quantized model back what it lost
adapt       one adapter for one task: answers (SFT) or preferences (DPO); task_options says what its records are
adapter     the folder: PEFT's files and a card that names the base
merge       fold a PEFT adapter into a float model, exactly

The folder is read without PEFT by `dwindle.peft_folder`, its card by `dwindle.adapter_card`.
"""

from __future__ import annotations

from dwindle.adapter_card import AdapterCard
from dwindle.adapters.adapt import adapt
from dwindle.adapters.adapt_options import AdaptOptions, AdaptStepOptions
from dwindle.adapters.adapter import Adapter
from dwindle.adapters.attach import target_names
from dwindle.adapters.forgetting import general_kl, with_forgetting
from dwindle.adapters.merge import merge, merged_weight
from dwindle.adapters.options import AdapterOptions, RecoverOptions
from dwindle.adapters.recovery import adapted_size, measured, recover
from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import TaskRecords, read_task
from dwindle.adapters.task_tokens import tokenised
from dwindle.low_rank import LowRank
from dwindle.peft_folder import read_adapter

__all__ = ["AdaptOptions", "AdaptStepOptions", "Adapter", "AdapterCard", "AdapterOptions", "LowRank", "RecoverOptions",
           "TaskOptions", "TaskRecords", "adapt", "adapted_size", "general_kl", "measured", "merge", "merged_weight",
           "read_adapter", "read_task", "recover", "target_names", "tokenised", "with_forgetting"]  # fmt: skip
