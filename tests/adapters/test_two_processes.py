"""Two gloo processes train the adapters that one trains: recovery, answers and preferences, with replay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent))
import two_processes_of_adapters as two_processes


def test_two_processes_adapt_as_one(tmp_path: Path, tiny_bundle: Callable[..., Any]) -> None:
    teacher = tiny_bundle("llama")
    teacher.save(tmp_path / "teacher")
    quantized(teacher, QuantizeOptions(scheme="palettize", bits=3))[0].save(tmp_path / "base")
    rows = [{"prompt": f"{n}: a {a} says", "completion": s, "worse": s[::-1]}
            for n in range(16) for a, s in (("cat", "meow"), ("dog", "woof"))]  # fmt: skip
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(two_processes.__file__)), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one = two_processes.outcome(tmp_path, "one")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert one["sft"]["replayed"] == one["dpo"]["replayed"] > 0
    for name, wanted in one.items():
        found = first[name]
        assert found["tensors"].keys() == wanted["tensors"].keys()
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3, abs=1e-4), name
        for tensor, value in wanted["tensors"].items():
            assert torch.allclose(torch.tensor(found["tensors"][tensor]), torch.tensor(value), atol=2e-3), tensor
    held_out = json.loads((tmp_path / "two" / "held_out.json").read_text())
    assert held_out["losses"] == first["sft"]["held_out"]
