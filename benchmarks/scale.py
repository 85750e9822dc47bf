"""Memory and time of `dwindle quantize` on a checkpoint that does not fit the memory it may use.

    python benchmarks/scale.py --layers 22 --target-bits-per-weight 3.5 [--data TEXT]

Writes a random Llama (`random_llama.py`: 22 layers are 1.1 billion weights, fp16, sharded) into a scratch folder,
quantizes it with the command line in a fresh process, and prints one JSON line: wall seconds, CPU seconds (which a busy
machine does not stretch), those per billion weights, and the process's highest resident set, which counts pages of
mapped files too. Run it at 11 and at 22 layers
to see whether time grows with the weights and memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protocol import assets, model_folder

HERE = Path(__file__).resolve().parent
TOKENIZER = "pycode-6m"
"""Whose tokenizer the random model gets."""


def _waited(command: list[str]) -> tuple[float, float, int]:
    """Return (seconds, CPU seconds, peak resident bytes) of a command; raise CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Make the model, quantize it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--target-bits-per-weight", type=float, default=3.5)
    parser.add_argument("--data", help="Calibration text; without it the weights alone decide.")
    parser.add_argument("--model", type=Path, help="A random Llama made before; else one is made and thrown away.")
    options = parser.parse_args()
    if not model_folder(TOKENIZER).is_dir():
        parser.exit(0, f"scale: skipped, there is no tokenizer below {assets()}; set DWINDLE_ASSETS.\n")
    with tempfile.TemporaryDirectory(prefix="dwindle-scale-") as folder:
        model = options.model or Path(folder) / "random-llama"
        if not model.is_dir():
            made = [sys.executable, str(HERE / "random_llama.py"), str(model), "--layers", str(options.layers)]
            _waited([*made, "--tokenizer", str(model_folder(TOKENIZER))])
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) // 2
        command = [sys.executable, "-P", "-m", "dwindle.pipeline.cli", "quantize", "-m", str(model)]
        command += ["-o", str(Path(folder) / "quantized"), "--scheme", "palettize"]
        command += ["--target-bits-per-weight", str(options.target_bits_per_weight)]
        command += ["-d", options.data] if options.data else []
        seconds, cpu_seconds, peak = _waited(command)
    result = {"weights": weights, "seconds": seconds, "cpu_seconds": cpu_seconds}
    result["cpu_seconds_per_billion_weights"] = cpu_seconds / weights * 1e9
    print(json.dumps(result | {"peak_rss_bytes": peak, "calibrated": bool(options.data)}))


if __name__ == "__main__":
    main()
