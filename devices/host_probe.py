"""Run one exported ONNX decoder in this process and print what it took, as one line of JSON. Torch-free.

    python -m dwindle.devices.host_probe FOLDER --prompt-tokens 128 --decode-tokens 64 --repeats 3 [--threads 2]

`targets.measure_host` starts it in a fresh process, because peak memory is a property of a process: the state before
the model is loaded is taken after onnxruntime is imported, and the peak counter is set back there where the system
allows it (Linux). Names, shapes and types come from the session: `input_ids`, optional `attention_mask` and
`position_ids`, and pairs `past_key_values.N.key|value` [B, K, P, D] answered by as many outputs, in the same order,
after the logits. Decoding is greedy, each step fed with the cache of the one before, without copying it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["main", "probe"]

_TYPES = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32", "tensor(float16)": "float16"}


class _Decoder:
    """A session and the cache between its calls."""

    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self.runtime = onnxruntime
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.pasts = [name for name in self.inputs if name.startswith("past_key_values.")]
        self._check()
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

    def reset(self) -> None:
        """Empty the cache."""
        import numpy as np

        self.length = 0
        self.cache: list[Any] = []
        for name in self.pasts:
            _, heads, _, width = self.inputs[name].shape
            empty = np.zeros((1, heads, 0, width), dtype=_TYPES[self.inputs[name].type])
            self.cache.append(self.runtime.OrtValue.ortvalue_from_numpy(empty))

    def step(self, ids: list[int]) -> int:
        """Append tokens and return the most likely next one."""
        import numpy as np

        total = self.length + len(ids)
        values = {
            "input_ids": [ids],
            "attention_mask": [[1] * total],
            "position_ids": [list(range(self.length, total))],
        }
        feeds = {
            name: self.runtime.OrtValue.ortvalue_from_numpy(np.array(rows, dtype=_TYPES[self.inputs[name].type]))
            for name, rows in values.items()
            if name in self.inputs
        }
        feeds.update(zip(self.pasts, self.cache, strict=True))
        logits, *self.cache = self.session.run_with_ort_values(self.outputs, feeds)
        self.length = total
        return int(logits.numpy()[0, -1].argmax())


def probe(folder: Path, prompt_tokens: int, decode_tokens: int, repeats: int, threads: int | None) -> dict[str, Any]:
    """Return seconds to the first token and per decoded token of every repeat, and bytes of peak memory."""
    import numpy as np
    import onnxruntime

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocabulary = int(config["vocab_size"])
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, vocabulary, prompt_tokens)]
    before = _set_back_peak()
    start = time.perf_counter()
    decoder = _Decoder(folder / "model.onnx", threads)
    load_seconds = time.perf_counter() - start
    first, each = [], []
    for _ in range(repeats):
        decoder.reset()
        start = time.perf_counter()
        token = decoder.step(prompt)
        first.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(decode_tokens):
            token = decoder.step([token])
        each.append((time.perf_counter() - start) / decode_tokens)
    return {
        "first_token_seconds": first, "token_seconds": each, "load_seconds": load_seconds,
        "peak_memory_bytes": max(0, _peak_bytes() - before), "memory_before_bytes": before,
        "prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "threads": threads,
        "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


def _status_bytes(field: str) -> int | None:
    """Return a kB field of /proc/self/status in bytes, or None where there is no such file."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
    return None


def _set_back_peak() -> int:
    """Set the peak counter back to the present where the system can; return the resident bytes now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    resident = _status_bytes("VmRSS")
    return _peak_bytes() if resident is None else resident


def _peak_bytes() -> int:
    """Return the peak resident bytes of this process."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def main(arguments: list[str] | None = None) -> int:
    """Run the probe and write its JSON, or `{"error": ...}` and return 1."""
    parser = argparse.ArgumentParser(prog="python -m dwindle.devices.host_probe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--decode-tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    try:
        found = probe(given.folder, given.prompt_tokens, given.decode_tokens, given.repeats, given.threads)
    except Exception as error:  # noqa: BLE001  (onnxruntime raises its own types; the parent turns this into an error)
        sys.stdout.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
