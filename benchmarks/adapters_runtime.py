"""What adapters cost in ONNX Runtime: the swap, and every decoded token.

    python benchmarks/adapters_runtime.py [--rounds 15] [--steps 24] [--threads 2] [--rank 16] [--targets q v]
                                           [--work FOLDER]

The model is that of `onnx_decode.py`: 168 million random weights, 4-bit integers, embedding and head included,
activations of the products in int8, the fused form. Three sessions in one process take short turns, so that a busy
machine slows all of them alike:

    bare      the model exported without inputs for adapters
    ready     exported with them, and none in use
    adapted   the same session with an adapter of rank 16 on all linears, or on the targets named

A round decodes some tokens in each, in an order that turns from round to round. Reported are medians of tokens/s, and
medians of the rounds' ratios to `bare`: of wall time, and of processor time, which is what a busy machine distorts
less (with one thread; two of them spin while they wait). The swap is timed as `load` (file to session memory) and
`activate` (another adapter for the next request), the first token after a swap as `first_token`, beside that of none.

--activations float32 measures the other form of the products. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from onnx_decode import random_model

ROWS = ("bare", "ready", "adapted")
PROMPT = 64


def packed_model(work: Path) -> Any:
    """Return the quantized bundle, made once."""
    from dwindle.bundle import ModelBundle
    from dwindle.quantize import QuantizeOptions
    from dwindle.quantize import run as quantized

    if not (work / "packed").exists():
        if not (work / "model").exists():
            random_model(work / "model")
        options = QuantizeOptions(scheme="integer", bits=4, embedding_bits=4)
        quantized(ModelBundle.load(work / "model"), options)[0].save(work / "packed")
    return ModelBundle.load(work / "packed")


def adapter_of(bundle: Any, folder: Path, rank: int, seed: int, targets: tuple[str, ...]) -> None:
    """Write a packaged-to-be adapter with random weights on the targets: the folder of PEFT's files and the card."""
    from dwindle.adapters import Adapter, AdapterCard, AdapterOptions
    from dwindle.adapters.attach import adapter_config, target_names

    names = target_names(bundle, targets, rank)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(bundle.anatomy.layers):
        for part, name in bundle.anatomy.parts(layer).items():
            if name not in names:
                continue
            outputs, inputs = bundle.anatomy.linear_shape(layer, part)
            for leaf, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = (
                    0.02 * torch.randn(shape, generator=generator)).half()  # fmt: skip
    config = adapter_config(bundle, AdapterOptions(rank=rank), names)
    Adapter(config, tensors, AdapterCard("random", bundle.content_sha256, "benchmark")).save(folder)


def exported(work: Path, rank: int, activations: str, targets: tuple[str, ...] = ("all",)) -> tuple[Path, Path]:
    """Write both graphs and package two adapters; return the two folders."""
    from dataclasses import replace

    from dwindle.export.adapter_package import adapter_factors, write_adapter_files
    from dwindle.export.carried_adapters import carried_adapters
    from dwindle.export.onnx_adapters import ADAPTER_FILE, packed_arrays, write_adapter_file
    from dwindle.export.onnx_graph import export_onnx
    from dwindle.export.options import ExportOptions

    bare, ready = work / f"bare-{activations}", work / f"ready-{activations}-{rank}-{'-'.join(targets)}"
    if ready.exists():
        return bare, ready
    bundle = packed_model(work)
    options = ExportOptions(formats=("onnx",), activations=activations).resolved(bundle.anatomy)  # type: ignore[arg-type]
    bare.mkdir(exist_ok=True)
    ready.mkdir()
    export_onnx(bundle, bare, options)
    products = export_onnx(bundle, ready, replace(options, adapter_inputs="lora"))
    for seed, name in enumerate(("a", "b")):
        trained = work / f"trained-{rank}-{'-'.join(targets)}" / name
        adapter_of(bundle, trained, rank, seed, targets)
        (carried,) = carried_adapters(bundle, [trained])
        write_adapter_files(carried, ready / name)
        write_adapter_file(ready / name / ADAPTER_FILE, packed_arrays(products, adapter_factors(carried, None)),
                           bundle.content_sha256)  # fmt: skip
    return bare, ready


def decoded(runner: Any, prompt: torch.Tensor, steps: int) -> tuple[float, float]:
    """Return the wall and processor seconds of so many cached one-token steps."""
    runner.reset()
    token = runner.step(prompt)[-1:].argmax(-1, keepdim=True)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        token = runner.step(token)[-1:].argmax(-1, keepdim=True)
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    """Measure and print."""
    from dwindle.export.onnx_runner import OnnxRunner

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--activations", default="int8", choices=("int8", "float32"))
    parser.add_argument("--targets", nargs="+", default=["all"], help="Parts that the adapter changes.")
    parser.add_argument("--work", type=Path, help="Folder for models and exports; kept.")
    options = parser.parse_args()
    scratch = None if options.work else tempfile.TemporaryDirectory()
    work = options.work or Path(scratch.name)  # type: ignore[union-attr]
    work.mkdir(parents=True, exist_ok=True)
    bare, ready = exported(work, options.rank, options.activations, tuple(options.targets))
    runners = {name: OnnxRunner(bare if name == "bare" else ready, threads=options.threads) for name in ROWS}
    adapted = runners["adapted"]
    loads, busy_loads = [], []
    for name in "abababab":
        start, busy = time.perf_counter(), time.process_time()
        adapted.load_adapter(ready / name)
        loads.append(1e3 * (time.perf_counter() - start))
        busy_loads.append(1e3 * (time.process_time() - busy))
    prompt = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    activates, firsts, unswapped = [], [], []
    for turn in range(2 * options.rounds):
        start = time.perf_counter()
        adapted.activate("ab"[turn % 2])
        activates.append(1e3 * (time.perf_counter() - start))
        for times in (firsts, unswapped):
            adapted.reset()
            start = time.perf_counter()
            adapted.step(prompt[:, :1])
            times.append(1e3 * (time.perf_counter() - start))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for turn in range(options.rounds + 1):
        order = [ROWS[(turn + i) % 3] for i in range(3)]
        found = {name: decoded(runners[name], prompt, options.steps) for name in order}
        if turn:
            for name, value in found.items():
                seconds[name].append(value)
    result: dict[str, Any] = {
        "rank": options.rank, "threads": options.threads, "activations": options.activations,
        "targets": options.targets, "model_bytes": sum(path.stat().st_size for path in bare.iterdir()),
        "adapter_bytes": (ready / "a" / "adapter.onnx_adapter").stat().st_size,
        "load_ms": statistics.median(loads), "load_processor_ms": statistics.median(busy_loads),
        "activate_ms": statistics.median(activates),
        "first_token_ms": statistics.median(firsts), "first_token_without_swap_ms": statistics.median(unswapped),
    }  # fmt: skip
    for name in ROWS:
        result[f"{name}_tokens_per_second"] = options.steps / statistics.median(wall for wall, _ in seconds[name])
        result[f"{name}_processor_ms_per_token"] = 1e3 / options.steps * statistics.median(b for _, b in seconds[name])
    for name in ROWS[1:]:
        for place, kind in enumerate(("slower", "more_processor_time")):
            pairs = zip(seconds[name], seconds["bare"], strict=True)
            ratios = sorted(mine[place] / bare[place] for mine, bare in pairs)
            result |= {f"{name}_{kind}": statistics.median(ratios) - 1, f"{name}_{kind}_range": [
                round(ratios[len(ratios) // 10] - 1, 3), round(ratios[-1 - len(ratios) // 10] - 1, 3)]}  # fmt: skip
    for key, value in result.items():
        print(f"  {key:30} {value if not isinstance(value, float) else format(value, '.4g')}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
