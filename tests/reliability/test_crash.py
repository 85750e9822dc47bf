"""The crash harness in short: a run ended a few times in different ways ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import valid_files
from crash import MICRO

HARNESS = Path(__file__).with_name("crash.py")


def test_every_step_of_a_recipe_is_crashed() -> None:
    from dwindle.pipeline.recipe import ORDER

    assert set(MICRO) == set(ORDER), "a step has no micro options in tests/reliability/crash.py"


@pytest.mark.slow
@pytest.mark.skipif("DWINDLE_CRASH" not in os.environ, reason="minutes of work: make crash, or set DWINDLE_CRASH=1")
def test_ended_runs_go_on_and_end_equal(tmp_path: Path) -> None:
    kept = os.environ.get("DWINDLE_VALID_FILES")
    files = valid_files.make(Path(kept) if kept else tmp_path / "files")
    shutil.copytree(files, tmp_path / "own", dirs_exist_ok=True)
    done = subprocess.run([sys.executable, str(HARNESS), "--kills", "8", "--seed", "3", "--quick", "--files", str(tmp_path / "own")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
