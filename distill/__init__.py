"""Distill: train a student towards its teacher with a mix of exact losses.

step, options       the step; correction (fine-tune the teacher first), memory_plan (what a run will take)
losses              losses (on logits), row_losses, loss_mix, loss_spec, layer_match (hidden states)
fused               fused_loss, head: from hidden states, never all logits at once
the teacher         teacher_model (any causal model), teacher_signal (live, several), objective;
                    on_policy, on_policy_options (written text)
the cache           logit_cache, cache_writer, cache_shard, cache_options, cached_teacher, sparse_targets,
                    token_sampling, window_codec, bit_fields
"""

from __future__ import annotations

from dwindle.distill.cache_options import CacheOptions
from dwindle.distill.cache_writer import write_cache
from dwindle.distill.cached_teacher import CachedTeacher, model_files_sha256, remember_teacher, teacher_is_needed
from dwindle.distill.correction import CorrectTeacherOptions, correct_teacher
from dwindle.distill.logit_cache import LogitCache
from dwindle.distill.objective import DistillObjective
from dwindle.distill.on_policy_options import OnPolicyOptions
from dwindle.distill.options import DistillOptions, LossSpec, TeacherSpec
from dwindle.distill.step import run
from dwindle.distill.teacher_model import Teacher
from dwindle.distill.teacher_signal import LiveTeacher, SeveralTeachers, TeacherSignal, TeacherTargets

__all__ = [
    "CacheOptions",
    "CachedTeacher",
    "CorrectTeacherOptions",
    "DistillObjective",
    "DistillOptions",
    "LiveTeacher",
    "LogitCache",
    "LossSpec",
    "OnPolicyOptions",
    "SeveralTeachers",
    "Teacher",
    "TeacherSignal",
    "TeacherSpec",
    "TeacherTargets",
    "correct_teacher",
    "model_files_sha256",
    "remember_teacher",
    "run",
    "teacher_is_needed",
    "write_cache",
]
