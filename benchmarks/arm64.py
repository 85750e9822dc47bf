"""The runner and an int4 artefact in an arm64 Debian root under qemu-user: the same tokens as on this machine?

    python benchmarks/arm64.py ARTEFACT [--root FOLDER] [--prompt 32] [--steps 64]

Shows that what `dwindle bench` sends to a board runs there, on an architecture that this machine is not; of speed it
says nothing: an emulated token takes a hundred times as long. ARTEFACT is a folder of `dwindle export --format onnx`.

The root is made once: `mmdebstrap` unpacks Debian 12 with Python for arm64, `pip download` gets numpy's and
onnxruntime's wheels for aarch64, of the versions installed here. Needed: qemu-user-static and mmdebstrap.
A few lines of /proc and /sys are written into the root, as an arm64 core has them: ONNX Runtime's look at the processor
reads those, and dies of x86's under an arm64 instruction set.

Prints one JSON line; exits with 1 if a token differs, with 2 if a tool is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from dwindle.devices.exported import open_exported
from dwindle.devices.host_process import RUNNER

QEMU = "qemu-aarch64-static"
SUITE = "bookworm"
PYTHON = "3.11"
PACKAGES = "python3-minimal,python3,libpython3-stdlib,libstdc++6,libgcc-s1,zlib1g"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
PROCESSOR = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
FILES = {"proc/cpuinfo": PROCESSOR, "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n",
         "sys/devices/system/cpu/possible": "0\n", "sys/devices/system/cpu/present": "0\n"}  # fmt: skip


def make_root(root: Path) -> None:
    """Unpack Debian and the wheels."""
    command = ["mmdebstrap", "--quiet", "--variant=extract", "--arch=arm64", f"--include={PACKAGES}", SUITE, str(root)]
    subprocess.run(command, check=True)
    wheels = root / "wheels"
    wanted = [f"{name}=={metadata.version(name)}" for name in ("numpy", "onnxruntime")]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", *platforms,
                    "--python-version", PYTHON, "-d", str(wheels), *wanted], check=True)  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "site")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(python: list[str], artefact: Path, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Return what the runner says under a Python: the machine, the runtime and the tokens."""
    exported = open_exported(artefact)
    flags = {"prompt-tokens": options.prompt, "decode-tokens": options.steps, "repeats": 1, "threads": 1,
             "vocabulary": exported.vocabulary, "context": options.prompt + options.steps}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([*python, str(RUNNER), str(exported.folder), *words], capture_output=True, text=True,
                          env={**os.environ, **environment}, check=False)  # fmt: skip
    events = {event["event"]: event for event in map(json.loads, done.stdout.splitlines())}
    if "end" not in events:
        raise SystemExit(f"{python[0]}: {events.get('error', done.stderr[-500:])}")
    repeat = events["repeat"]
    seconds = repeat["first_token_seconds"] + sum(repeat["token_seconds"])
    return {"machine": events["start"]["machine"]["machine"], "runtime": events["loaded"]["version"],
            "tokens": repeat["tokens"], "seconds": seconds}  # fmt: skip


def main() -> int:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--root", type=Path, help="Where the root is, or is made; default: a temporary folder.")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    missing = [tool for tool in (QEMU, "mmdebstrap") if shutil.which(tool) is None]
    if missing:
        print(f"not run: no {', '.join(missing)} (Debian: apt install qemu-user-static mmdebstrap)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        root = options.root or Path(scratch) / "root"
        if not (root / "site").exists():
            make_root(root)
        emulated = [QEMU, "-L", str(root), str(root / f"usr/bin/python{PYTHON}")]
        there = run(emulated, options.artefact, options, {"PYTHONPATH": str(root / "site"), "PYTHONNOUSERSITE": "1"})
    here = run([sys.executable, "-P"], options.artefact, options, {})
    same = here["tokens"] == there["tokens"]
    print(json.dumps({"same_tokens": same, "tokens": len(here["tokens"]), "distinct": len(set(here["tokens"])),
                      "here": {k: here[k] for k in ("machine", "runtime", "seconds")},
                      "there": {k: there[k] for k in ("machine", "runtime", "seconds")}}))  # fmt: skip
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
