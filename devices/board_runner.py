"""Run one exported decoder in this process and print what it took as JSON lines, one as soon as it is known.

    python board_runner.py FOLDER --prompt-tokens 512 --decode-tokens 128 --repeats 5 [--runtime onnxruntime] ...

This file imports nothing of dwindle and stays one file, long as it is: it is copied to boards and phones, where it
needs Python 3.10 and the runtime it drives (`onnxruntime` with numpy, `onnxruntime_genai`, or Apple's `coreai`). It is
always a fresh process, because peak memory is a property of a process: the state before the model is loaded is taken
after the runtime is imported, and the peak counter is set back there where the system allows it (Linux).

    {"event": "start", "runner": 1, "runtime": "onnxruntime 1.31.1", "machine": {...}}
    {"event": "loaded", "load_seconds": s, "context": tokens}
    {"event": "warm_up", "index": i}
    {"event": "repeat", "index": i, "first_token_seconds": s, "token_seconds": [s, ...], "tokens": [id, ...],
     "processor_seconds": s, "peak_memory_bytes": n, "temperature_c": t or null, "clock_share": f or null,
     "energy_joules": e or null}
    {"event": "end"}
    {"event": "error", "kind": "missing" | "refused" | "memory", "error": text}

Decoding is greedy: prompt ids come from numpy's generator of seed 0, so two machines that compute alike print the same
tokens. A graph in the fused form (no `position_ids`) reads and writes one buffer of `--context` tokens per tensor, as
ONNX Runtime GenAI does, and the buffers are touched, so the peak counts them; any other graph returns a grown cache,
which is fed back without copying it. Energy is told where the machine has a meter of its own (RAPL, a battery that
discharges) and nowhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["CoreAIDecoder", "GenAIDecoder", "OnnxDecoder", "energy_joules", "machine", "main", "temperature"]

PROTOCOL = 1
_TYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32", "tensor(float16)": "float16",
          "tensor(int8)": "int8"}  # fmt: skip
_HEADROOM = 0.9
"""Share of the memory that is free which a cache may take."""


class OnnxDecoder:
    """A session of plain ONNX Runtime and the cache between its calls."""

    def __init__(self, folder: Path, threads: int | None, context: int) -> None:
        import numpy as np
        import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self.context = context
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads:
            options.intra_op_num_threads = threads
        self._np: Any = np
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session: Any = onnxruntime.InferenceSession(str(folder / "model.onnx"), options,
                                                         providers=["CPUExecutionProvider"])  # fmt: skip
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.pasts = [name for name in self.inputs if name.startswith("past_key_values.")]
        self._check()
        self.shared = "position_ids" not in self.inputs and "attention_mask" in self.inputs
        self._buffers = self._empty(context) if self.shared else []
        self.reset()

    def _check(self) -> None:
        if "input_ids" not in self.inputs or not self.pasts:
            raise ValueError(f"needed input_ids and past_key_values.*; the model takes {', '.join(self.inputs)}")
        if len(self.outputs) != 1 + len(self.pasts):
            raise ValueError(
                f"needed logits and {len(self.pasts)} cache outputs; the model gives {', '.join(self.outputs)}"
            )
        known = {"input_ids", "attention_mask", "position_ids", *self.pasts}
        unknown = [name for name in self.inputs if name not in known]
        if unknown:
            raise ValueError(f"inputs that cannot be filled: {', '.join(unknown)}")

    def _empty(self, tokens: int) -> list[Any]:
        """Return a cache of so many tokens, every page of it touched."""
        shapes = {n: (1, self.inputs[n].shape[1], tokens, self.inputs[n].shape[3]) for n in self.pasts}
        types = {n: self._np.dtype(_TYPES[self.inputs[n].type]) for n in self.pasts}
        needed = sum(int(self._np.prod(shapes[n])) * types[n].itemsize for n in self.pasts)
        free = _free_bytes()
        if free is not None and needed > _HEADROOM * free:
            raise MemoryError(f"a cache of {tokens:,} tokens takes {needed / 1e9:.2f} GB of the {free / 1e9:.2f} GB "
                              "that are free; ask for a smaller context")  # fmt: skip
        made = []
        for name in self.pasts:
            array = self._np.empty(shapes[name], types[name])
            array.fill(0)
            made.append(self._value(array))
        return made

    def reset(self) -> None:
        """Empty the cache."""
        self.length = 0
        self.cache = self._buffers if self.shared else self._empty(0)

    def step(self, ids: list[int]) -> int:
        """Append tokens and return the most likely next one."""
        total = self.length + len(ids)
        values = {"input_ids": [ids], "attention_mask": [[1] * total],
                  "position_ids": [list(range(self.length, total))]}  # fmt: skip
        feeds = {name: self._np.array(rows, dtype=_TYPES[self.inputs[name].type])
                 for name, rows in values.items() if name in self.inputs}  # fmt: skip
        logits = self._bound(feeds) if self.shared else self._grown(feeds)
        self.length = total
        return int(logits[0, -1].argmax())

    def _grown(self, feeds: dict[str, Any]) -> Any:
        values = {name: self._value(array) for name, array in feeds.items()}
        values.update(zip(self.pasts, self.cache, strict=True))
        logits, *self.cache = self.session.run_with_ort_values(self.outputs, values)
        return logits.numpy()

    def _bound(self, feeds: dict[str, Any]) -> Any:
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for past, present, buffer in zip(self.pasts, self.outputs[1:], self.cache, strict=True):
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
        binding.bind_output(self.outputs[0])
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


class GenAIDecoder:
    """ONNX Runtime GenAI's own generation loop."""

    def __init__(self, folder: Path, threads: int | None, context: int) -> None:
        import onnxruntime_genai as genai

        self.version = f"onnxruntime-genai {getattr(genai, '__version__', '')}".strip()
        self.context = context
        config = genai.Config(str(folder))
        if threads:
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._genai: Any = genai
        self._model = genai.Model(config)
        self.reset()

    def reset(self) -> None:
        """Start a text anew, never ended by the model."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self.context, min_length=self.context, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._fed = False

    def step(self, ids: list[int]) -> int:
        """Append the prompt, or let the generator go on from its own last token; return the next one."""
        import numpy as np

        if not self._fed:
            self._generator.append_tokens(np.array(ids, dtype=np.int32))
            self._fed = True
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class CoreAIDecoder:
    """Functions `prefill` and `decode` of a Core AI asset in Apple's runtime; on Linux that is an interpreter."""

    def __init__(self, folder: Path, threads: int | None, context: int) -> None:
        import asyncio

        import numpy as np
        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray

        self._np, self._array = np, NDArray
        self._loop = asyncio.new_event_loop()
        asset = AIModelAsset.load(folder / "model.aimodel")
        metadata: Any = asset.metadata
        described = metadata.creator_defined_metadata
        self._prefill = int(described["dwindle.prefill_tokens"])
        self._shape = json.loads(described["dwindle.state_shape"])
        self._dtype = np.dtype(described["dwindle.compute"])
        self.context = min(context, int(described["dwindle.context_length"]))
        self.version = f"coreai-core {_version_of('coreai-core')}"
        self._base = {name: NDArray(np.full(shape, value, self._dtype))
                      for name, shape, value in json.loads(described.get("dwindle.base_inputs", "[]"))}  # fmt: skip
        self._functions = self._loop.run_until_complete(self._loaded(asset))
        self.reset()

    @staticmethod
    async def _loaded(asset: Any) -> dict[str, Any]:
        async with asset.executable() as model:
            return {name: model.load_function(name) for name in ("prefill", "decode")}

    def reset(self) -> None:
        """Empty the cache."""
        self._state = {
            name: self._array(self._np.zeros(self._shape, self._dtype)) for name in ("key_cache", "value_cache")
        }
        self.length = 0

    def step(self, ids: list[int]) -> int:
        """Append tokens, in pieces where the program is static, and return the most likely next one."""
        token, left = 0, list(ids)
        while left:
            size = len(left)
            if self._prefill:
                size = min(size, self._prefill) if self.length + self._prefill <= self.context else 1
            token = self._call(left[:size])
            left = left[size:]
        return token

    def _call(self, ids: list[int]) -> int:
        name, end = "decode" if len(ids) == 1 else "prefill", self.length + len(ids)
        fed = self._np.array([ids], dtype=self._np.int32)
        positions = self._np.arange(end, dtype=self._np.int32)
        if self._prefill:
            padded = 1 if len(ids) == 1 else self._prefill
            fed = self._np.pad(fed, ((0, 0), (0, padded - len(ids))))
            positions = self._np.arange(self.length, self.length + padded, dtype=self._np.int32)
        inputs = {"input_ids": self._array(fed), "position_ids": self._array(positions[None]), **self._base}
        found = self._loop.run_until_complete(self._functions[name](inputs, state=self._state))
        self.length = end
        return int(found["logits"].numpy()[0, len(ids) - 1].argmax())


DECODERS = {
    "onnxruntime": (OnnxDecoder, ("numpy", "onnxruntime")),
    "genai": (GenAIDecoder, ("numpy", "onnxruntime_genai")),
    "coreai": (CoreAIDecoder, ("numpy", "coreai.runtime")),
}
"""Runtime -> what drives it and what it imports."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; on a fault the last line is an error and 1 is returned."""
    parser = argparse.ArgumentParser(prog="board_runner.py")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=tuple(DECODERS), default="onnxruntime")
    for name in ("prompt-tokens", "decode-tokens", "repeats", "vocabulary", "context"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=0)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    try:
        _measure(given)
    except ImportError as error:
        return _failed("missing", error.name or str(error))
    except MemoryError as error:
        return _failed("memory", str(error) or "out of memory")
    except Exception as error:  # noqa: BLE001  (runtimes raise types of their own; the other side makes errors of them)
        return _failed("refused", f"{type(error).__name__}: {error}")
    _print("end")
    return 0


def _measure(given: argparse.Namespace) -> None:
    kind, modules = DECODERS[given.runtime]
    for module in modules:
        __import__(module)
    import numpy as np

    _print("start", runner=PROTOCOL, runtime=given.runtime, machine=machine())
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, given.vocabulary, given.prompt_tokens)]
    before = _set_back_peak()
    started = time.perf_counter()
    decoder: Any = kind(given.folder, given.threads, given.context)
    load_seconds = time.perf_counter() - started
    _print("loaded", load_seconds=load_seconds, context=decoder.context, version=decoder.version)
    for index in range(given.warm_up + given.repeats):
        meter = energy_joules()
        first, each, tokens, busy = _turn(decoder, prompt, given.decode_tokens)
        after = energy_joules()
        if index < given.warm_up:
            _print("warm_up", index=index)
            continue
        used = None if meter is None or after is None else max(0.0, after - meter)
        _print("repeat", index=index - given.warm_up, first_token_seconds=first, token_seconds=each, tokens=tokens,
               processor_seconds=busy, peak_memory_bytes=max(0, _peak_bytes() - before),
               temperature_c=temperature(), clock_share=_clock_share(), energy_joules=used)  # fmt: skip


def _turn(decoder: Any, prompt: list[int], count: int) -> tuple[float, list[float], list[int], float]:
    """Return seconds to the first token and of each later one, all tokens, and processor seconds of the later ones."""
    decoder.reset()
    start = time.perf_counter()
    tokens = [decoder.step(prompt)]
    first, each, busy = time.perf_counter() - start, [], time.process_time()
    for _ in range(count):
        start = time.perf_counter()
        tokens.append(decoder.step([tokens[-1]]))
        each.append(time.perf_counter() - start)
    return first, each, tokens, time.process_time() - busy


def _print(event: str, **values: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def _failed(kind: str, text: str) -> int:
    _print("error", kind=kind, error=text)
    return 1


def _version_of(distribution: str) -> str:
    from importlib import metadata

    return metadata.version(distribution)


def machine() -> dict[str, Any]:
    """Return what is known of this machine without asking another program."""
    model = _read("/proc/device-tree/model") or _field("/proc/cpuinfo", "model name") or platform.processor()
    return {"system": platform.platform(terse=True), "machine": platform.machine(), "cpu": model.strip("\0 "),
            "processors": os.cpu_count(), "python": platform.python_version(),
            "memory_bytes": _kilobytes("/proc/meminfo", "MemTotal"), "temperature_c": temperature()}  # fmt: skip


def temperature() -> float | None:
    """Return degrees Celsius of the warmest thermal zone, or None where the system has none."""
    found = [_read(str(path)) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    degrees = [int(text) / 1000 for text in found if text.lstrip("-").isdigit()]
    return max(degrees) if degrees else None


def _clock_share() -> float | None:
    """Return the fastest core's clock as a share of its highest, or None where the system does not say."""
    shares = []
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"):
        now, most = _read(str(folder / "scaling_cur_freq")), _read(str(folder / "cpuinfo_max_freq"))
        if now.isdigit() and most.isdigit() and int(most):
            shares.append(int(now) / int(most))
    return max(shares) if shares else None


def energy_joules(root: Path = Path("/sys/class")) -> float | None:
    """Return joules used since some start, from RAPL's packages or a discharging battery; None without a meter."""
    packages = [_read(str(p / "energy_uj")) for p in root.glob("powercap/*-rapl:*") if p.name.count(":") == 1]
    counted = [int(text) for text in packages if text.isdigit()]
    if counted:
        return sum(counted) / 1e6
    for battery in root.glob("power_supply/*"):
        if _read(str(battery / "status")) != "Discharging":
            continue
        energy = _read(str(battery / "energy_now"))
        if energy.isdigit():
            return -int(energy) * 3600 / 1e6
        charge, volts = _read(str(battery / "charge_now")), _read(str(battery / "voltage_now"))
        if charge.isdigit() and volts.isdigit():
            return -int(charge) * int(volts) * 3600 / 1e12
    return None


def _read(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _field(path: str, name: str) -> str:
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _kilobytes(path: str, name: str) -> int | None:
    value = _field(path, name).split()
    return int(value[0]) * 1024 if value and value[0].isdigit() else None


def _free_bytes() -> int | None:
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _set_back_peak() -> int:
    """Set the peak counter back to the present where the system can; return the resident bytes now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    resident = _kilobytes("/proc/self/status", "VmRSS")
    return _peak_bytes() if resident is None else resident


def _peak_bytes() -> int:
    """Return the peak resident bytes of this process."""
    peak = _kilobytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


if __name__ == "__main__":
    raise SystemExit(main())
