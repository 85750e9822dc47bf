r"""The hidden width along its principal axes, so that what is cut is what the model uses least.

Ashkboos et al. 2024 (SliceGPT, arXiv 2401.15024, sections 3.1 to 3.3): an RMSNorm without weights commutes with a
rotation Q of the residual stream, |x Q| = |x|. So with the norms' weights w folded into what reads them,

    E' = E Q,   W'_read = W diag(w) Q,   W'_write = Q^T W,   w' = 1

is the same function, and cutting the last columns of Q removes the directions of least variance. SliceGPT takes
another Q per block and pays with extra matrices in the residual connections, which no stock model has; here one Q
serves all layers: the eigenvectors of the second moments of what all norms give before their weights, each token
thus of unit mean square, summed over all places where the width is read.

On the embedded teacher, width 192 to 128 without training, this ends at 0.774 nats/token (full 0.714), the channels of
highest activation score at 2.555; its head unties, so it has 2.74 instead of 2.48 million parameters.

Limits: norms must stand before what they feed and nowhere else, with no offset on their weights (Llama, Mistral,
Qwen 2 and 3, Phi-3, SmolLM3); a tied head unties, because its norm's weight goes into it and not into the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.families import FAMILIES, MIXTURES
from dwindle.prune.calibration_pass import check_calibration
from dwindle.prune.shape import Shape
from dwindle.prune.text_pass import run_pass
from dwindle.token_set import TokenSet

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.bundle import ModelBundle

__all__ = ["principal_axes", "turning_refusal"]


def turning_refusal(anatomy: Anatomy, after: Shape) -> str | None:
    """Return why a model cannot be turned into one of the shape `after` (its head untied), or None if it can."""
    if anatomy.traits.norm_layout != "pre" or anatomy.traits.norm_offset:
        able = sorted(
            name for name, row in {**FAMILIES, **MIXTURES}.items() if row.norm_layout == "pre" and not row.norm_offset
        )
        return (
            f"rotate cannot turn the width of {anatomy.model_type}: its norms stand behind what writes to the "
            "residual stream, so their weights cannot be folded into what reads it; families that can be turned: "
            f"{', '.join(able)}"
        )
    before = Shape.of(anatomy).parameters
    if after.parameters > before:
        return (
            f"rotate would untie the head, and the result have {after.parameters:,} parameters where the full model "
            f"has {before:,}"
        )
    return None


@torch.inference_mode()
def principal_axes(bundle: ModelBundle, calibration: TokenSet, layers: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Return (Q [D, D], variances [D]), float64, the axis of most variance first; only `layers` count.

    Signs are fixed (the largest entry of an axis is positive), so that equal moments give equal axes. Raises DataError
    for a set of another role or tokenizer, or windows longer than the model's context.
    """
    check_calibration(bundle, calibration)
    anatomy = bundle.anatomy
    total = torch.zeros(anatomy.width, anatomy.width, dtype=torch.float64)

    def add(given: Tensor) -> None:
        rows = given.flatten(0, 1).float()
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + anatomy.traits.norm_eps)
        total.add_((rows.T @ rows).cpu())

    stay = sorted(set(layers))
    watchers: dict[str, Callable[[Tensor], None]] = {
        name: add for layer in stay for name in [*anatomy.layer_norms(layer)[:2]]
    }
    dropped = [layer for layer in range(anatomy.layers) if layer not in stay]
    run_pass(bundle, calibration, {**watchers, anatomy.final_norm: add}, skipped=dropped, purpose="principal axes")
    variances, axes = torch.linalg.eigh(total)
    axes, variances = axes.flip(1), variances.flip(0).clamp(min=0)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return axes * signs, variances
