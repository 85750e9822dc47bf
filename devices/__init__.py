"""Devices: profiles with sourced numbers, estimates, measurements on this machine, and verdicts. All torch-free."""

from __future__ import annotations

from dwindle.devices.bench_options import BenchOptions
from dwindle.devices.budgets import Budget, parse_budgets, read_budgets
from dwindle.devices.calibration import Calibration, calibrate
from dwindle.devices.cost_model import Estimate, LayerTime, estimate
from dwindle.devices.device_profile import (
    DeviceProfile,
    add_profile,
    check_profile,
    list_profiles,
    load_profile,
)
from dwindle.devices.exported import read_artifact, run_of
from dwindle.devices.measurement import Measurement, read_measurements, write_measurement
from dwindle.devices.targets import INTERRUPTED, measure, parse_target
from dwindle.devices.validation import ValidateOptions, junit, rejudge, run, validate
from dwindle.devices.workload import LayerLoad, Workload

__all__ = [
    "INTERRUPTED",
    "BenchOptions",
    "Budget",
    "Calibration",
    "DeviceProfile",
    "Estimate",
    "LayerLoad",
    "LayerTime",
    "Measurement",
    "ValidateOptions",
    "Workload",
    "add_profile",
    "calibrate",
    "check_profile",
    "estimate",
    "junit",
    "list_profiles",
    "load_profile",
    "measure",
    "parse_budgets",
    "parse_target",
    "read_artifact",
    "read_budgets",
    "read_measurements",
    "rejudge",
    "run",
    "run_of",
    "validate",
    "write_measurement",
]
