"""A hosted Qualcomm phone, through AI Hub's own client (`qai_hub`). Torch-free. Never run there: it needs an account.

AI Hub times one program of fixed shapes, so the ONNX graph is compiled there twice (`--target_runtime onnx`): a prompt
of T tokens, and one token after it. The client reads its token from the user's own configuration
(`qai-hub configure`); dwindle neither sees nor logs it, and drops what the client prints.

    pip install 'dwindle[aihub]'      in an environment of its own: qai-hub 0.56 wants protobuf < 6.32

The client takes a folder of nothing but the graph and its weights, and inputs of `TYPES`. `estimated_inference_time`
and `all_inference_times` are microseconds, memory bytes or None (qai_hub.Client docs). Calls, folder, types and summary
are held to the client's own code by a test where that is installed. Fused operators and 4-bit products are ONNX
Runtime's; whether AI Hub's devices take them has not been seen.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwindle.devices.bench_options import Protocol
from dwindle.devices.exported import Exported
from dwindle.devices.measurement import Event
from dwindle.errors import MissingExtra, TargetError, UnsupportedModel, did_you_mean

__all__ = ["TYPES", "aihub_events", "input_specs"]

TYPES = ("float32", "int8", "int16", "int32", "int64", "uint8", "uint16")
"""Types of inputs that the client takes (qai_hub 0.56)."""
Specs = dict[str, tuple[tuple[int, ...], str]]


def input_specs(exported: Exported, tokens: int, past: int) -> Specs:
    """Return shape and type of each input for `tokens` new ones after `past`, of a graph in the fused form.

    Past and present are one buffer there, so its length is that of both. Raises UnsupportedModel for a plain graph.
    """
    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    manifest = exported.folder / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8")).get("runtime", {}) if manifest.exists() else {}
    cache = told.get("kv_cache", "float32")
    if told.get("operators") != "fused" or cache != "float32":
        raise UnsupportedModel(
            f"{exported.name}: AI Hub needs fixed shapes, which only a graph in the fused form has, and inputs of "
            f"{', '.join(TYPES)}; found the {told.get('operators', 'plain')} form and a cache of {cache}. Export it "
            "with `operators: fused` and `kv_cache: float32`."
        )
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    slots = (1, heads, tokens + past, width)
    specs: Specs = {"input_ids": ((1, tokens), "int64"), "attention_mask": ((1, tokens + past), "int64")}
    for layer in range(int(config["num_hidden_layers"])):
        for part in ("key", "value"):
            specs[f"past_key_values.{layer}.{part}"] = (slots, cache)
    return specs


def aihub_events(name: str, exported: Exported, protocol: Protocol) -> Iterator[Event]:
    """Yield events as the runner's. Raises MissingExtra without the client, TargetError with what it said."""
    if find_spec("qai_hub") is None:
        raise MissingExtra("Measuring on a hosted phone", "aihub")
    if exported.format != "onnx":
        raise UnsupportedModel(f"aihub:{name}: {exported.name} is {exported.format}; an ONNX folder is needed.")
    shapes = {"prefill": input_specs(exported, protocol.prompt_tokens, 0),
              "decode": input_specs(exported, 1, protocol.prompt_tokens)}  # fmt: skip
    import qai_hub  # type: ignore[import-not-found, unused-ignore]

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        folder = _graph_alone(exported.folder, Path(scratch) / "model")
        try:
            found = {part: _profiled(qai_hub, name, folder, specs) for part, specs in shapes.items()}
        except qai_hub.client.Error as error:
            raise TargetError(f"aihub:{name}: AI Hub refuses: {error}") from error
    yield {"event": "start", "runtime": "aihub", "machine": {"model": name, "system": "Qualcomm AI Hub"}}
    loads = sum(part["first_load_time"] or 0 for part in found.values()) / 1e6
    yield {"event": "loaded", "load_seconds": loads, "version": f"AI Hub (qai_hub {qai_hub.__version__})"}
    peaks = [part["estimated_inference_peak_memory"] for part in found.values()]
    peak = None if None in peaks else max(peaks)
    prefill = found["prefill"]["estimated_inference_time"] / 1e6
    times = found["decode"].get("all_inference_times") or [found["decode"]["estimated_inference_time"]]
    for index, micro in enumerate(times[: protocol.repeats]):
        yield {"event": "repeat", "index": index, "first_token_seconds": prefill, "token_seconds": [micro / 1e6],
               "peak_memory_bytes": peak}  # fmt: skip
    yield {"event": "note", "note": "single inferences of fixed shapes, timed by AI Hub"}
    yield {"event": "end"}


def _graph_alone(exported: Path, folder: Path) -> Path:
    """Return a folder with copies of the graph and its weights; the client refuses one with a README beside them."""
    folder.mkdir()
    for path in sorted(exported.iterdir()):
        if path.name.endswith((".onnx", ".onnx.data")):
            shutil.copy2(path, folder)
    return folder


def _profiled(qai_hub: Any, name: str, folder: Path, specs: Specs) -> dict[str, Any]:
    """Return the execution summary of one compiled shape on a device."""
    names = {device.name for device in qai_hub.get_devices()}
    if name not in names:
        raise TargetError(f"aihub:{name}: no such device{did_you_mean(name, sorted(names))}.")
    device = qai_hub.Device(name)
    compiling = qai_hub.submit_compile_job(str(folder), device, input_specs=specs, options="--target_runtime onnx")
    compiled = compiling.get_target_model()
    if compiled is None:
        raise TargetError(f"aihub:{name}: it was not compiled: {compiling.get_status().message}")
    job = qai_hub.submit_profile_job(compiled, device)
    profile = job.download_profile()
    if not profile:
        raise TargetError(f"aihub:{name}: the job did not finish: {job.get_status().message}")
    return dict(profile["execution_summary"])
