"""A bundle whose weights stay in their files: what deciding and cutting need of a model larger than memory.

`model` is a skeleton on the meta device, with names and shapes and no storage; weights are read from `source` by name
(see `parameters`), and the calibration text goes through `blocks`, one layer's weights at a time (see `text_pass`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dwindle.bundle import ModelBundle, lineage_of
from dwindle.errors import UnsupportedModel, offenders
from dwindle.model_source import find_folder, skeleton_of
from dwindle.streamed_blocks import StreamedBlocks
from dwindle.torch_device import usable_device
from dwindle.vocabulary_map import VocabularyMap
from dwindle.weight_source import WeightSource

__all__ = ["FolderBundle"]


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderBundle(ModelBundle):
    """A checkpoint folder to plan for and to cut; it is no model to run or to save."""

    source: WeightSource
    blocks: StreamedBlocks

    @classmethod
    def open(cls, path_or_id: str | Path, torch_device: str | torch.device = "cpu") -> FolderBundle:
        """Return the bundle of a local folder or Hugging Face id, after one pass over its weights.

        Raises UnsupportedModel or RecipeError for what cannot be cut (quantized checkpoints, other families, NaN), and
        RecipeError for a device that is not there.
        """
        usable_device(torch_device)
        folder, revision = find_folder(path_or_id)
        source = WeightSource(folder)
        broken = [name for name, largest in source.extremes() if not torch.isfinite(largest)]
        if broken:
            raise UnsupportedModel(
                f"{folder}: {len(broken)} tensors hold NaN or infinity: {offenders(broken)}. Use an earlier checkpoint."
            )
        skeleton: Any = skeleton_of(source.config)
        if (folder / "generation_config.json").is_file():
            skeleton.generation_config = type(skeleton.generation_config).from_pretrained(folder)
        named = folder.resolve().name if revision is None else str(path_or_id)
        lineage = lineage_of(folder, source.files.files, named, revision)
        return cls(skeleton, source.tokenizer(), source.anatomy, lineage, source.storage_dtype, source=source,
                   vocabulary_map=VocabularyMap.read(folder), blocks=StreamedBlocks(source, torch_device))  # fmt: skip
