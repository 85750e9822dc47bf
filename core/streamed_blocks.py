"""The blocks of a checkpoint folder of which only the one at work is in memory, in float32.

The model is built on the meta device, where tensors have shapes and no storage, so transformers' own code runs each
family. Three kinds of tensors become real: a block's weights while it is entered, final norm and head inside `head()`,
and what no checkpoint stores (rotary frequencies), by building those few modules anew. Rows of the embedding are read
as windows ask for them.

Memory: 4 bytes per weight of one block (176 MB at width 2,048, FFN 5,632), and 4 V D bytes inside `head()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.model_source import skeleton_of
from dwindle.weight_source import WeightSource

__all__ = ["StreamedBlocks"]


class StreamedBlocks(InMemoryBlocks):
    """See `DecoderBlocks`; of a folder, or of a `WeightSource` that is open already."""

    def __init__(self, folder: Path | WeightSource, device: torch.device | str = "cpu") -> None:
        self.source = folder if isinstance(folder, WeightSource) else WeightSource(folder)
        model: Any = skeleton_of(self.source.config).requires_grad_(False)
        decoder, anatomy = model.get_decoder(), self.source.anatomy
        decoder.set_input_embeddings(_StoredEmbedding(self.source, decoder.get_input_embeddings()))
        for name, child in decoder.named_children():
            if any(buffer.is_meta for buffer in child.buffers()):
                setattr(decoder, name, type(child)(config=child.config).to(device))
        self._set_up(model, anatomy, torch.device(device))
        self._entered = [0] * anatomy.layers
        self._head_entered = 0

    @contextlib.contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """Yield the block with its weights read; they are given up when the outermost `with` of it ends."""
        self._entered[layer] += 1
        try:
            if self._entered[layer] == 1:
                self._fill(self._blocks[layer], self.anatomy.layer_path(layer))
            yield self._blocks[layer]
        finally:
            self._entered[layer] -= 1
            if not self._entered[layer]:
                self._blocks[layer].to("meta")

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Hold final norm and head within a `with`."""
        norm, head = self._model.get_submodule(self.anatomy.final_norm), self._model.get_output_embeddings()
        self._head_entered += 1
        try:
            if self._head_entered == 1:
                self._fill(norm, self.anatomy.final_norm)
                self._fill(head, self.anatomy.embedding if self.anatomy.tied else self.anatomy.head)
            yield
        finally:
            self._head_entered -= 1
            if not self._head_entered:
                norm.to("meta")
                head.to("meta")

    @contextlib.contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """Yield the final norm with its weights read."""
        norm = self._model.get_submodule(self.anatomy.final_norm)
        self._fill(norm, self.anatomy.final_norm)
        try:
            yield norm
        finally:
            norm.to("meta")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [B, T, V]; outside of `head()` this reads the head for one call."""
        with self.head():
            return super().logits(hidden)

    def _fill(self, module: nn.Module, path: str) -> None:
        """Give a module of the skeleton the stored weights under `path`."""
        names = {name: f"{path}.{name}" for name in module.state_dict()}
        tensors = {name: self.source.read(stored).float().to(self.device) for name, stored in names.items()}
        module.load_state_dict(tensors, assign=True)


class _StoredEmbedding(nn.Module):
    """Rows of the stored table, scaled where the module it stands for scales them."""

    def __init__(self, source: WeightSource, replaced: nn.Module) -> None:
        super().__init__()
        self._source = source
        scales = hasattr(replaced, "embed_scale") or hasattr(replaced, "scalar_embed_scale")
        self._scale = source.anatomy.traits.embedding_scale if scales else 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 [B, T, D] for ids [B, T]; each row is read once per call."""
        unique, places = torch.unique(ids, return_inverse=True)
        rows = self._source.gather(f"{self._source.anatomy.embedding}.weight", unique)
        return rows.to(ids.device)[places] * self._scale
