"""llm-compressor's GPTQ and AWQ, one scale per 32 inputs; an environment of its own (it pins transformers).

A block that does not divide a layer's inputs is refused; such a layer gets the nearest size that divides.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import job
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier


def gptq(work: job.Job, *, symmetric: bool) -> dict[str, job.Coded]:
    """Return GPTQ's weights."""
    blocks = {n: job.nearest_divisor(linear.weight.shape[1], job.BLOCK) for n, linear in work.linears.items()}
    shapes = {n: linear.weight.shape for n, linear in work.linears.items()}
    targets = defaultdict(list)
    for name, block in blocks.items():
        targets[block].append(name)
    groups = {
        f"group_{block}": QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(
                num_bits=work.bits, type="int", symmetric=symmetric, strategy="group", group_size=block
            ),
        )
        for block, names in targets.items()
    }
    windows = work.windows
    dataset = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": [[1] * windows.shape[1]] * len(windows)}
    )
    oneshot(
        model=work.model,
        tokenizer=work.tokenizer,
        dataset=dataset,
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
    )
    coded = {}
    for name in shapes:
        weight = work.model.get_submodule(name).weight
        stored = job.integer_bits(weight, work.bits, blocks[name], 0 if symmetric else work.bits)
        coded[name] = job.Coded(weight, stored)
    return coded


METHODS = {"gptq-sym": partial(gptq, symmetric=True), "gptq-asym": partial(gptq, symmetric=False)}

if __name__ == "__main__":
    job.run("llm-compressor", ("llmcompressor", "compressed-tensors"), METHODS)
