"""Can the optional packages be imported? Each is asked in a process of its own, so that none can take another down.

A package can be installed and broken: a library it needs is missing, or it does not go with another's version. That
must cost the one feature that needs it. `broken_packages` finds such packages for `dwindle doctor`; `package_at_fault`
tells, of an error that came out of an import, whose import it was.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

__all__ = ["OPTIONAL", "broken_packages", "package_at_fault"]

OPTIONAL = {
    "onnx": "export to ONNX", "onnxruntime": "run ONNX artifacts", "onnxscript": "export of encoders",
    "coremltools": "export to Core ML", "coreai_torch": "export to Core AI", "peft": "adapters",
    "optimum": "export of encoders", "matplotlib": "report --plots",
}  # fmt: skip
"""Import name -> what cannot be done without it."""
_SECONDS = 120


def broken_packages(names: Iterable[str] = OPTIONAL) -> dict[str, str]:
    """Return import name -> the last line of its error, for every package that is installed but cannot be imported."""
    there = [name for name in names if find_spec(name) is not None]
    with ThreadPoolExecutor(2) as pool:
        return {name: why for name, why in zip(there, pool.map(_import_error, there), strict=True) if why is not None}


def _import_error(name: str) -> str | None:
    try:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True,  # noqa: S603
                              timeout=_SECONDS, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its import takes longer than {_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"exit code {done.returncode}")[:300]


def package_at_fault(error: BaseException) -> str | None:
    """Return the installed package whose import raised `error`, None if it came from somewhere else.

    It is known by the outermost frame of the traceback that runs the body of a module outside of dwindle.
    """
    places = [Path(p).resolve() for p in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path} if p]
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        module = str(frame.tb_frame.f_globals.get("__name__", ""))
        inside = any(place in Path(code.co_filename).resolve().parents for place in places)
        if code.co_name == "<module>" and module not in ("__main__", "dwindle") and inside:
            top = module.partition(".")[0]
            if top != "dwindle":
                return top
        frame = frame.tb_next
    return None
