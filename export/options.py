"""What an export is asked for. Each default stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from dwindle.errors import RecipeError

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["FORMATS", "FORMATS_OF", "Activations", "AdapterInputs", "ExportOptions", "KVCache", "Operators", "Shapes"]

FORMATS = ("onnx", "coreml", "coreai")
"""The formats an export can write, in the order they are written."""
Activations = Literal["float32", "int8"]
AdapterInputs = Literal["none", "lora", "dora"]
KVCache = Literal["float32", "float16", "int8"]
Operators = Literal["fused", "plain"]
Shapes = Literal["dynamic", "static"]
FORMATS_OF = {
    "activations": ("onnx",), "adapter_inputs": ("onnx", "coreai"), "adapter_rank": ("coreai",),
    "external_data_above_bytes": ("onnx",), "kv_cache": ("onnx",), "largest_file_bytes": ("coreml",),
    "operators": ("onnx",), "prefill_tokens": ("coreml", "coreai"), "shapes": ("coreml", "coreai"),
}  # fmt: skip
"""The formats that an option concerns, where not all."""
_CHOICES = {
    "adapter_inputs": AdapterInputs,
    "activations": Activations,
    "kv_cache": KVCache,
    "operators": Operators,
    "shapes": Shapes,
}


@dataclass(frozen=True)
class ExportOptions:
    """What to write and how hard to check it."""

    formats: tuple[str, ...] = ("onnx", "coreml")
    """Formats to write, each into a folder of that name; see FORMATS."""
    context_length: int | None = None
    """Longest text the artifact is meant for, in tokens; None: as far as the model's positions are exact."""
    prompts: int = 2
    """Prompts of the parity check."""
    prompt_tokens: int = 64
    """Longest prefill of the parity check, in tokens; shorter where a quarter of the context is."""
    decode_steps: int = 64
    """Cached one-token steps after each prefill; fewer where the context ends."""
    longest_tokens: int = 2048
    """The last text of the parity check is as long as the context, and at most this long."""
    shapes: Shapes = "dynamic"
    """Core ML and Core AI: `dynamic` is one program for any number of tokens (CPU and GPU); `static` is a prefill
    function of `prefill_tokens` and a decode function of one token over a cache of full length, sharing their weights,
    as the Neural Engine wants them."""
    prefill_tokens: int = 64
    """Tokens that the prefill function takes at a time where `shapes` is static."""
    kv_cache: KVCache = "float32"
    """ONNX only: the type keys and values are kept in between steps; float16 takes half of the memory, int8 a quarter
    and rounds them, with one scale a channel found on sample text. The parity limits are wider accordingly."""
    operators: Operators = "fused"
    """ONNX only: `fused` uses ONNX Runtime's own operators for attention, norms and activation, `plain` those of the
    ONNX standard (integer weights keep MatMulNBits, for which the standard has nothing)."""
    largest_file_bytes: int = 2_000_000_000
    """Core ML only: a package whose weights would pass this is split by layers into several, run one after another."""
    activations: Activations = "float32"
    """ONNX only: the type quantized matrix products compute in. int8 is three to four times as fast and rounds the
    activations in blocks, which moves logits by one or two percent of their range (about 2e-4 nats/token); its parity
    limits are wider accordingly."""
    adapter_inputs: AdapterInputs = "none"
    """ONNX, Core AI: inputs for adapters, so that they can be packaged for this very model later and swapped in at run
    time: `lora` for low-rank changes, `dora` for scales of rows as well, which cost one more product a linear. Adapters
    that an export is given have the inputs they need in any case."""
    adapter_rank: int = 16
    """Core AI with static shapes only: rank that adapter inputs are made for; that of the largest adapter given, if it
    is larger. Elsewhere every adapter has its own."""
    external_data_above_bytes: int = 500_000_000
    """ONNX only: from this many bytes of weights on, they go into a `model.onnx.data` beside the graph (which may
    hold 2 GB at most)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))
        problems = [f"formats names {name!r}; known: {', '.join(FORMATS)}"
                    for name in self.formats if name not in FORMATS]  # fmt: skip
        if not self.formats:
            problems.append(f"formats is empty; name at least one of {', '.join(FORMATS)}")
        if len(set(self.formats)) != len(self.formats):
            problems.append(f"formats={list(self.formats)} names a format twice")
        least_values = {
            "prompts": 1,
            "prompt_tokens": 1,
            "decode_steps": 1,
            "longest_tokens": 1,
            "external_data_above_bytes": 0,
            "prefill_tokens": 2,
            "adapter_rank": 1,
            "largest_file_bytes": 1,
        }
        for name, least in least_values.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                problems.append(f"{name}={value!r} must be a whole number, at least {least}")
        if self.context_length is not None and (not _is_whole(self.context_length) or self.context_length < 2):
            problems.append(f"context_length={self.context_length!r} must be a whole number, at least 2, or null")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                problems.append(f"{name}={getattr(self, name)!r}; known: {', '.join(get_args(choices))}")
        if problems:
            raise RecipeError(f"export: {'; '.join(problems)}.")

    def resolved(self, anatomy: Anatomy) -> ExportOptions:
        """Return the options with a concrete context length for this model.

        Some rope scalings change all frequencies once a text outgrows a length (`Rope.longest_exact`); a fixed graph
        is exact up to there, so that is the longest context. Raises RecipeError if a longer one was asked for.
        """
        longest = min([anatomy.context, *(rope.longest_exact for rope in anatomy.traits.ropes if rope is not None)])
        length = longest if self.context_length is None else self.context_length
        if length > longest:
            raise RecipeError(f"export: context_length={length:,} is more than the {longest:,} tokens this "
                              f"{anatomy.model_type} is exact for. Ask for {longest:,} at most.")  # fmt: skip
        return replace(self, context_length=length)

    def parity_lengths(self) -> tuple[int, int, int]:
        """Return (prompt, cached steps, longest text) in tokens of the parity check, for resolved options.

        >>> ExportOptions(context_length=256).parity_lengths(), ExportOptions(context_length=40).parity_lengths()
        ((64, 64, 256), (10, 30, 40))
        """
        if self.context_length is None:
            raise ValueError("parity_lengths needs resolved options")
        prompt = min(self.prompt_tokens, max(1, self.context_length // 4))
        steps = min(self.decode_steps, self.context_length - prompt)
        return prompt, steps, min(self.longest_tokens, self.context_length)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
