"""The README stays true: every command in it is run, its Python example too."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.+)$", TEXT, flags=re.MULTILINE)
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_readme_has_commands_and_an_example() -> None:
    assert len(COMMANDS) >= 10
    assert len(EXAMPLES) == 1
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 20


@pytest.fixture(scope="module")
def desk(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository after `make demo`, for the commands to run in."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "demo-run").symlink_to(demo_run)
    (desk / "recipes").symlink_to(ROOT / "recipes")
    return desk


@pytest.mark.demo
@pytest.mark.timeout(1800)  # the demo and its distillation share the machine with whatever else runs there
def test_every_command_runs(desk: Path) -> None:
    environment = os.environ | {"XDG_CONFIG_HOME": str(desk / "config")}
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":  # the demo has just been run by the fixture, the tests are running now
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            continue
        assert words[0] == "dwindle", command
        done = subprocess.run([sys.executable, "-P", "-m", "dwindle.pipeline.cli", *words[1:]], cwd=desk, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.demo
@pytest.mark.timeout(1800)  # the demo and its distillation share the machine with whatever else runs there
def test_the_example_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    (desk / "example.py").write_text(EXAMPLES[0])
    names = runpy.run_path(str(desk / "example.py"))
    teacher, student, apple, android = names["results"]
    assert teacher.kl_nats_per_token == 0
    assert student.parameters < teacher.parameters
    assert apple.bytes < student.bytes
    assert android.bytes < student.bytes
    assert all(a.parity.passed for a in names["artifacts"])
