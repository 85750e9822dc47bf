r"""How much each FFN unit matters. A unit is one row of gate and up and one column of down; a score per layer and unit.

- `activation` (Muralidharan et al. 2024, Minitron, arXiv 2407.14679, section 2.2): forward passes over a small
  calibration set. With a[b, t, j] the input of down at unit j, which is act(gate) * up,

      score_j = sqrt( sum over windows b of ( mean over tokens t of |a[b, t, j]| )^2 )

  that is mean over the sequence, L2 over the batch: the pair the paper found best. Forward only, so it costs as
  much as measuring the model on the same text. At half of the width it keeps far more than weights alone show.
- `magnitude`: the L2 norm of all weights of the unit. It needs no data.

Memory of `activation`: the activations of one batch and one float64 vector per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import module
from dwindle.errors import DataError
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["activation_scores", "magnitude_scores"]

_BATCH_TOKENS = 4096


def activation_scores(bundle: ModelBundle, calibration: TokenSet) -> list[Tensor]:
    """Return per layer the float64 scores [F] of the FFN units; windows of `calibration` are the batch.

    Raises DataError for a set of another role or tokenizer, or windows longer than the model's context.
    """
    _check(bundle, calibration)
    anatomy = bundle.anatomy
    squares = [torch.zeros(width, dtype=torch.float64) for width in anatomy.ffn_width]

    def adder(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            squares[layer] += inputs[0].abs().mean(1).double().square().sum(0).cpu()

        return add

    downs = [module(bundle.model, anatomy.parts(layer)["down"]) for layer in range(anatomy.layers)]
    hooks = [down.register_forward_pre_hook(adder(layer)) for layer, down in enumerate(downs)]
    try:
        with torch.inference_mode():
            decoder = bundle.model.get_decoder()
            windows = max(1, _BATCH_TOKENS // calibration.ids.shape[1])
            for batch in torch.split(calibration.ids, windows):
                ids = batch.to(bundle.model.device)
                decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [total.sqrt() for total in squares]


def magnitude_scores(bundle: ModelBundle) -> list[Tensor]:
    """Return per layer the L2 norm [F], in float64, of the gate, up and down weights of each unit."""
    found = []
    with torch.no_grad():
        for layer in range(bundle.anatomy.layers):
            parts = bundle.anatomy.parts(layer)
            total = _weight(bundle, parts["down"]).square().sum(0)
            for part in ("gate", "up", "gate_up"):
                if part in parts:
                    rows = _weight(bundle, parts[part]).square().sum(1)
                    total = total + rows.view(-1, total.shape[0]).sum(0)
            found.append(total.sqrt().cpu())
    return found


def _weight(bundle: ModelBundle, name: str) -> Tensor:
    weight: Tensor = module(bundle.model, name).get_parameter("weight")
    return weight.double()


def _check(bundle: ModelBundle, calibration: TokenSet) -> None:
    calibration.require("calibration")
    if calibration.tokenizer_sha256 != encoding_sha256(bundle.tokenizer):
        raise DataError(
            f"{calibration.source}: tokenised with another tokenizer than the model's. "
            "Build the calibration set again with the model's own tokenizer."
        )
    window, context = calibration.ids.shape[1], bundle.anatomy.context
    if window > context:
        raise DataError(
            f"{calibration.source}: windows of {window:,} tokens, but the model's context is {context:,}. "
            f"Build the calibration set with context={context}."
        )
