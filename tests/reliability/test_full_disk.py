"""No room for a file, as the operating system says it: every writer ends in one error, and leaves what was there before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CODE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {core!r})
from dwindle.errors import OutputError
place = Path({place!r})
{prepare}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    {act}
except OutputError as error:
    print("told:", error)
"""
ACTS = {
    "model": ("from dwindle.bundle import ModelBundle\nbundle = ModelBundle.load({teacher!r})", "bundle.save(place)"),
    "text": ("from dwindle.storage import write_text", "write_text(place, 'x' * 20_000)"),
    "log": ("from dwindle.storage import append_text", "append_text(place, 'x' * 20_000)"),
    "checkpoint": ("import tiny_training as tiny\nfrom dwindle.train import train",
                   "train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), tiny.OPTIONS, folder=place)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk") / "teacher"
    tiny_bundle().save(folder)
    return folder


@pytest.mark.parametrize("what", ACTS)
def test_it_is_told_and_nothing_is_left(what: str, teacher: Path, tmp_path: Path) -> None:
    prepare, act = ACTS[what]
    core = str(Path(__file__).parents[1] / "core")
    code = CODE.format(core=core, place=str(tmp_path / "out"), prepare=prepare.format(teacher=str(teacher)), act=act)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.stdout.startswith("told:"), done.stderr[-1500:]
    assert "no space left on the device" in done.stdout
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("run.jsonl", "out")]
    assert not left, left
