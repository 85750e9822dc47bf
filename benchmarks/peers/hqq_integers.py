"""The hqq package: half-quadratic search of the zero point, 64 inputs per block, float scales and zero points."""

from __future__ import annotations

import job
import torch
from hqq.core.quantize import Quantizer

BLOCK = 64
"""Its own default; at 32 its float zero points would cost a whole bit a weight."""


def hqq(work: job.Job) -> dict[str, job.Coded]:
    """Return the weights; blocks run along the flattened rows, so one may span two rows."""
    coded = {}
    for name, linear in work.linears.items():
        codes, meta = Quantizer.quantize(
            linear.weight.data, nbits=work.bits, channel_wise=True, group_size=BLOCK, optimize=True, axis=1,
            compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip
        weight = Quantizer.dequantize(codes, meta)
        count = linear.weight.numel()
        stored = count * work.bits + -(-count // BLOCK) * 2 * job.FLOAT_BITS
        coded[name] = job.Coded(weight, stored)
    return coded


if __name__ == "__main__":
    job.run("hqq", ("hqq",), {"hqq": hqq})
