"""The parity gate of adapters: each one, swapped in and out of one artifact, against the torch model with it on.

The reference is the measured model with the adapter's changes (`dwindle.low_rank.changed`, PEFT's arithmetic; a test
holds it to PEFT's own layers). One text, fed as a prefill and cached one-token steps, is computed on every visit; with
the adapters A and B the visits are

    A, B, none, B, A, none

so that each adapter is computed after another one, after itself was away, and after the base, and the base after
adapters. A leftover of the adapter before, or a state that was not emptied, shows.

In float32 a logit may err by 1e-4, and where logits are large by what the order of float32 sums costs (1e-5 of the
largest). Where a format stores or computes floats in 16 bits, its own limits hold: A and B are rounded like every
other float of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.export.backends import ExecutedRunner
from dwindle.export.carried_adapters import CarriedAdapter
from dwindle.export.parity import Comparison, ParityLimits
from dwindle.low_rank import changed
from dwindle.measure import logit_slices
from dwindle.report import Parity

__all__ = ["ADAPTER_LIMITS", "adapters_parity", "visits"]

ADAPTER_LIMITS = ParityLimits(logit_error_share=1e-5, logit_error_floor=1e-4)
"""For adapters of a format that computes in float32."""
_STEPS = 8
"""Last tokens of the text, fed one by one."""
_ROWS = 256


def visits(names: Sequence[str]) -> list[str | None]:
    """Return the order in which adapters are swapped in; None is the base.

    >>> visits(["a", "b"])
    ['a', 'b', None, 'b', 'a', None]
    """
    return [*names, None, *reversed(names), None]


def adapters_parity(
    bundle: ModelBundle, runner: ExecutedRunner, adapters: Sequence[CarriedAdapter], text: Tensor, limits: ParityLimits
) -> dict[str | None, Parity]:
    """Return how closely `runner` follows each adapter by its name, and the base (None) between them.

    `text` [1, T]; the adapters are loaded. A miss is told by `passed`, never raised.
    """
    wanted: dict[str | None, Tensor] = {}
    for adapter in adapters:
        with changed(bundle, adapter.changes):
            wanted[adapter.name] = _reference(bundle, text)
    wanted[None] = _reference(bundle, text)
    compared = {name: Comparison() for name in wanted}
    for name in visits([adapter.name for adapter in adapters]):
        runner.activate(name)
        cut = max(1, text.shape[1] - _STEPS)
        pieces = [text[:, :cut], *torch.split(text[:, cut:], 1, dim=1)] if cut < text.shape[1] else [text]
        compared[name].add(iter([wanted[name]]), [runner.step(piece) for piece in pieces])
    return {name: one.verdict(limits, runner.executed_by, text.shape[1]) for name, one in compared.items()}


@torch.no_grad()
def _reference(bundle: ModelBundle, text: Tensor) -> Tensor:
    return torch.cat([rows.cpu() for rows in logit_slices(bundle)(text, _ROWS)])
