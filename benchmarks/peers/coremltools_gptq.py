"""coremltools' layer-wise GPTQ: asymmetric integers, one scale and zero point per 32 inputs.

A block that does not divide a layer's inputs would leave it float; it gets the nearest size that divides.
"""

from __future__ import annotations

import job
from coremltools.optimize.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig


def gptq(work: job.Job) -> dict[str, job.Coded]:
    """Return GPTQ's weights."""
    blocks = {n: job.nearest_divisor(linear.weight.shape[1], job.BLOCK) for n, linear in work.linears.items()}
    chosen = {
        name: {
            "algorithm": "gptq",
            "weight_dtype": f"uint{work.bits}",
            "granularity": "per_block",
            "block_size": block,
            "quantization_scheme": "affine",
        }
        for name, block in blocks.items()
    }
    config = LayerwiseCompressorConfig.from_dict(
        {
            "layers": [r"model\.layers\.\d+"],
            "module_name_configs": chosen,
            "input_cacher": "gpt",
            "calibration_nsamples": len(work.windows),
        }
    )
    compressed = LayerwiseCompressor(work.model, config).compress(work.windows.split(1), device="cpu")
    coded = {}
    for name, linear in work.linears.items():
        weight = compressed.get_submodule(name).weight.detach()
        if not weight.equal(linear.weight):
            coded[name] = job.Coded(weight, job.integer_bits(weight, work.bits, blocks[name], work.bits))
    return coded


if __name__ == "__main__":
    job.run("coremltools", ("coremltools",), {"gptq-asym": gptq})
