"""Distill: train a student towards its teacher with a mix of exact losses."""

from __future__ import annotations

from dwindle.distill.objective import DistillObjective
from dwindle.distill.options import DistillOptions, LossSpec
from dwindle.distill.step import run
from dwindle.distill.teacher_signal import LiveTeacher, TeacherSignal, TeacherTargets

__all__ = [
    "DistillObjective",
    "DistillOptions",
    "LiveTeacher",
    "LossSpec",
    "TeacherSignal",
    "TeacherTargets",
    "run",
]
