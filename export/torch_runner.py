"""A torch model as a DecodeRunner, beside those of exported artifacts: stock modelling code with a KV cache.

Adapters are computed by `dwindle.low_rank` on the model's own linears, so PEFT is not needed. Packed weights are
unpacked once and kept while the runner is in use (4 bytes a weight): decoding would unpack them for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwindle.adapter_card import AdapterCard
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.export.adapter_shelf import AdapterShelf
from dwindle.export.carried_adapters import CarriedAdapter, carried_adapters
from dwindle.low_rank import changed
from dwindle.quantized_model import cache_dense

__all__ = ["TorchRunner"]


class TorchRunner:
    """Runs a bundle's model token by token."""

    def __init__(self, bundle: ModelBundle) -> None:
        """Use the bundle's model as it is; `close` takes an active adapter off it again."""
        self.bundle, self.context = bundle, bundle.anatomy.context
        self.executed_by = f"torch {torch.__version__} on {bundle.model.device}"
        self._shelf: AdapterShelf[CarriedAdapter] = AdapterShelf(Path("the model"), "", "torch")
        self._active = ExitStack()
        cache_dense(bundle.model)
        bundle.model.eval()
        self.reset()

    def close(self) -> None:
        """Leave the bundle as it was."""
        self._active.close()
        cache_dense(self.bundle.model, False)

    @property
    def adapters(self) -> Sequence[str]:
        """Return the names of the adapters that were loaded."""
        return self._shelf.names

    def load_adapter(self, folder: Path) -> str:
        """Load an adapter's folder; return its name. Raises RecipeError for one that does not fit this model."""
        try:
            (found,) = carried_adapters(self.bundle, [folder])
        except RecipeError:
            AdapterCard.read(folder)  # a folder that is none is told as such
            raise
        return self._shelf.add(found.name, found)

    def activate(self, name: str | None) -> None:
        """Use an adapter that was loaded, or with None the base, from the next text on; the cache is emptied."""
        adapter = self._shelf.pick(name)
        self._active.close()
        if adapter is not None:
            self._active.enter_context(changed(self.bundle, adapter.changes))
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        from transformers import DynamicCache

        self._cache: Any = DynamicCache()
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length:
            self._cache.crop(length)
            self.length = length
        else:
            self.reset()

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T]; return logits [T, V] float32. Raises RecipeError past the context."""
        self.length += ids.shape[1]
        if self.length > self.context:
            raise RecipeError(f"the model has a context of {self.context:,} tokens; {self.length:,} were fed.")
        model: Any = self.bundle.model
        out = model(input_ids=ids.to(model.device), past_key_values=self._cache, use_cache=True)
        logits: Tensor = out.logits[0].float().cpu()
        return logits
