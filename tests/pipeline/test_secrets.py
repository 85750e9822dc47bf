"""A token in the environment, or in a file that a hub client reads, stays out of everything that a run leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECRETS = {"HF_TOKEN": "hf_ThisMustNotBeSeen0123456789", "AWS_SECRET_ACCESS_KEY": "aws-ThisMustNotBeSeenEither",
           "WANDB_API_KEY": "0123456789wandbkeyThatMustNotBeSeen"}  # fmt: skip


def test_no_secret_is_written_or_printed(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "out"
    steps = [{"prune": {"ffn_keep": 0.5}}, {"distill": {"tokens": 512, "batch_size": 4}}, {"quantize": {"scheme": "integer"}},
             {"export": {"formats": ["onnx"], "prompts": 1}}]  # fmt: skip
    recipe.write_text(recipe_of(steps=steps).to_yaml())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_InTheHome0123456789")
    import os

    environment = {**os.environ, **SECRETS, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-P", "-m", "dwindle.pipeline.cli", "-v", "run", str(recipe), "-o", str(folder), "--json"],
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    places |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    assert len(places) > 20
    for secret in (*SECRETS.values(), "hf_InTheHome0123456789"):
        assert not [place for place, content in places.items() if secret.encode() in content]
