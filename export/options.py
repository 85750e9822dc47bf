"""What an export is asked for. Each default stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dwindle.errors import RecipeError

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy

__all__ = ["FORMATS", "Activations", "ExportOptions"]

FORMATS = ("onnx", "coreml")
"""The formats an export can write, in the order they are written."""
Activations = Literal["float32", "int8"]


@dataclass(frozen=True)
class ExportOptions:
    """What to write and how hard to check it."""

    formats: tuple[str, ...] = FORMATS
    """Formats to write, each into a folder of that name; see FORMATS."""
    context_length: int | None = None
    """Longest text the artifact is meant for, in tokens; None: as far as the model's positions are exact."""
    prompts: int = 2
    """Prompts of the parity check."""
    prompt_tokens: int = 64
    """Longest prefill of the parity check, in tokens; shorter where a quarter of the context is."""
    decode_steps: int = 32
    """Cached one-token steps after each prefill."""
    activations: Activations = "float32"
    """ONNX only: the type quantized matrix products compute in. int8 is three to four times as fast and rounds the
    activations in blocks, which moves logits by one or two percent of their range (about 2e-4 nats/token); its parity
    limits are wider accordingly."""
    external_data_above_bytes: int = 1_500_000_000
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
        least_values = {"prompts": 1, "prompt_tokens": 1, "decode_steps": 1, "external_data_above_bytes": 0}
        for name, least in least_values.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                problems.append(f"{name}={value!r} must be a whole number, at least {least}")
        if self.context_length is not None and (not _is_whole(self.context_length) or self.context_length < 2):
            problems.append(f"context_length={self.context_length!r} must be a whole number, at least 2, or null")
        if self.activations not in ("float32", "int8"):
            problems.append(f"activations={self.activations!r}; known: float32, int8")
        if problems:
            raise RecipeError(f"export: {'; '.join(problems)}.")

    def resolved(self, anatomy: Anatomy) -> ExportOptions:
        """Return the options with a concrete context length for this model.

        Some rope scalings change all frequencies once a text outgrows a length (`Rope.longest_exact`); a fixed graph
        is exact up to there, so that is the longest context. Raises RecipeError if a longer one was asked for, or if
        the context has no room for the parity check.
        """
        longest = min([anatomy.context, *(rope.longest_exact for rope in anatomy.traits.ropes if rope is not None)])
        length = longest if self.context_length is None else self.context_length
        if length > longest:
            raise RecipeError(f"export: context_length={length:,} is more than the {longest:,} tokens this "
                              f"{anatomy.model_type} is exact for. Ask for {longest:,} at most.")  # fmt: skip
        if length <= self.decode_steps:
            raise RecipeError(f"export: context_length={length:,} leaves no room for a prompt and decode_steps="
                              f"{self.decode_steps}. Raise the one or lower the other.")  # fmt: skip
        return replace(self, context_length=length)

    def prompt_length(self) -> int:
        """Return the prefill length of the parity check for resolved options.

        >>> ExportOptions(context_length=256).prompt_length(), ExportOptions(context_length=40).prompt_length()
        (64, 8)
        """
        if self.context_length is None:
            raise ValueError("prompt_length needs resolved options")
        quarter = max(1, self.context_length // 4)
        return min(self.prompt_tokens, quarter, self.context_length - self.decode_steps)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
