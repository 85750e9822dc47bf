"""What a model has to reach on a device, and what may be cut for it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dwindle.devices.budgets import Budget, parse_budgets
from dwindle.devices.cost_model import DEFAULT_PROMPT_TOKENS
from dwindle.errors import RecipeError, did_you_mean

__all__ = ["Axis", "FitOptions"]

Axis = Literal["ffn", "heads", "width", "layers"]

_STATE_MULTIPLE = 32


@dataclass(frozen=True)
class FitOptions:
    """Budgets, the device, and the space that is searched."""

    target: str
    """Device profile by name or YAML file."""
    budgets: Mapping[str, Any] | tuple[str, ...] = field(default_factory=dict)
    """Limits as in `validate`: {tokens_per_second: 30, memory: 1.5GB} or ['tokens_per_second >= 30']. Memory is
    limited to what the profile says one app may use where no other limit is named."""
    bits: float | None = None
    """Bits of the linears: a width that the runtime carries, an average in between (mixed bits), or the checkpoint's
    own float width; None: searched."""
    runtime: str | None = None
    """onnx, coreml or coreai; None: the first of the profile."""
    axes: tuple[Axis, ...] = get_args(Axis)
    """What may be cut: ffn, heads (a KV head with its queries), width, layers."""
    vocabulary: int | None = None
    """Tokens that stay after a cut of the vocabulary; None: all."""
    rotate: bool | None = None
    """Whether a cut width is turned onto its principal axes, which unties the head; None: where the family allows."""
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    """Prompt length behind tokens/s and time to first token."""
    context: int | None = None
    """Tokens the KV cache is sized for; None: 4,096, or what the model takes if that is less."""
    pessimistic: bool = False
    """Decide by the unfavourable end of every estimate instead of the middle."""
    runners_up: int = 5
    """Other plans that are told, each the best of another kind."""
    multiple: int = 32
    """FFN and width are multiples of this; itself a multiple of 32, as quantization groups and matrix units want."""
    distill_steps: int = 0
    """Steps in which the best candidates are distilled, to rank them by what they become. 0: by the prior alone."""
    candidates: int = 3
    """How many candidates are distilled."""
    seed: int = 0
    """Seed of those distillations."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", (self.axes,) if isinstance(self.axes, str) else tuple(self.axes))
        wrong = []
        try:
            budgets = self.parsed_budgets()
            wrong += [f"{b.metric} {b.text} (needed: a limit above 0)" for b in budgets if not b.limit > 0]
            if not budgets:
                wrong.append("no target is given (needed: tokens_per_second, memory, time_to_first_token or package)")
        except RecipeError as error:
            wrong.append(str(error))
        axes = get_args(Axis)
        wrong += [f"axis {axis!r} is unknown{did_you_mean(str(axis), axes)}" for axis in self.axes if axis not in axes]
        if not self.axes:
            wrong.append(f"no axis may be cut (needed: some of {', '.join(axes)})")
        if self.bits is not None and not self.bits > 0:
            wrong.append(f"bits={self.bits!r} (needed: above 0)")
        least = {"prompt_tokens": 1, "runners_up": 0, "distill_steps": 0, "candidates": 1}
        least |= {name: 1 for name in ("vocabulary", "context") if getattr(self, name) is not None}
        wrong += [f"{name}={getattr(self, name)!r} (needed: a whole number of at least {at_least})"
                  for name, at_least in least.items() if not getattr(self, name) >= at_least]  # fmt: skip
        if self.context is not None and self.context >= 1 and self.context % _STATE_MULTIPLE:
            near = max(_STATE_MULTIPLE, round(self.context / _STATE_MULTIPLE) * _STATE_MULTIPLE)
            wrong.append(f"context={self.context} (needed: a multiple of {_STATE_MULTIPLE}, as Core ML's states are; "
                         f"nearest: {near})")  # fmt: skip
        if self.multiple < 32 or self.multiple % 32:
            wrong.append(f"multiple={self.multiple!r} (needed: a multiple of 32)")
        if wrong:
            raise RecipeError(f"fit: {'; '.join(wrong)}.")

    def parsed_budgets(self) -> tuple[Budget, ...]:
        """Return the budgets as objects."""
        return parse_budgets(self.budgets)

    def context_for(self, longest: int) -> int:
        """Return the tokens that the KV cache is sized for, in a model that takes `longest`.

        >>> FitOptions("iphone-15-pro", {"memory": "1GB"}).context_for(1000)
        992
        """
        if self.context is not None:
            if self.context > longest:
                raise RecipeError(f"fit: context={self.context:,} is more than the {longest:,} tokens the model takes.")
            return self.context
        room = min(4096, longest)
        return max(room // _STATE_MULTIPLE * _STATE_MULTIPLE, min(room, _STATE_MULTIPLE))
