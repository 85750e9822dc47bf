"""Many pipelines with random options on random tiny models, in one process: `soak.py --runs 200`.

Each run draws a family, a shape, what to prune and to keep, how to quantize, what to export; and holds the result to:

    sizes as predicted    parameters of the plan = those of the model; bytes of the stored tensors = `size()`
    reload equality       the content hash and the logits of the saved and loaded model are those of the one in memory
    parity                the exported artifact passes its own gate, and says the size of the bundle
    bounded memory        the resident set of the last third of the runs is that of the second third, up to 64 MB

Refusals (`DwindleError` for options that do not go together) count as answers, not as runs. A run is found again by its
number. Prints a line per run; exit code 1 and what was wrong if an invariant broke.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import valid_files

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2")
_GROWTH_BYTES = 64e6


def _sets(bundle: Any, folder: Path) -> Any:
    from dwindle.data import DataOptions, build_token_sets

    if not (folder / "train.txt").exists():
        (folder / "train.txt").write_text(valid_files.text(120, 1))
        (folder / "valid.txt").write_text(valid_files.text(3, 2))
    data = DataOptions(train=(str(folder / "train.txt"),), evaluation=str(folder / "valid.txt"), calibration_windows=4)
    return build_token_sets(data, bundle.tokenizer, 64)


def _pruned(bundle: Any, sets: Any, rng: random.Random) -> Any:
    from dwindle import prune
    from dwindle.prune.keep_plan import KeepPlan

    options = prune.PruneOptions(
        ffn_keep=rng.choice((1, 0.75, 0.5, 0.25)), heads_keep=rng.choice((1, 1, 0.5)), layers_keep=rng.choice((1, 1, 0.5)),
        width_keep=rng.choice((1, 1, 0.5)), method=rng.choice((None, "magnitude", "activation")), multiple=8,
    )  # fmt: skip
    made, record = prune.run(bundle, options, sets.calibration)
    planned = KeepPlan.from_json(record.details["plan"]).parameters_after
    found = made.size().parameters
    assert planned == found, f"{options}: {planned:,} parameters planned, {found:,} made"
    return made


def _trained(bundle: Any, teacher: Any, sets: Any, rng: random.Random, folder: Path) -> Any:
    from dwindle import distill
    from dwindle.distill import LossSpec

    loss = rng.choice(("forward_kl", "reverse_kl", "label_cross_entropy", "top1_blend=0.9"))
    options = distill.DistillOptions(losses=(LossSpec.of(loss),), tokens=1024, batch_size=4,
                                     gradient_accumulation=rng.choice((1, 2)), seed=rng.randrange(9))  # fmt: skip
    return distill.run(bundle, options, teacher=teacher, train=sets.train, folder=folder / "work")[0]


def _quantized(bundle: Any, sets: Any, rng: random.Random) -> Any:
    from dwindle import quantize

    scheme = rng.choice(("palettize", "integer"))
    bits = rng.choice((2, 3, 4, 6, 8) if scheme == "palettize" else (2, 4, 8))
    options = quantize.QuantizeOptions(scheme=scheme, bits=bits, group_size=rng.choice((8, 16, 32)))
    made, record = quantize.run(bundle, options, sets.calibration)
    stored = sum(t.nbytes for t in made.stored_tensors().values())
    assert record.after.bytes == made.size().bytes <= stored, (
        f"{options}: {made.size().bytes:,} said, {stored:,} stored"
    )
    return made


def _reloaded(bundle: Any, place: Path) -> Any:
    import torch

    from dwindle.bundle import ModelBundle

    bundle.save(place)
    again = ModelBundle.load(place)
    assert again.content_sha256 == bundle.content_sha256, "another content after reloading"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b = bundle.model(ids).logits, again.model(ids).logits
    assert torch.equal(a, b), f"logits differ by {(a - b).abs().max():.3g} after reloading"
    return again


def _exported(bundle: Any, folder: Path) -> None:
    from dwindle import export

    (artifact,) = export.run(bundle, export.ExportOptions(formats=("onnx",), prompts=1), folder / "export")
    assert artifact.parity is not None
    assert artifact.parity.passed, f"parity: {artifact.parity}"
    assert artifact.details["parameters"] == bundle.size().parameters


def one_run(number: int, texts: Path) -> tuple[str, list[str]]:
    """Do run `number`; return its family and the steps that were taken or refused."""
    from dwindle.errors import DwindleError

    rng, steps = random.Random(f"soak:{number}"), list[str]()
    family = rng.choice(FAMILIES)
    teacher = valid_files.tiny_bundle(family, seed=number, intermediate_size=rng.choice((64, 96, 128)))
    sets, bundle = _sets(teacher, texts), teacher
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        acts: list[tuple[str, float, Any]] = [
            ("prune", 0.7, lambda b: _pruned(b, sets, rng)),
            ("distill", 0.4, lambda b: _trained(b, teacher, sets, rng, folder)),
            ("quantize", 0.8, lambda b: _quantized(b, sets, rng)),
        ]
        for name, chance, act in acts:
            if rng.random() > chance:
                continue
            try:
                bundle = _reloaded(act(bundle), folder / name)
                steps.append(name)
            except DwindleError as error:
                steps.append(f"{name} refused ({type(error).__name__})")
        try:
            _exported(bundle, folder)
            steps.append("export")
        except DwindleError as error:
            steps.append(f"export refused ({type(error).__name__})")
    return family, steps


def main() -> int:
    """Soak as the command line asks."""
    import psutil
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    faults, resident, process = list[str](), list[int](), psutil.Process()
    with tempfile.TemporaryDirectory() as texts:
        for number in range(given.first, given.first + given.runs):
            began = time.perf_counter()
            try:
                family, steps = one_run(number, Path(texts))
                counts.update(steps)
            except Exception as error:  # noqa: BLE001  (an invariant that broke, or what nobody foresaw: both are faults)
                family, steps = "?", [f"FAULT {type(error).__name__}: {error}"]
                faults.append(f"run {number}: {type(error).__name__}: {error}")
            resident.append(process.memory_info().rss)
            print(f"{number:4} {family:12} {time.perf_counter() - began:5.1f} s {resident[-1] / 1e6:6.0f} MB  "
                  f"{', '.join(steps)}", flush=True)  # fmt: skip
    third = len(resident) // 3
    if third >= 5:
        growth = statistics.median(resident[-third:]) - statistics.median(resident[third : 2 * third])
        print(f"memory: the last third holds {growth / 1e6:+.0f} MB against the second")
        if growth > _GROWTH_BYTES:
            faults.append(f"memory grows: {growth / 1e6:.0f} MB from the second third of the runs to the last")
    print(f"{given.runs} runs, {dict(counts)}, {len(faults)} faults")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
