"""A checkpoint folder to a quantized one, layer by layer: the model is never in memory as a whole.

    read one linear (or one block) -> calibrate -> code -> append the packed bytes to the output -> forget

The codes are those of the in-memory step for the same plan and coder, and the folder is the one that
`ModelBundle.save` would have written, but for the order of tensors in the file; `ModelBundle.load` and stock
`from_pretrained` cannot tell the two apart. All refusals (names, shapes, NaN, disk space, too short a text) come before
the first byte of output.

Peak memory without calibration is one linear in float32 and what its coder needs; large tables (embedding, head) are
coded some rows at a time where rows are independent. With calibration it is one block, its statistics, and the hidden
states of the calibration text: see `calibration`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwindle.bundle import ModelBundle, lineage_of, require_model_place
from dwindle.model_source import find_folder, skeleton_of
from dwindle.quantize.calibration import require_tokens
from dwindle.quantize.coded_walk import coded_walk
from dwindle.quantize.layer_plan import LayerFormat, LayerPlan, require_storable
from dwindle.quantize.layer_record import layer_record, squares
from dwindle.quantize.methods import Coder, Walk
from dwindle.quantized_model import quantization_config
from dwindle.shard_writer import SHARD_BYTES, ShardWriter
from dwindle.storage import atomic_folder, require_space
from dwindle.streamed_blocks import StreamedBlocks
from dwindle.time_left import TimeLeft
from dwindle.tokenizer_files import load_tokenizer
from dwindle.vocabulary_map import VocabularyMap
from dwindle.weight_source import WeightSource
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight

__all__ = ["joined_rows", "quantize_checkpoint"]

_SLICE_WEIGHTS = 1 << 24
"""An uncalibrated weight larger than this is coded by rows, if its format lets it."""
_SPARE_BYTES = 32_000_000
"""Room asked for beyond the weights: tokenizer, configs, and the file system's own."""

_log = logging.getLogger("dwindle")


def quantize_checkpoint(
    folder: str | Path, output: Path, plan: LayerPlan, coder: Coder, walk: Walk, ids: Tensor | None = None, *,
    options: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None, seed: int = 0,
    device: torch.device | str = "cpu", shard_bytes: int = SHARD_BYTES,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the quantized checkpoint and return one record per coded module, in the plan's order.

    `ids` [N, T] are the calibration windows, needed unless `walk.direction` is "none"; `options` and `inputs` go into
    the lineage. Raises UnsupportedModel, RecipeError, DataError or OutputError before anything is written.
    """
    output = Path(output)
    found, revision = find_folder(folder)
    source = WeightSource(found)
    require_model_place(output)
    if walk.direction != "none":
        assert ids is not None, "a walk needs calibration windows"
        require_tokens(ids, source.anatomy)
    require_storable(source.extremes(), plan.formats)
    require_space(output, _stored_bytes(source, plan) + _SPARE_BYTES)
    named = found.resolve().name if revision is None else str(folder)
    lineage = lineage_of(found, source.files.files, named, revision)
    tokenizer = load_tokenizer(found, trust_remote_code=False, vocab=source.anatomy.vocab)
    skeleton: Any = skeleton_of(source.config)
    if (found / "generation_config.json").is_file():
        skeleton.generation_config = type(skeleton.generation_config).from_pretrained(found)
    with atomic_folder(output) as partial:
        with ShardWriter(partial, 5 * len(source.names), shard_bytes) as writer:
            work = _Work(source, plan, coder, writer)
            if walk.direction != "none":
                assert ids is not None
                _code_blocks(work, walk, ids, seed, device)
            work.code_the_rest()
        specs = {layer.name: work.specs[layer.name] for layer in plan.layers}
        skeleton.config.quantization_config = quantization_config(skeleton, specs, plan.tied)
        history = lineage.adding("quantize", options or {}, inputs or {})
        bundle = ModelBundle(skeleton, tokenizer, source.anatomy, history, source.storage_dtype,
                             VocabularyMap.read(found))  # fmt: skip
        bundle.write_description(partial)
    _log.info("saved %s", output)
    return [work.records[layer.name] for layer in plan.layers]


@dataclass
class _Work:
    """What is coded so far."""

    source: WeightSource
    plan: LayerPlan
    coder: Coder
    writer: ShardWriter
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = {layer.name: math.prod(self.source.shape(f"{layer.name}.weight")) for layer in self.plan.layers}
        self._left, self._coded = TimeLeft(sum(self._weights.values())), 0

    def code_the_rest(self) -> None:
        """Code what no walk has coded, from the weights alone, and copy the tensors that stay float."""
        for layer in self.plan.layers:
            if layer.name not in self.records:
                self._code_stored(layer)
        coded = {f"{layer.name}.weight" for layer in self.plan.layers}
        for name in self.source.names:
            if name not in coded:
                self.writer.add(name, self.source.read(name).to(self.source.storage_dtype))

    def _code_stored(self, layer: LayerFormat) -> None:
        name = f"{layer.name}.weight"
        rows, width = self.source.shape(name)
        step = _rows_at_once(layer, rows, width)
        parts, powers, errors = [], 0.0, 0.0
        for start in range(0, rows, step):
            dense = self.source.read(name, start, min(start + step, rows)).float()
            parts.append(self.coder(layer, dense, None))
            power, error = squares(dense, parts[-1])
            powers, errors = powers + power, errors + error
        self.keep(layer, joined_rows(parts), powers, errors)

    def keep(self, layer: LayerFormat, weight: QuantizedWeight, power: float, error: float) -> None:
        """Write a module's packed tensors and note what they cost."""
        for name, tensor in weight.to_tensors(f"{layer.name}.").items():
            self.writer.add(name, tensor)
        self.specs[layer.name] = weight.spec()
        self.records[layer.name] = layer_record(layer, weight, power, error)
        self._coded += math.prod(weight.shape)
        _log.info("quantize %d/%d %s, %s", len(self.records), len(self.plan.layers), layer.name,
                  self._left.after(self._coded))  # fmt: skip


def _code_blocks(work: _Work, walk: Walk, ids: Tensor, seed: int, device: torch.device | str) -> None:
    """Code all linears as the walk comes by them."""
    blocks = StreamedBlocks(work.source, device)
    for layer, dense, weight in coded_walk(blocks, work.plan.formats, work.coder, walk, ids, seed):
        work.keep(layer, weight, *squares(dense, weight))


def _rows_at_once(layer: LayerFormat, rows: int, width: int) -> int:
    """Return how many rows to code together: all of a small weight, or of one with a palette for all."""
    multiple = layer.group_size if layer.scheme == "palettize" else 1
    if rows * width <= _SLICE_WEIGHTS or multiple == rows:
        return rows
    return max(1, _SLICE_WEIGHTS // (width * multiple)) * multiple


def joined_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Return one weight of the rows of all parts, which have one format."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, AffineWeight):
        affine = [part for part in parts if isinstance(part, AffineWeight)]
        zero_points = None if first.zero_points is None else _rows([part.zero_points for part in affine])
        return replace(first, codes=_rows([part.codes for part in affine]),
                       scales=_rows([part.scales for part in affine]), zero_points=zero_points)  # fmt: skip
    palettes = [part for part in parts if isinstance(part, PalettizedWeight)]
    row_scales = None if first.row_scales is None else _rows([part.row_scales for part in palettes])
    return replace(first, indices=_rows([part.indices for part in palettes]),
                   palettes=_rows([part.palettes for part in palettes]), row_scales=row_scales)  # fmt: skip


def _rows(tensors: list[Tensor | None] | list[Tensor]) -> Tensor:
    return torch.cat([tensor for tensor in tensors if tensor is not None])


def _stored_bytes(source: WeightSource, plan: LayerPlan) -> int:
    formats = plan.formats
    total = 0
    for name in source.names:
        shape, layer = source.shape(name), formats.get(name.removesuffix(".weight"))
        if layer is not None and len(shape) == 2:
            total += layer.stored_bits((shape[0], shape[1])) // 8
        else:
            total += math.prod(shape) * source.storage_dtype.itemsize
    return total
