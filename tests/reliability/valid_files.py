"""Small valid files of every kind that dwindle reads, made from a random model: what mutations start from.

`make(folder)` fills a folder once: teacher/ and packed/ (models), train.txt and valid.txt, keep.json, bits.json, cache/
with cache_ids.pt, onnx/, package.mlpackage, report.json and dcp.metadata (of one small run).
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__all__ = ["WORDS", "make", "text", "tiny_bundle"]

WORDS = [
    "the",
    "small",
    "red",
    "fox",
    "ran",
    "over",
    "a",
    "green",
    "hill",
    "and",
    "saw",
    "one",
    "blue",
    "bird",
    "near",
    "the",
    "old",
    "warm",
    "house",
    "today",
]


def text(paragraphs: int, seed: int) -> str:
    """Return paragraphs of forty random words."""
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=40)).capitalize() + "." for _ in range(paragraphs)) + "\n"


def tiny_bundle(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Return a random model of about 30 thousand parameters: the fixture of the same name, outside of pytest."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    from dwindle.bundle import ModelBundle

    return ModelBundle.from_model(
        made._make_model(family, seed, overrides), made._make_tokenizer(), name=f"tiny-{family}"
    )


def micro_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe over the files of `folder`, every step of it as small as can be."""
    return {
        "version": 1, "name": "micro", "seed": 1, "teacher": {"model": str(folder / "teacher")},
        "data": {"train": [str(folder / "train.txt")], "evaluation": str(folder / "valid.txt"), "calibration_windows": 4},
        "steps": [
            {"prune": {"ffn_keep": 0.5}},
            {"distill": {"losses": [{"name": "forward_kl"}], "tokens": 2048, "batch_size": 4}},
            {"quantize": {"apple": {"scheme": "palettize"}, "onnx": {"scheme": "integer"}}},
            {"export": {"formats": ["onnx"], "prompts": 1}},
            {"validate": {"targets": ["iphone-15-pro"], "repeats": 1}},
        ],
        **changes,
    }  # fmt: skip


def make(folder: Path) -> Path:
    """Fill `folder`, unless it is whole already, and return it."""
    if (folder / "whole").exists():
        return folder
    import torch

    torch.set_num_threads(1)
    from dwindle import export, quantize
    from dwindle.data import DataOptions, build_token_sets
    from dwindle.distill import CacheOptions, write_cache
    from dwindle.pipeline.recipe import Recipe
    from dwindle.pipeline.runner import run
    from dwindle.prune import PruneOptions
    from dwindle.prune import run as prune

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text(text(120, 1))
    (folder / "valid.txt").write_text(text(3, 2))
    teacher = tiny_bundle(intermediate_size=128)
    teacher.save(folder / "teacher")
    data = DataOptions(train=(str(folder / "train.txt"),), evaluation=str(folder / "valid.txt"), calibration_windows=4)
    sets = build_token_sets(data, teacher.tokenizer, 64)
    _, record = prune(teacher, PruneOptions(ffn_keep=0.5), sets.calibration)
    (folder / "keep.json").write_text(json.dumps(record.details["plan"]))
    options = quantize.QuantizeOptions(scheme="palettize", bits=4, group_size=16)
    packed, _ = quantize.run(tiny_bundle(intermediate_size=128), options, sets.calibration)
    packed.save(folder / "packed")
    quantize.plan(tiny_bundle(intermediate_size=128), options).write(folder / "bits.json")
    train = sets.train
    write_cache(teacher, train, CacheOptions(str(folder / "cache"), shard_tokens=2048))
    torch.save(train.ids[:4, :-1].clone(), folder / "cache_ids.pt")
    export.run(teacher, export.ExportOptions(formats=("onnx", "coreml"), prompts=1), folder / "exported")
    (folder / "exported" / "onnx").rename(folder / "onnx")
    shutil.copytree(next((folder / "exported" / "coreml").glob("*.mlpackage")), folder / "package.mlpackage")
    run(Recipe.parse(micro_recipe(folder)), folder / "run")
    shutil.copy(folder / "run" / "report.json", folder / "report.json")
    _training_index(folder)
    (folder / "whole").write_text("")
    return folder


def _training_index(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _save_index(folder)
    shutil.copy(folder / "dcp" / ".metadata", folder / "dcp.metadata")


def _save_index(folder: Path) -> None:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"parameter/a": torch.zeros(3, 4), "optimizer/step/a": torch.zeros(())}, no_dist=True,
         storage_writer=FileSystemWriter(folder / "dcp", single_file_per_rank=True))  # fmt: skip
