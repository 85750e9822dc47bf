"""The decoder as the module that Core ML's converter traces: one stretch of its layers, with the cache in two buffers.

Two forms of the same arithmetic, with the interfaces of `coreml_package.py`:

    flexible    the past's length is read off the mask's shape; slots up to it are written and read
    static      the past's length is the input `position`; all slots of the cache are read, the mask hides the rest

The second has no shape that depends on an input, which is what the Neural Engine asks for, and pays for it by attending
over the whole context at every step. Its write is a slice update at a computed place, as in the models that Anemll
runs on that engine.

Matrices stand in the traced module as zeros of stride 0: the tracer and the converter see their shape, nothing is ever
unpacked to floats, and `coreml_weights.py` puts the codes in their places.

RMS norms are written as a layer norm over [x, -x], whose mean is zero, because x * x overflows float16 from |x| = 256
on, while the runtime's layer norm accumulates in its own, wider type (the form that Apple's Neural Engine models use).

Shapes: T new tokens, S slots seen, V vocabulary, L layers of the part, K KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dwindle.bundle import ModelBundle
from dwindle.export.decoder import MASKED, Decoder, Layer, RMSNorm
from dwindle.weights import QuantizedWeight

__all__ = ["DecoderPart", "MirroredNorm", "Part", "StateCache", "hollow_decoder"]

_FLOAT16_LARGEST = 65504.0


@dataclass(frozen=True)
class Part:
    """A stretch of the decoder: layers `first` to `end`, and what stands before and after them."""

    first: int
    end: int
    embedding: bool
    head: bool

    @property
    def layers(self) -> int:
        """Return how many layers it has; a part may be the embedding or the head alone."""
        return self.end - self.first


class StateCache:
    """A cache in two buffers [L, 1, K, context, D], whose row 0 belongs to layer `first`."""

    def __init__(self, keys: Tensor, values: Tensor, first: int, begin: int | Tensor, tokens: int, seen: int) -> None:
        self.keys, self.values, self.first, self.begin, self.seen = keys, values, first, begin, seen
        self.end = begin + tokens

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write slots begin:end in place; return slots :seen as [1, K, S, D].

        Both sides of the write have rank 5: of a lower rank, Core ML would bake in the traced T.
        """
        row = layer - self.first
        self.keys[row : row + 1, :, :, self.begin : self.end, :] = key.unsqueeze(0)
        self.values[row : row + 1, :, :, self.begin : self.end, :] = value.unsqueeze(0)
        return (
            self.keys[row : row + 1, :, :, : self.seen, :].squeeze(0),
            self.values[row : row + 1, :, :, : self.seen, :].squeeze(0),
        )


class DecoderPart(nn.Module):
    """A part of the decoder, ready to be traced.

    The first input is input_ids [1, T] or hidden [1, T, width]; a part with layers takes causal_mask [1, 1, T, S] as
    well and, static, position [1]. Returns logits [1, T, V] or the hidden state.
    """

    def __init__(self, decoder: Decoder, part: Part, *, static: bool) -> None:
        super().__init__()
        self.decoder, self.part, self.static, anatomy = decoder, part, static, decoder.anatomy
        if part.layers:
            shape = (part.layers, 1, anatomy.kv_heads, decoder.context, anatomy.head_dim)
            # numpy's zeros take no memory until they are written, and a trace writes only a few slots of a long one.
            self.key_cache = nn.Buffer(torch.from_numpy(np.zeros(shape, np.float32)))
            self.value_cache = nn.Buffer(torch.from_numpy(np.zeros(shape, np.float32)))

    @property
    def states(self) -> dict[str, Tensor]:
        """Return the buffers that become states, by name."""
        return {"key_cache": self.key_cache, "value_cache": self.value_cache} if self.part.layers else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what the part makes of its first input; its slots of the buffers are written."""
        x, traits = inputs[0], self.decoder.anatomy.traits
        if self.part.embedding:
            x = self.decoder.model.embed_tokens(x)
            if traits.embedding_scale != 1.0:
                x = x * traits.embedding_scale
        if self.part.layers:
            x = self._through_layers(x, *inputs[1:])
        if not self.part.head:
            return x
        logits: Tensor = self.decoder.lm_head(self.decoder.model.norm(x))
        cap = traits.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _through_layers(self, x: Tensor, causal_mask: Tensor, position: Tensor | None = None) -> Tensor:
        decoder, tokens, slots = self.decoder, x.shape[1], cast(Tensor, self.decoder.slots)
        if position is None:
            seen = causal_mask.shape[-1]
            begin: int | Tensor = seen - tokens
            asking, asked = slots[begin:seen], slots[:seen]
        else:
            seen, begin = decoder.context, position
            asking, asked = position + slots[:tokens], slots
        cache = StateCache(self.key_cache, self.value_cache, self.part.first, begin, tokens, seen)
        rows = range(self.part.first, self.part.end)
        turning = dict.fromkeys(decoder.rotary_of[row] for row in rows)
        turns = {i: None if i is None else decoder.rotary[i](asking.unsqueeze(0)) for i in turning}
        windows = dict.fromkeys(decoder.windows[row] for row in rows)
        biases = {window: _narrowed(causal_mask, asking, asked, window) for window in windows}
        for row in rows:
            layer = cast(Layer, decoder.model.layers[row])
            x = layer(x, turns[decoder.rotary_of[row]], biases[decoder.windows[row]], cache)
        return x


class MirroredNorm(nn.Module):
    """RMSNorm as the first half of layer_norm([x, -x]): the mean is 0, the variance is the mean square."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        weight = (norm.weight + norm.offset).detach()
        self.weight = nn.Buffer(torch.cat((weight, weight)))
        self.width, self.eps = len(weight), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x."""
        both = functional.layer_norm(torch.cat((x, -x), dim=-1), (2 * self.width,), self.weight, None, self.eps)
        return both[..., : self.width]


def hollow_decoder(bundle: ModelBundle, context: int) -> tuple[Decoder, dict[str, QuantizedWeight | Tensor]]:
    """Return the bundle's decoder, its norms mirrored, and its matrices by module name: packed, or the bundle's floats.

    In the decoder itself the matrices are zeros that take no memory. Floats that float16 cannot hold stay in it, for
    the converter to treat as it does.
    """
    decoder, anatomy = Decoder(bundle.anatomy, context), bundle.anatomy
    carried: dict[str, QuantizedWeight | Tensor] = dict(bundle.quantized_weights())
    weights: dict[str, Tensor] = {}
    wanted = decoder.state_dict().keys()
    for name, tensor in bundle.model.state_dict().items():
        if name not in wanted or (anatomy.tied and name == f"{anatomy.head}.weight"):
            continue
        values = tensor.detach().float().cpu()
        if values.dim() == 2 and values.abs().max() <= _FLOAT16_LARGEST:
            carried[name.removesuffix(".weight")] = values
        else:
            weights[name] = values
    weights.update((f"{name}.weight", torch.zeros(()).expand(tuple(weight.shape))) for name, weight in carried.items())
    if anatomy.tied:
        weights[f"{anatomy.head}.weight"] = weights[f"{anatomy.embedding}.weight"]
    decoder.load_state_dict(weights, strict=True, assign=True)
    if anatomy.tied:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                setattr(parent, name, MirroredNorm(child))
    return decoder.eval().requires_grad_(False), carried


def _narrowed(bias: Tensor, asking: Tensor, asked: Tensor, window: int | None) -> Tensor:
    """Return the bias with everything `window` slots or more before a token masked as well."""
    if window is None:
        return bias
    distance = asking.unsqueeze(1) - asked.unsqueeze(0)
    return torch.where(distance >= window, torch.full_like(bias, MASKED), bias)
