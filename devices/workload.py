"""What one generated token costs a device: bytes to read, multiply-accumulates, cache. Torch-free.

A `Workload` is made from an exported artifact's `details`, or from a bare config.json for a model that does not exist
yet. The details an exporter writes (only `layers` is required; the other keys sharpen the estimate):

    layers               {name: {"bits": float, "bytes": int, "parameters": int,
                                 "format": one of device_profile.WEIGHT_FORMATS, optional}};
                         bits include scales, zero points and palettes
    kv_bytes_per_token   bytes the KV cache grows by with each token
    context_length       most tokens the artifact takes
    vocabulary           length of a row of logits
    tied                 the embedding's bytes also serve as the head (default: no layer is called `lm_head`)
    attention_width      layers x heads x width of a head (default: read off the layers called q_proj)
    depth                decoder layers (default: the different numbers in the names of `layers`)
    runtime              {"shapes": "static"}: every token reads the cache of the whole context; {"operators": "plain"}:
                         every token copies the cache; {"activations": "int8"}: products with int8 activations

An embedding is looked up, not multiplied: its row is a few hundred bytes of what is stored. A tied head reads all of
it for every token, and multiplies with all of it. Norm vectors and biases are counted as bytes, their few operations
as multiply-accumulates like any other weight: the error is under 0.1 % for any model worth shipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dwindle.devices.device_profile import FLOAT_FORMATS
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.report import Artifact

__all__ = ["WEIGHTS_APART_ABOVE_BYTES", "LayerLoad", "WeightUse", "Workload"]

WeightUse = Literal["linear", "shared", "embedding", "head"]
"""What a weight is for: `shared` is an embedding that is the head, too; norms and biases count with the linears."""
WEIGHTS_APART_ABOVE_BYTES = 500_000_000
"""From so many bytes of weights on, an ONNX artifact keeps them in a file of their own (`ExportOptions`)."""

_EMBEDDINGS = ("embed_tokens", "wte", "embedding")
_QUERIES = ("q_proj", "query")
_PACKED_BELOW_BITS = 12
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "smollm3")
"""Families whose config.json leaves `tie_word_embeddings` out when it is true."""


@dataclass(frozen=True)
class LayerLoad:
    """One stored weight: `streamed` says that every token reads all of it."""

    name: str
    parameters: int
    bytes: int
    streamed: bool = True
    format: str | None = None

    @property
    def streamed_bytes(self) -> int:
        """Return the bytes that every token reads."""
        return self.bytes if self.streamed else 0

    @property
    def packed(self) -> bool:
        """Return whether its weights are integers or palettes; below 12 bits a weight where no format is known yet."""
        if self.format is not None:
            return self.format not in FLOAT_FORMATS
        return 8 * self.bytes < _PACKED_BELOW_BITS * self.parameters

    @property
    def packed_parameters(self) -> int:
        """Return the weights that every token unpacks."""
        return self.parameters if self.streamed and self.packed else 0

    @property
    def use(self) -> WeightUse:
        """Return what it is for, which decides how often a runtime holds it."""
        if _is_embedding(self.name):
            return "shared" if self.streamed else "embedding"
        return "head" if _last(self.name) == "lm_head" else "linear"


@dataclass(frozen=True)
class Workload:
    """The cost of a model, layer by layer. `format` is the artifact's format, or None for a plan."""

    layers: tuple[LayerLoad, ...]
    kv_bytes_per_token: int
    context_length: int
    vocabulary: int
    package_bytes: int
    format: str | None = None
    attention_width: int = 0
    """Layers x heads x width of a head; 0 where nobody knows it: prefill then counts weights alone."""
    depth: int = 0
    """Decoder layers; 0 where nobody knows: a device's cost per layer then counts nothing."""
    static_shapes: bool = False
    """Whether every token reads the cache of the whole context."""
    copies_cache: bool = False
    """Whether every token copies the past into the present."""
    int8_activations: bool = False
    """Whether products with packed weights round their activations to int8."""
    apart: bool | None = None
    """Whether the weights lie in a file of their own; None: from `WEIGHTS_APART_ABOVE_BYTES` on."""

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def weights_apart(self) -> bool:
        """Return whether the weights lie in a file of their own: as is known, or as their size has it."""
        return self.weight_bytes > WEIGHTS_APART_ABOVE_BYTES if self.apart is None else self.apart

    @property
    def streamed_bytes(self) -> int:
        """Return the weight bytes that every token reads."""
        return sum(layer.streamed_bytes for layer in self.layers)

    @property
    def multiply_accumulates(self) -> int:
        """Return the multiply-accumulates per token, attention scores apart."""
        return sum(layer.parameters for layer in self.layers if layer.streamed)

    @property
    def head_format(self) -> str | None:
        """Return the format of the table that makes the logits: the head, or the embedding tied to it."""
        heads = (x for x in self.layers if _last(x.name) == "lm_head" or (x.streamed and _is_embedding(x.name)))
        return next((layer.format for layer in heads), None)

    @property
    def weight_formats(self) -> Mapping[str, list[str]]:
        """Return the weight formats in use, each with the layers that use it."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.format is not None:
                found.setdefault(layer.format, []).append(layer.name)
        return found

    def with_float32_weights(self) -> Workload:
        """Return the workload of a runtime that turns 16-bit floats into float32 when it loads them."""
        wide = tuple(
            replace(layer, bytes=4 * layer.parameters) if layer.format in ("float16", "bfloat16") else layer
            for layer in self.layers
        )
        return replace(self, layers=wide)

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Workload:
        """Return the workload of an exported artifact. Raises RecipeError if its details name no layers."""
        details = artifact.details
        table = details.get("layers")
        if not isinstance(table, Mapping) or not table:
            raise RecipeError(
                f"{artifact.path}: the artifact's details name no layers, so its cost cannot be "
                "estimated. Export it again with this version of dwindle."
            )
        broken = [
            f"{name} ({key})"
            for name, row in table.items()
            for key in ("bytes", "parameters")
            if not isinstance(row, Mapping) or not isinstance(row.get(key), int | float)
        ]
        if broken:
            raise RecipeError(
                f"{artifact.path}: {len(broken)} layer(s) without a number: {', '.join(broken[:10])}. "
                "Export it again with this version of dwindle."
            )
        tied = bool(details.get("tied", not any(_last(name) == "lm_head" for name in table)))
        layers = tuple(
            LayerLoad(
                name, int(row["parameters"]), int(row["bytes"]), tied or not _is_embedding(name), row.get("format")
            )
            for name, row in table.items()
        )
        return cls(
            layers,
            int(details.get("kv_bytes_per_token", 0)),
            int(details.get("context_length", 0)),
            int(details.get("vocabulary", 0)),
            artifact.bytes,
            artifact.format,
            int(details.get("attention_width") or _attention_width(layers, int(details.get("vocabulary", 0)))),
            int(details.get("depth") or _depth(layers)),
            _says(details, "shapes", "static"),
            _says(details, "operators", "plain"),
            _says(details, "activations", "int8"),
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        bits_per_weight: float = 16.0,
        *,
        embedding_bits_per_weight: float | None = None,
        kv_bits: float = 16.0,
    ) -> Workload:
        """Return the workload of a decoder that has this config.json, stored at so many bits per weight.

        `bits_per_weight` counts scales and palettes; the embedding has the same unless told. Apple's 2024 on-device
        model (26 layers, width 3072, 24 heads and 8 KV heads of 128) at 3.7 bits with an 8-bit embedding:

        >>> afm = {"hidden_size": 3072, "intermediate_size": 8036, "num_hidden_layers": 26, "vocab_size": 49152,
        ...        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
        >>> workload = Workload.from_config(afm, 3.7, embedding_bits_per_weight=8)
        >>> f"{workload.multiply_accumulates / 1e9:.2f}B, {workload.weight_bytes / 1e9:.3f} GB"
        '2.73B, 1.344 GB'
        """
        shape = _Shape.of(config)
        outer_bits = bits_per_weight if embedding_bits_per_weight is None else embedding_bits_per_weight
        layers = [
            LayerLoad(f"model.layers.{i}", n, round(n * bits_per_weight / 8))
            for i, n in enumerate(shape.layer_parameters())
        ]
        embedding = shape.vocabulary * shape.width
        layers.append(LayerLoad("model.embed_tokens", embedding, round(embedding * outer_bits / 8), shape.tied))
        if not shape.tied:
            layers.append(LayerLoad("lm_head", embedding, round(embedding * outer_bits / 8)))
        kv_bytes = round(2 * len(shape.ffn_widths) * shape.kv_heads * shape.head_dim * kv_bits / 8)
        return cls(
            tuple(layers),
            kv_bytes,
            shape.context,
            shape.vocabulary,
            sum(layer.bytes for layer in layers),
            attention_width=len(shape.ffn_widths) * shape.heads * shape.head_dim,
            depth=len(shape.ffn_widths),
        )


def _last(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]


def _is_embedding(name: str) -> bool:
    return _last(name) in _EMBEDDINGS


def _says(details: Mapping[str, Any], key: str, value: str) -> bool:
    """Return whether an artifact's details say so of its runtime."""
    runtime = details.get("runtime")
    return isinstance(runtime, Mapping) and runtime.get(key) == value


def _depth(layers: tuple[LayerLoad, ...]) -> int:
    """Return the decoder layers, told apart by the first number in their weights' names.

    >>> _depth(tuple(LayerLoad(f"model.layers.{i}.mlp.{n}_proj", 8, 8) for i in (0, 1) for n in ("up", "down")))
    2
    """
    numbers = (next((part for part in layer.name.split(".") if part.isdigit()), None) for layer in layers)
    return len({number for number in numbers if number is not None})


def _attention_width(layers: tuple[LayerLoad, ...], vocabulary: int) -> int:
    """Return layers x heads x width of a head, read off the query projections [heads x head, width], or 0.

    The width follows from the embedding [vocabulary, width].

    >>> rows = (LayerLoad("model.embed_tokens", 320, 640), LayerLoad("model.layers.0.self_attn.q_proj", 128, 64))
    >>> _attention_width(rows, vocabulary=32)
    12
    """
    width = next((x.parameters // vocabulary for x in layers if vocabulary and _is_embedding(x.name)), 0)
    queries = sum(x.parameters for x in layers if _last(x.name) in _QUERIES)
    return queries // width if width else 0


@dataclass(frozen=True)
class _Shape:
    """The few numbers of a config.json that decide a decoder's size."""

    width: int
    ffn_widths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Shape:
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [key for key in needed if not config.get(key)]
        if missing:
            raise UnsupportedModel(f"config.json: missing {', '.join(missing)}. A decoder's config.json is needed.")
        experts = [key for key in ("num_experts", "num_local_experts") if config.get(key)]
        if experts:
            raise UnsupportedModel(f"config.json: {experts[0]}={config[experts[0]]}. The cost of a mixture of experts "
                                   "depends on the text; a dense decoder is needed.")  # fmt: skip
        width, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        ffn = config["intermediate_size"]
        widths = tuple(int(w) for w in ffn) if isinstance(ffn, list | tuple) else (int(ffn),) * layers
        if len(widths) != layers:
            raise UnsupportedModel(f"config.json: {len(widths)} FFN widths for {layers} layers.")
        tied = config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT)
        return cls(
            width,
            widths,
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or width // heads),
            int(config["vocab_size"]),
            int(config.get("max_position_embeddings") or 0),
            bool(tied),
        )

    def layer_parameters(self) -> list[int]:
        """Return each layer's parameters: q and o, k and v, gate + up + down, two norms."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return [attention + 3 * self.width * ffn + 2 * self.width for ffn in self.ffn_widths]
