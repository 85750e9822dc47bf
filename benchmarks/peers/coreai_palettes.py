"""coreai-opt's k-means palettes, one per 16 rows: its default (fast mode), and weighted by its calibration mode.

A layer whose rows 16 does not divide would be left float; it gets the nearest size that divides.
"""

from __future__ import annotations

import job
import torch.nn.functional as F
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.spec import PalettizationSpec, PerGroupedChannelGranularity


def _rows(linear) -> int:
    return job.nearest_divisor(linear.weight.shape[0], job.PALETTE_ROWS)


def _config(work: job.Job) -> KMeansPalettizerConfig:
    chosen = {}
    for name, linear in work.linears.items():
        granularity = PerGroupedChannelGranularity(axis=0, group_size=_rows(linear))
        spec = PalettizationSpec(n_bits=work.bits, granularity=granularity)
        chosen[name] = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    return KMeansPalettizerConfig(global_config=None, module_name_configs=chosen)


def _coded(work: job.Job, palettized) -> dict[str, job.Coded]:
    coded = {}
    for name, linear in work.linears.items():
        module = palettized.get_submodule(name)
        if hasattr(module, "parametrizations"):
            coded[name] = job.Coded(module.weight, job.palette_bits(module.weight, work.bits, _rows(linear)))
    return coded


def default(work: job.Job) -> dict[str, job.Coded]:
    """Return plain k-means palettes."""
    palettizer = KMeansPalettizer(work.model, _config(work))
    return _coded(work, palettizer.prepare((work.windows[:1],)))


def sensitive(work: job.Job) -> dict[str, job.Coded]:
    """Return k-means palettes weighted by squared gradients of the cross-entropy, summed window by window."""

    def loss(output, targets):
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets.flatten())

    palettizer = KMeansPalettizer(work.model, _config(work))
    prepared = palettizer.prepare((work.windows[:1],))
    with palettizer.calibration_mode(loss_fn=loss) as calibration:
        for window in work.windows.split(1):
            calibration.step(prepared(window), window[:, 1:])
    return _coded(work, prepared)


if __name__ == "__main__":
    job.run("coreai-opt", ("coreai-opt",), {"kmeans": default, "kmeans-sensitive": sensitive})
