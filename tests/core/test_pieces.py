"""Out of memory in training: the batch is cut smaller, the update stays; and what cannot fit is refused with numbers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dwindle import resources
from dwindle.errors import DoesNotFit
from dwindle.resources import available_memory_bytes, limit_memory, require_memory
from dwindle.train import train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny

OPTIONS = replace(tiny.OPTIONS, steps=4, batch_size=8, gradient_accumulation=1)


class Narrow(tiny.TinyLoss):
    """A machine on which more than `fitting` windows at a time do not fit: torch's own error comes half-way."""

    def __init__(self, fitting: int, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.fitting, self.error, self.sizes = fitting, error, []

    def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        found = super().loss(model, batch)
        self.sizes.append(len(batch))
        if len(batch) > self.fitting:
            raise self.error("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return found


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_the_same_update_in_smaller_pieces(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    wide, narrow = tiny.TinyModel(), tiny.TinyModel()
    train(wide, tiny.TinyLoss(), tiny.tiny_tokens(), replace(OPTIONS, gradient_accumulation=4))
    objective = Narrow(2, error)
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        train(narrow, objective, tiny.tiny_tokens(), OPTIONS)
    assert objective.sizes == [8, 4] + [2] * 16
    for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a, b)
    told = [m for m in caplog.messages if "memory ran out" in m]
    assert "8 windows at a time. The batch of 8 is now cut into 2 pieces of 4" in told[0]
    assert "Set gradient_accumulation: 4" in told[1]


class Remembering:
    """An order that has a state: how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def windows(self, batch_size: int, step: int) -> torch.Tensor:
        self.asked.append(step)
        return torch.arange(batch_size)

    def due(self, step: int) -> bool:
        return False

    def update(self, model: nn.Module, step: int) -> None:
        raise AssertionError

    def state(self) -> dict[str, int]:
        return {"asked": len(self.asked)}

    def restore(self, state: Mapping[str, int]) -> None:
        raise AssertionError


def test_an_order_is_asked_once_for_a_step() -> None:
    order = Remembering()
    train(tiny.TinyModel(), Narrow(2), tiny.tiny_tokens(), OPTIONS, order=order)
    assert order.asked == [0, 1, 2, 3]


def test_what_does_not_fit_at_all_is_told_with_the_numbers() -> None:
    with pytest.raises(
        DoesNotFit, match=r"with 1 windows of \d+ tokens.*8 in a batch, 8 pieces.*one window is the least"
    ):
        train(tiny.TinyModel(), Narrow(0), tiny.tiny_tokens(), OPTIONS)


def test_other_errors_are_not_taken_for_it() -> None:
    class Broken(tiny.TinyLoss):
        def loss(self, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        train(tiny.TinyModel(), Broken(), tiny.tiny_tokens(), OPTIONS)


def test_training_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 100)
    with pytest.raises(
        DoesNotFit, match=r"trainable weights: about .* \(gradients .* \+ moments .*\), 0.00 GB are left"
    ):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), OPTIONS)


def test_a_limit_counts_what_the_process_holds(caplog: pytest.LogCaptureFixture) -> None:
    free = available_memory_bytes()
    try:
        limit_memory(1)
        assert available_memory_bytes() == 0 < free
        with pytest.raises(
            DoesNotFit, match=r"x: about 2.00 GB .* \(a 2.00 GB\), .* under --max-memory 0.00 GB. Do y."
        ):
            require_memory("x", {"a": 2 * 10**9}, "Do y.")
    finally:
        limit_memory(None)
    assert available_memory_bytes() > 0
    with caplog.at_level(logging.WARNING, logger="dwindle"):
        require_memory("x", {"a": int(available_memory_bytes() * 0.9)}, "")
    assert "x: about" in caplog.text
