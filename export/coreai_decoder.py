"""The decoder as the module that Core AI's functions are exported from: packed weights by name, the cache as states.

    StatefulProgram   dynamic: the past's length is read off the length of `position_ids`
    StaticProgram     static: the first position is the slot that is written; all slots of the cache are read

Both get the distance of each token from each slot as their mask: it says at once what is not yet written (negative)
and what a window leaves behind, so a static prompt may be padded at its end and no mask has to be fed. Padding takes
slots behind the text, which no token sees and the next tokens write over.

Each state is written once, at the end: slice writes layer by layer convert and then fail at run time where T is
dynamic.

Shapes: N or T new tokens, S = past + T, L layers, K KV heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dwindle.bundle import ModelBundle
from dwindle.export.coreai_adapters import AdapterInputs, take_inputs
from dwindle.export.coreai_weights import PackedEmbedding, PackedLinear
from dwindle.export.decoder import MASKED, Decoder, RMSNorm
from dwindle.quantized_model import packed_specs

__all__ = ["PlacedDecoder", "StatefulProgram", "StaticProgram"]

_check: Any = torch._check
"""Tells torch.export what holds of a length or a place that only a run knows; torch leaves it untyped."""


class PlacedDecoder(Decoder):
    """The decoder with packed weights by name, whose `attention_bias` is int32 [1, 1, T, S]: token less slot."""

    dtype: torch.dtype
    """What it computes in; norms compute in float32."""
    adapters: AdapterInputs
    """Inputs for adapters, which all linears of the layers take; none unless they were asked for."""

    @classmethod
    def from_codes(
        cls, bundle: ModelBundle, context: int, dtype: torch.dtype, adapter_inputs: str = "none",
        adapter_rank: int | None = None,
    ) -> PlacedDecoder:  # fmt: skip
        """Return the decoder, its floats in `dtype`, its packed weights by name alone; nothing is dequantized."""
        decoder, anatomy, specs = cls(bundle.anatomy, context), bundle.anatomy, packed_specs(bundle.model)
        named = {name: name for name in specs}
        if anatomy.tied and anatomy.embedding in specs:
            named[anatomy.head] = anatomy.embedding
        for module, name in named.items():
            rows, columns = specs[name]["shape"]
            bias = getattr(decoder.get_submodule(module), "bias", None) is not None
            decoder.set_submodule(module, PackedEmbedding(name, (rows, columns), dtype) if module == anatomy.embedding
                                  else PackedLinear(name, (rows, columns), bias, dtype))  # fmt: skip
        stored = bundle.model.state_dict()
        if anatomy.tied and anatomy.embedding not in specs:
            stored[f"{anatomy.head}.weight"] = stored[f"{anatomy.embedding}.weight"]
        floats = {name: stored[name].detach().cpu().to(dtype) for name in decoder.state_dict()}
        decoder.load_state_dict(floats, strict=True, assign=True)
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RMSNorm):
                    setattr(parent, name, WideNorm(child, dtype))
        decoder.dtype = dtype
        decoder.adapters = take_inputs(decoder, anatomy, adapter_inputs, adapter_rank, dtype)
        return decoder.to(dtype).eval().requires_grad_(False)

    def _narrowed(self, bias: Tensor, window: int | None) -> Tensor:
        """Return the additive bias of distances: hidden are later slots, and those `window` or more before a token."""
        hidden = bias < 0
        if window is not None:
            hidden = hidden | (bias >= window)
        shown, masked = (torch.tensor(value, dtype=self.dtype) for value in (0.0, MASKED))
        return torch.where(hidden, masked, shown)


class WideNorm(nn.Module):
    """RMSNorm computed in float32 whatever it is given: x * x leaves float16 from |x| = 256 on."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer((norm.weight + norm.offset).detach().to(dtype))
        self.eps, self.dtype = norm.eps, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x."""
        wide = x.float()
        scaled: Tensor = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return scaled.to(self.dtype) * self.weight


class _PastCache:
    """Past slots are read, new ones collected: what a function of any T does."""

    def __init__(self, keys: Tensor, values: Tensor, past: int) -> None:
        self.keys, self.values, self.past = keys, values, past
        self.new: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's past with the new behind it."""
        self.new.append((key, value))
        keys, values = self.keys[layer, :, :, : self.past], self.values[layer, :, :, : self.past]
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def store(self) -> None:
        """Write all layers' new keys and values into the states."""
        end = self.past + self.new[0][0].shape[2]
        self.keys[:, :, :, self.past : end] = torch.stack([key for key, _ in self.new])
        self.values[:, :, :, self.past : end] = torch.stack([value for _, value in self.new])


class _FullCache(_PastCache):
    """The whole cache is read, with the new put in its place: every shape is fixed, the place is a number."""

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's whole cache, slots behind the new tokens included."""
        self.new.append((key, value))
        end = self.past + key.shape[2]
        return (torch.slice_scatter(self.keys[layer], key, 2, self.past, end),
                torch.slice_scatter(self.values[layer], value, 2, self.past, end))  # fmt: skip


class StatefulProgram(nn.Module):
    """The dynamic layout."""

    def __init__(self, decoder: PlacedDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, adapters: list[Tensor], key_cache: Tensor, value_cache: Tensor
    ) -> Tensor:
        """Return logits [1, T, V]; slots S - T to S of the caches are written."""
        end = position_ids.shape[1]
        past = end - input_ids.shape[1]
        _check(past >= 0)
        _check(end <= key_cache.shape[3])
        cache = _PastCache(key_cache, value_cache, past)
        positions = position_ids.narrow(1, past, input_ids.shape[1])
        distance = (positions.unsqueeze(2) - position_ids.unsqueeze(1)).unsqueeze(1)
        with self.decoder.adapters.bound(adapters):
            logits = self.decoder.logits(input_ids, positions, distance, cache)
        cache.store()
        return logits


class StaticProgram(StatefulProgram):
    """The static layout."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, adapters: list[Tensor], key_cache: Tensor, value_cache: Tensor
    ) -> Tensor:
        """Return logits [1, N, V]; N slots from the first position on are written."""
        tokens, context = input_ids.shape[1], key_cache.shape[3]
        begin = cast(int, position_ids[0, 0].item())
        _check(begin >= 0)
        _check(begin + tokens <= context)
        cache = _FullCache(key_cache, value_cache, begin)
        slots = cast(Tensor, self.decoder.slots)[None, None, None, :context]
        distance = position_ids[:, None, :, None] - slots
        with self.decoder.adapters.bound(adapters):
            logits = self.decoder.logits(input_ids, position_ids, distance, cache)
        cache.store()
        return logits
