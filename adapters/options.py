"""How to adapt: the shape of the low-rank change, on top of the training loop's options. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from dwindle.errors import RecipeError
from dwindle.train_options import TrainOptions

__all__ = ["AdapterOptions", "Kind", "RecoverOptions", "Start"]

Kind = Literal["lora", "rslora", "dora"]
Start = Literal["zero", "error", "outputs", "fisher"]


@dataclass(frozen=True)
class AdapterOptions(TrainOptions):
    """A low-rank change of linears, and everything the training loop takes (`core.train_options`)."""

    rank: int = 16
    """Rank r of the change of each linear."""
    alpha: float | None = None
    """The change is alpha / r B A (rslora: alpha / sqrt(r)); None is 2 r."""
    kind: Kind = "lora"
    """`lora`, `rslora` (scaled by 1 / sqrt(r)) or `dora` (direction by LoRA, and a trained length of every row)."""
    targets: tuple[str, ...] = ("all",)
    """Which linears: `all`, parts of a layer (q, k, v, o, gate, up, down, qkv, gate_up), or names of modules."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    learning_rate: float = 2e-4
    """Peak rate; about ten times that of full fine-tuning, whatever the rank."""
    weight_decay: float = 0.0
    """Decoupled decay of A and B."""

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        super().__post_init__()
        wrong = []
        if not isinstance(self.rank, int) or self.rank < 1:
            wrong.append(f"rank={self.rank!r} (needed: a whole number of at least 1)")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            wrong.append(f"alpha={self.alpha!r} (needed: above 0, or none)")
        if self.kind not in get_args(Kind):
            wrong.append(f"kind={self.kind!r} (needed: {' or '.join(get_args(Kind))})")
        if not targets or not all(isinstance(target, str) and target for target in targets):
            wrong.append(f"targets={list(targets)!r} (needed: 'all', parts of a layer or names of linears)")
        if not 0 <= self.dropout < 1:
            wrong.append(f"dropout={self.dropout!r} (needed: 0 to below 1)")
        if wrong:
            raise RecipeError(f"adapter: {'; '.join(wrong)}.")

    @property
    def scaled_by(self) -> float:
        """Return alpha.

        >>> AdapterOptions(rank=8).scaled_by
        16.0
        """
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    @property
    def training(self) -> TrainOptions:
        """Return the options of the training loop alone."""
        return TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions)})


@dataclass(frozen=True)
class RecoverOptions(AdapterOptions):
    """How to give a quantized model back what it lost."""

    start: Start | None = None
    """`zero`: the adapter begins without effect. `error`: with the best rank-r part of what quantization changed
    in each linear (its largest singular values), as LoftQ does. `outputs`: with the part that repairs most of what the
    linears give out on some of the text, as QERA does. `fisher`: with the part that takes away most of the divergence
    on it; a pass and its way back for every layer. None: `fisher`, but for dora, which begins at zero."""
    temperature: float = 1.0
    """Temperature of teacher and student in the KL."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = []
        if self.start is not None and self.start not in get_args(Start):
            wrong.append(f"start={self.start!r} (needed: {', '.join(get_args(Start))})")
        elif self.begins != "zero" and self.kind == "dora":
            wrong.append(f"start={self.start!r} with kind='dora' (needed: lora or rslora, a row's length has no rank)")
        if not 0 < self.temperature < math.inf:
            wrong.append(f"temperature={self.temperature!r} (needed: above 0)")
        if wrong:
            raise RecipeError(f"recover: {'; '.join(wrong)}.")

    @property
    def begins(self) -> Start:
        """Return where the adapter begins.

        >>> RecoverOptions().begins, RecoverOptions(kind="dora").begins
        ('fisher', 'zero')
        """
        return self.start or ("zero" if self.kind == "dora" else "fisher")
