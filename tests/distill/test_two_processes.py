"""Two gloo processes with FSDP2 give the losses of one: a tied head, a logit cap, projections, moving targets,
evaluations, the student's own text; and half of the teachers in each, of which each has read no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import two_processes


def test_two_processes_distill_as_one(tmp_path: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(7)
    gpt2 = CONFIG_MAPPING["gpt2"](vocab_size=two_processes.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    teachers = {"gemma2": two_processes.model("gemma2", 1, two_processes.TEACHER_WIDTH, 3),
                "gpt2": AutoModelForCausalLM.from_config(gpt2)}  # fmt: skip
    for name, model in teachers.items():
        model.save_pretrained(tmp_path / name, max_shard_size="30KB")
        tiny_tokenizer.save_pretrained(tmp_path / name)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(two_processes.__file__)), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one = two_processes.outcome(tmp_path)
    assert len(one["lines"]) == two_processes.OPTIONS.steps + 2
    assert "evaluation_kl_nats_per_token" in one["lines"][5]
    assert "jsd_written" in one["lines"][6]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for ours, theirs in zip(found["lines"], one["lines"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert found["held"]["student"] == pytest.approx(one["held"]["student"] / 2, rel=0.02)  # padded to whole rows
        outside = two_processes.VOCAB * two_processes.TEACHER_WIDTH + two_processes.TEACHER_WIDTH  # stay gathered
        assert found["held"]["teacher"] <= 0.51 * (one["held"]["teacher"] - outside) + outside
        assert found["held"]["loaded"] == pytest.approx(one["held"]["loaded"] / 2, rel=0.02)
        assert found["logits"] == pytest.approx(one["logits"], rel=1e-4, abs=1e-5)
        assert found["weights"].keys() == one["weights"].keys()
        assert "layer_projections.1.weight" in one["weights"]
        for name, value in one["weights"].items():
            assert torch.allclose(torch.tensor(found["weights"][name]), torch.tensor(value), atol=1e-4), name
