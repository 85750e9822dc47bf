"""Apple devices and Macs, through coremltools' own benchmarker; from a Mac only. Torch-free. Not executed.

Thin over `coremltools.models.ml_program.experimental` (9.0): `remote_device.Device` finds a connected iPhone or iPad,
builds Apple's model runner and launches it there (Xcode and a development team are needed), and
`perf_utils.MLModelBenchmarker` times loading and predictions. It was never run: there was no Mac. What it measures are
the functions `prefill` and `decode` of a package of static shapes (`shapes: static`), whose every call reads the whole
context's cache, whatever is in it:

    time to first token = ceil(prompt / prefill_tokens) x prefill       tokens/s = 1 / decode

Apple's tools tell no memory. `apple:mac` is this Mac; a Core AI asset runs there in Apple's runtime as everywhere else
(`board_runner.py`): coreai-core 1.0.0b3 brings a profiler, but no benchmarker of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from dwindle.devices.bench_options import BenchOptions, Protocol
from dwindle.devices.exported import Exported
from dwindle.devices.host_process import host_events
from dwindle.devices.measurement import Event
from dwindle.errors import MissingExtra, TargetError, UnsupportedModel, did_you_mean

__all__ = ["apple_events"]

THIS_MAC = "mac"
_MACOS = "darwin"
_KINDS = ("IPHONE", "IPAD", "MAC")


def apple_events(
    name: str, exported: Exported, protocol: Protocol, runtime: str, options: BenchOptions
) -> Iterator[Event]:
    """Yield events as the runner's. Raises TargetError on any system but macOS and for devices that are not there."""
    if sys.platform != _MACOS:
        raise TargetError(f"apple:{name}: Apple's tools measure from a Mac only, and this is {sys.platform}. Run "
                          "dwindle on a Mac, or `dwindle validate` for an estimate.")  # fmt: skip
    if name == THIS_MAC and runtime != "coreml":
        yield from host_events(exported, protocol, runtime, options.timeout_seconds)
        return
    if runtime != "coreml":
        raise UnsupportedModel(f"apple:{name}: {exported.format} cannot be sent to a device by Apple's tools; Core ML "
                               "packages can, and apple:mac runs it here.")  # fmt: skip
    import asyncio

    yield from asyncio.run(_benchmarked(name, exported, protocol, options))


async def _benchmarked(name: str, exported: Exported, protocol: Protocol, options: BenchOptions) -> list[Event]:
    try:
        import coremltools
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    except ImportError as error:
        raise MissingExtra("Measuring a Core ML package", "coreml") from error
    packages = sorted(exported.folder.glob("*.mlpackage"))
    told = json.loads((exported.folder / "manifest.json").read_text(encoding="utf-8")).get("runtime", {})
    length = told.get("prefill_tokens")
    if len(packages) != 1 or not length:
        raise UnsupportedModel(f"apple:{name}: one package of static shapes is needed ({len(packages)} found). Export "
                               "it with `shapes: static`.")  # fmt: skip
    device = None if name == THIS_MAC else await _prepared(name, options)
    found: dict[str, Any] = {}
    load = 0.0
    for function in ("prefill", "decode"):
        model = coremltools.models.MLModel(str(packages[0]), function_name=function)
        benchmarker = MLModelBenchmarker(model, device=device)
        load += (await benchmarker.benchmark_load()).samples[0] / 1e3
        measured = await benchmarker.benchmark_predict(iterations=protocol.repeats, warmup=protocol.warm_up > 0)
        found[function] = [milliseconds / 1e3 for milliseconds in measured.samples]
    machine = {"model": name, "system": getattr(device, "os_version", sys.platform)}
    calls = math.ceil(protocol.prompt_tokens / int(length))
    version = f"Core ML (coremltools {coremltools.__version__} benchmarker)"
    return [
        {"event": "start", "runtime": "coreml", "machine": machine},
        {"event": "loaded", "load_seconds": load, "version": version},
        *({"event": "repeat", "index": i, "first_token_seconds": calls * prefill, "token_seconds": [decode]}
          for i, (prefill, decode) in enumerate(zip(found["prefill"], found["decode"], strict=True))),
        {"event": "note", "note": "single predictions on an empty cache, timed by Apple's benchmarker; no memory told"},
        {"event": "end"},
    ]  # fmt: skip


async def _prepared(name: str, options: BenchOptions) -> Any:
    """Return a connected device with Apple's model runner launched on it."""
    from coremltools.models.ml_program.experimental import remote_device

    connected = [d for kind in _KINDS
                 for d in remote_device.Device.get_connected_devices(remote_device.DeviceType[kind])]  # fmt: skip
    device = next((d for d in connected if d.name == name), None)
    if device is None:
        known = did_you_mean(name, [d.name for d in connected]) if connected else " (none is connected)"
        raise TargetError(f"apple:{name}: no such device{known}. Connect it, unlock it and switch developer mode on.")
    credentials = remote_device.AppSigningCredentials(development_team=options.development_team)
    return await device.prepare_for_model_debugging(credentials=credentials)
