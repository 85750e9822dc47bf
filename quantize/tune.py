"""End-to-end tuning of tables: codes stay, palettes and scales follow the unquantized model.

A quantizer that works layer by layer minimises each layer's own error; the errors then add up in a way no layer
sees. EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.3) therefore ends with a phase of its own: freeze the
integers, train the scales end to end. Here the same is done for every kind of table, against the model's own
predictions instead of labels:

    minimise over tables       KL(unquantized || quantized)          on the calibration windows
    d loss / d palette[k]    = sum of d loss / d W over the weights whose index is k
    d loss / d scale[g]      = sum of (code - zero) * d loss / d W over the group's weights

so one backward pass through dense weights yields the gradient of all tables. They are few (16 numbers for 16 rows):
little can be overfitted, and the optimizer's moments cost nothing. Norms and biases stay float in every runtime and
cost no bits of the budget; they may be trained as well and give the layers' means and scales back.

Some windows are held back. The KL on them, taken before the first step, at intervals and at the end, chooses the
tables that are returned, so the result is never worse there than what was given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.quantize.fake_quantize import fake_quantized
from dwindle.quantize.matching import Matching, training_of, training_windows
from dwindle.quantize.options import QuantizeOptions
from dwindle.quantize.stand_in import StandIn
from dwindle.token_set import TokenSet
from dwindle.train import TrainLine, train
from dwindle.weights import QuantizedWeight

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["TunedTables", "trainable_floats", "tune_tables"]

RATE = 1e-2
"""AdamW's peak rate: a share of a table's typical entry per step."""
HELD_BACK = 8
"""Every so many windows one is held back."""
LOOKS = 10
"""Times the held-back windows are looked at."""

_log = logging.getLogger("dwindle")


@dataclass(frozen=True)
class TunedTables:
    """What tuning returns."""

    weights: dict[str, QuantizedWeight]
    """The same codes with other tables, by module name."""
    norms: dict[str, Tensor]
    """float32 norm weights and biases by parameter name; empty if they were not trained."""
    first_kl: float
    """Mean KL on the held-back windows before the first step."""
    last_kl: float
    """... and of what is returned: at most `first_kl`."""
    steps: int
    """Steps after which the returned tables stood so; 0 if nothing was better than the start."""


def trainable_floats(bundle: ModelBundle) -> dict[str, Tensor]:
    """Return the parameters that stay float in every format: norms and biases, those with one axis."""
    return {name: value.detach() for name, value in bundle.model.named_parameters() if value.dim() == 1}


def tune_tables(
    bundle: ModelBundle,
    weights: Mapping[str, QuantizedWeight],
    tokens: TokenSet,
    options: QuantizeOptions,
    *,
    norms: bool = True,
) -> TunedTables:
    """Return `weights` with tables tuned in `options.tune_steps` steps against the unquantized `bundle`."""
    windows = training_windows(tokens, "quantize.tune_steps")
    device = bundle.model.device
    frozen = {name: fake_quantized(None, weight, device) for name, weight in weights.items()}
    student = StandIn(bundle.model, frozen, trainable_floats(bundle) if norms else {})
    bundle.model.eval()
    matching = Matching(bundle)
    held = windows.ids[HELD_BACK - 1 :: HELD_BACK] if len(windows.ids) >= HELD_BACK else windows.ids
    kept = torch.ones(len(windows.ids), dtype=torch.bool)
    if len(windows.ids) >= HELD_BACK:
        kept[HELD_BACK - 1 :: HELD_BACK] = False
    training = replace(windows, ids=windows.ids[kept])
    best = _Best(student, matching, held.to(device), options)
    best.look(0)
    every = max(1, options.tune_steps // LOOKS)

    def look(line: TrainLine) -> None:
        if line.step % every == 0 or line.step == options.tune_steps:
            best.look(line.step)

    how = training_of(options, training, bundle.anatomy.vocab, RATE, steps=options.tune_steps)
    train(student, matching, training, how, on_step=look)
    return best.result(norms)


class _Best:
    """The tables with the smallest KL on the held-back windows so far."""

    def __init__(self, student: StandIn, matching: Matching, held: Tensor, options: QuantizeOptions) -> None:
        self._student, self._matching, self._held = student, matching, held
        self._batch = options.batch_size
        self.first = self.kl = float("inf")
        self.step = 0

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Measure, and keep a copy if it is the best."""
        parts = torch.split(self._held, self._batch)
        kl = sum(float(self._matching.divergence(self._student, ids)) * len(ids) for ids in parts) / len(self._held)
        _log.info("tune step %d: KL %.5f on %d held-back windows", step, kl, len(self._held))
        if step == 0:
            self.first = kl
        if kl < self.kl:
            self.kl, self.step = kl, step
            self._weights = self._student.finish()
            self._norms = {name: value.clone() for name, value in self._student.float_weights().items()}

    def result(self, norms: bool) -> TunedTables:
        return TunedTables(self._weights, self._norms if norms else {}, self.first, self.kl, self.step)
