"""`--max-memory` is kept: what is over it ends with the numbers, a training cuts its batch, nothing hangs or is lost."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle import memory_limit
from dwindle.memory_limit import MemoryLimitReached, memory_held_to
from dwindle.resources import available_memory_bytes, held_bytes, memory_limit_bytes
from dwindle.train import train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny

CODE = """
import sys, time, resource
from dwindle import memory_limit
from dwindle.memory_limit import MemoryLimitReached, memory_held_to
try:
    with memory_held_to(300_000_000):
        {act}
except MemoryLimitReached as error:
    print("told:", error)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
GROW = """
        held = []
        while len(held) < 400:
            held.append(bytearray(10_000_000))
            time.sleep(0.05)
"""
CHILD = """
        import subprocess
        made = subprocess.Popen([sys.executable, "-c", "x = bytearray(400_000_000); input()"], stdin=subprocess.PIPE)
        try:
            made.wait()
        finally:
            made.kill()
"""
DEAF = """
        import signal
        from dwindle import memory_limit
        memory_limit._PATIENCE_SECONDS = 0.2
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        held = bytearray(400_000_000)
        time.sleep(100)
"""


def ended(act: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", CODE.format(act=act.strip())],
                          capture_output=True, text=True, check=False, timeout=240)  # fmt: skip


def test_what_grows_over_the_limit_is_ended_there() -> None:
    done = ended(GROW)
    assert re.search(r"told: memory: [01]\.\d", done.stdout), done.stdout + done.stderr
    assert "GB by this process), and --max-memory allows 0.30 GB" in done.stdout
    peak = int(done.stdout.rpartition("peak ")[2])
    assert 250e6 < peak < 2e9, "4 GB were asked for; on a crowded machine the watch may be late"


def test_processes_that_it_started_count() -> None:
    done = ended(CHILD)
    assert re.search(r"by this process \+ 0.\d\d GB by 1 processes it started\)", done.stdout), (
        done.stdout + done.stderr
    )


def test_code_that_does_not_listen_is_ended_with_the_process() -> None:
    done = ended(DEAF)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: memory: 0.4")
    assert "told" not in done.stdout


class _Hungry(tiny.TinyLoss):
    """Holds as much as its windows ask for, for longer than the watch looks away."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, float]]:
        self.seen.append(len(batch))
        held = torch.ones(len(batch), 50_000_000, dtype=torch.uint8)
        for _ in range(2000 if len(batch) == 8 else 20):  # the whole batch waits to be noticed, on a busy machine, too
            time.sleep(0.01)
        assert held[-1, -1] == 1
        return super().loss(model, batch)


def test_a_training_cuts_its_batch(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "_started_by_this", list)  # other tests may have left a helper running
    options, hungry = replace(tiny.OPTIONS, steps=2, batch_size=8, gradient_accumulation=1), _Hungry()
    train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options)  # what torch loads late is held by now
    with caplog.at_level(logging.WARNING, logger="dwindle"), memory_held_to(held_bytes(os.getpid()) + 280_000_000):
        train(tiny.TinyModel(), hungry, tiny.tiny_tokens(), options)
    assert hungry.seen == [8, 4, 4, 4, 4], "400 MB are too many, 200 MB are not"
    assert "now cut into 2 pieces of 4" in caplog.text


def test_what_is_refused_beforehand_counts_as_the_watch_does() -> None:
    """torch's libraries are mapped: they are resident, and the system can take them back."""
    with memory_held_to(held_bytes(os.getpid()) + 100_000_000):
        assert 50_000_000 < available_memory_bytes() <= 100_000_000


def test_the_limit_ends_with_its_block() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(MemoryLimitReached), memory_held_to(1):
        assert memory_limit_bytes() == 1
        time.sleep(5)
    assert memory_limit_bytes() is None
    assert signal.getsignal(signal.SIGUSR1) is before
    assert held_bytes(2**22 + 1) == 0, "no such process"
