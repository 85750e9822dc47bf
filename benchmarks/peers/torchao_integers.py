"""torchao's IntxWeightOnly: integers with one scale per 32 inputs, scales from min and max or from HQQ's search.

A block that does not divide a layer's inputs is refused; such a layer gets the nearest size that divides.
"""

from __future__ import annotations

from functools import partial

import job
import torch
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_


def integers(work: job.Job, *, algorithm: str) -> dict[str, job.Coded]:
    """Return symmetric integers."""
    blocks = {n: job.nearest_divisor(linear.weight.shape[1], job.BLOCK) for n, linear in work.linears.items()}
    shapes = {n: linear.weight.shape for n, linear in work.linears.items()}
    for block in sorted(set(blocks.values())):
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{work.bits}"),
            granularity=PerGroup(block),
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(work.model, config, filter_fn=lambda _, name, block=block: blocks.get(name) == block)
    coded = {}
    for name in shapes:
        weight = work.model.get_submodule(name).weight.dequantize()
        coded[name] = job.Coded(weight, job.integer_bits(weight, work.bits, blocks[name]))
    return coded


METHODS = {"rtn": partial(integers, algorithm="affine"), "hqq": partial(integers, algorithm="hqq_scale_only")}

if __name__ == "__main__":
    job.run("torchao", ("torchao",), METHODS)
