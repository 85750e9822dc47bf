"""coremltools' k-means palettes, one per 16 rows: without data (PTP), and weighted by Fisher information (SKM).

A layer whose rows 16 does not divide would be left float with a warning; it gets the nearest size that divides.
"""

from __future__ import annotations

import job
import torch.nn.functional as F
from coremltools.optimize.torch.palettization import (
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
    SKMPalettizer,
    SKMPalettizerConfig,
)


def _rows(linear) -> int:
    return job.nearest_divisor(linear.weight.shape[0], job.PALETTE_ROWS)


def _config(work: job.Job) -> dict:
    chosen = {
        name: {"n_bits": work.bits, "granularity": "per_grouped_channel", "group_size": _rows(linear)}
        for name, linear in work.linears.items()
    }
    return {"module_name_configs": chosen}


def _coded(work: job.Job, palettized) -> dict[str, job.Coded]:
    coded = {}
    for name, linear in work.linears.items():
        weight = palettized.get_submodule(name).weight.detach()
        if weight.equal(linear.weight):
            continue  # left float
        coded[name] = job.Coded(weight, job.palette_bits(weight, work.bits, _rows(linear)))
    return coded


def post_training(work: job.Job) -> dict[str, job.Coded]:
    """Return plain k-means palettes."""
    palettizer = PostTrainingPalettizer(work.model, PostTrainingPalettizerConfig.from_dict(_config(work)))
    return _coded(work, palettizer.compress(num_kmeans_workers=1))


def sensitive(work: job.Job) -> dict[str, job.Coded]:
    """Return k-means palettes weighted by squared gradients of the cross-entropy, summed window by window."""

    def loss(model, window):
        return F.cross_entropy(model(input_ids=window).logits[:, :-1].flatten(0, 1), window[:, 1:].flatten())

    config = _config(work) | {"calibration_nsamples": len(work.windows)}
    palettizer = SKMPalettizer(work.model, SKMPalettizerConfig.from_dict(config))
    return _coded(work, palettizer.compress(dataloader=work.windows.split(1), loss_fn=loss))


if __name__ == "__main__":
    job.run("coremltools", ("coremltools", "scikit-learn"), {"ptp": post_training, "skm": sensitive})
