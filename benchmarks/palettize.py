"""One palettization: by dwindle (exact k-means on a histogram), coremltools or coreai-opt; prints one JSON line."""

from __future__ import annotations

import argparse
import json
import resource
import time


def weight(rows: int, columns: int):
    """Return a Gaussian matrix with a few large entries per row, as trained linears have: fp32 [rows, columns]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator) * 0.02
    values[torch.rand(rows, columns, generator=generator) < 0.001] *= 8
    return values


def dwindle_error(values, bits: int) -> tuple[float, float]:
    """Return (seconds, relative MSE) of dwindle's palettes, one per 16 rows."""
    from dwindle.quantize.palettize import palettize

    start = time.perf_counter()
    packed = palettize(values, bits=bits, group_size=16)
    seconds = time.perf_counter() - start
    return seconds, float((packed.dequantize() - values).square().sum() / values.square().sum())


def coremltools_error(values, bits: int) -> tuple[float, float]:
    """Return (seconds, relative MSE) of coremltools' post-training palettization with grouped channels."""
    import torch
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    model = torch.nn.Sequential(torch.nn.Linear(values.shape[1], values.shape[0], bias=False))
    model[0].weight.data = values.clone()
    config = PostTrainingPalettizerConfig.from_dict(
        {"global_config": {"n_bits": bits, "granularity": "per_grouped_channel", "group_size": 16}}
    )
    palettizer = PostTrainingPalettizer(model, config)
    start = time.perf_counter()
    palettized = palettizer.compress(num_kmeans_workers=1)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        dense = palettized[0].weight.detach()
    return seconds, float((dense - values).square().sum() / values.square().sum())


def coreai_error(values, bits: int) -> tuple[float, float]:
    """Return (seconds, relative MSE) of coreai-opt's k-means as it comes (fast mode) with grouped channels."""
    import torch
    from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
    from coreai_opt.palettization.spec import PalettizationSpec, PerGroupedChannelGranularity

    model = torch.nn.Sequential(torch.nn.Linear(values.shape[1], values.shape[0], bias=False))
    model[0].weight.data = values.clone()
    spec = PalettizationSpec(n_bits=bits, granularity=PerGroupedChannelGranularity(axis=0, group_size=16))
    config = KMeansPalettizerConfig(global_config=ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec}))
    palettizer = KMeansPalettizer(model, config)
    start = time.perf_counter()
    palettized = palettizer.prepare((torch.zeros(1, values.shape[1]),))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        dense = palettized[0].weight.detach()
    return seconds, float((dense - values).square().sum() / values.square().sum())


SIDES = {"dwindle": dwindle_error, "coremltools": coremltools_error, "coreai-opt": coreai_error}


def main() -> None:
    """Do one side's job once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--who", choices=list(SIDES), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--columns", type=int, required=True)
    parser.add_argument("--bits", type=int, required=True)
    options = parser.parse_args()
    values = weight(options.rows, options.columns)
    seconds, error = SIDES[options.who](values, options.bits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "relative_mse": error, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
