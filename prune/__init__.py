"""Prune: decide what to keep, cut it out, get a plain smaller checkpoint.

`plan(bundle, PruneOptions(...), calibration)` decides, `run` applies it and makes up for it. `plan_folder` and
`run_folder` do the same to a checkpoint that is larger than memory.

    deciding        options, planning, method, budget, keep_plan, plan_table, shape (what a family allows)
    scores          scores, gradient_scores, depth_scores, calibration_pass; soft_top_k, masks, masked_model,
                    mask_options, learned_plan
    for a device    fit, fit_options, fit_plan, fit_table; capacity (the prior), cost_lines, stored_size, stored_choices
    cutting         step, surgery, head_rows, smaller_config; compensation, rotation, moments
    experts         mixture (what passes which), mixture_scores, mixture_moments
    larger models   folder_step, folder_bundle; parameters and text_pass (in memory or from files)
    a vocabulary    vocabulary, vocabulary_counts, vocabulary_plan, vocabulary_options, vocabulary_surgery;
                    tokenizer_surgery, tokenizer_pieces, chat_template_tokens, token_id_settings
"""

from __future__ import annotations

from dwindle.prune.folder_step import plan_folder, run_folder
from dwindle.prune.keep_plan import KeepPlan
from dwindle.prune.mask_options import MaskOptions
from dwindle.prune.options import PruneOptions
from dwindle.prune.planning import plan
from dwindle.prune.step import run
from dwindle.prune.surgery import apply
from dwindle.prune.vocabulary import plan_vocabulary
from dwindle.prune.vocabulary_options import VocabularyOptions
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.prune.vocabulary_surgery import cut_vocabulary

__all__ = ["KeepPlan", "MaskOptions", "PruneOptions", "VocabularyOptions", "VocabularyPlan", "apply", "cut_vocabulary",
           "plan", "plan_folder", "plan_vocabulary", "run", "run_folder"]  # fmt: skip
