"""auto-round's learned rounding, one scale per 32 inputs: 200 iterations, its longest recipe, and mixed bits.

It tunes in float32 here (`amp=False`): its default, bfloat16, is for speed. A last block of fewer than 32 inputs is
padded, and its scale counts whole. Linears that 32 does not divide either way it leaves float, because the kernels it
exports to do (all FFNs of stories260K, 12 bits a weight); naming the same rounding function in full gets around that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import job
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme

MIXED_BITS = (2, 3, 4, 8)


def _scheme(work: job.Job, bits: int, symmetric: bool) -> QuantizationScheme:
    divides = all(extent % 32 == 0 for linear in work.linears.values() for extent in linear.weight.shape)
    data_type = "int" if divides else "int_sym" if symmetric else "int_asym"
    return QuantizationScheme(bits=bits, group_size=job.BLOCK, sym=symmetric, data_type=data_type, act_bits=16)


def _tuned(work: job.Job, scheme, extra: dict) -> dict[str, job.Coded]:
    windows = work.windows
    tuner = AutoRound(
        work.model,
        work.tokenizer,
        scheme=scheme,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        **extra,
    )
    shapes = {name: linear.weight.shape for name, linear in work.linears.items()}
    model, layers = tuner.quantize()
    coded = {}
    for name in shapes:
        weight, layer = model.get_submodule(name).weight.detach(), layers[name]
        if layer["bits"] < 16:
            zero_point_bits = 0 if layer["sym"] else layer["bits"]
            coded[name] = job.Coded(
                weight, job.integer_bits(weight, layer["bits"], layer["group_size"], zero_point_bits)
            )
    return coded


def tuned(work: job.Job, *, symmetric: bool, **extra) -> dict[str, job.Coded]:
    """Return weights of one width."""
    return _tuned(work, _scheme(work, work.bits, symmetric), extra)


def mixed(work: job.Job, *, symmetric: bool) -> dict[str, job.Coded]:
    """Return weights of several widths, `work.bits` on average with scales, as AutoScheme chooses them."""
    options = [_scheme(work, bits, symmetric) for bits in MIXED_BITS]
    return _tuned(work, AutoScheme(avg_bits=work.bits, options=options), {"iters": 200})


METHODS: dict[str, Callable[[job.Job], dict[str, job.Coded]]] = {
    "sym": partial(tuned, symmetric=True, iters=1),
    "asym": partial(tuned, symmetric=False, iters=1),
    "sym-best": partial(tuned, symmetric=True, iters=1000, enable_alg_ext=True),
    "asym-best": partial(tuned, symmetric=False, iters=1000, enable_alg_ext=True),
    "sym-mixed": partial(mixed, symmetric=True),
}

if __name__ == "__main__":
    job.run("auto-round", ("auto-round",), METHODS)
