"""Two processes on gloo: the same training as one, and checkpoints that go from one number of processes to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    tiny.outcome(folder / "one", stop=8)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(tiny.__file__)), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return json.loads(json.dumps(tiny.outcome(None)))


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> bool:
    lines = zip(found["lines"], expected["lines"], strict=True)
    same_lines = all(
        abs(a[name] - b[name]) < tolerance for a, b in lines for name in ("step", "tokens", "loss", "grad_norm")
    )
    weights = ((found["weights"][name], value) for name, value in expected["weights"].items())
    return same_lines and all(torch.allclose(torch.tensor(a), torch.tensor(b), atol=tolerance) for a, b in weights)


def test_two_processes_train_as_one(two: tuple[Path, list[dict[str, Any]]], one: dict[str, Any]) -> None:
    assert len(one["lines"]) == 12
    for found in two[1]:
        assert close(found["whole"], one)
        assert found["whole"]["lines"][0]["parts"]["twice"] == pytest.approx(2 * found["whole"]["lines"][0]["loss"])


def test_every_process_gets_the_plain_module_back(two: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (found["whole"] for found in two[1])
    assert first["kind"] == "TinyModel"
    assert first["weights"] == second["weights"]
    assert first["buffer"] == 24


def test_two_processes_resume_exactly(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in two[1]:
        assert found["resumed"] == found["whole"]
    log = [json.loads(line) for line in (two[0] / "two" / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13))


def test_two_processes_go_on_from_one(two: tuple[Path, list[dict[str, Any]]], one: dict[str, Any]) -> None:
    for found in two[1]:
        assert close(found["from_one"], one)


def test_one_process_goes_on_from_two(two: tuple[Path, list[dict[str, Any]]], one: dict[str, Any]) -> None:
    checkpoint = two[0] / "two_for_one" / "checkpoints" / "step-00000005"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json",
    ]  # fmt: skip
    assert close(tiny.outcome(two[0] / "two_for_one"), one)


def test_a_batch_that_cannot_be_cut_is_refused(two: tuple[Path, list[dict[str, Any]]]) -> None:
    for found in two[1]:
        assert found["uneven"]["error"] == (
            "train: batch_size=6 cannot be cut into gradient_accumulation=2 pieces for each of 2 "
            "processes. Take a multiple of 4."
        )
