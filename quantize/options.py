"""How to quantize. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dwindle.errors import RecipeError

__all__ = ["DATA_FREE", "INTEGER_BITS", "METHODS", "PALETTE_BITS", "QuantizeOptions", "Scheme"]

Scheme = Literal["palettize", "integer"]
Importance = Literal["magnitude", "activation", "fisher"]
EmbeddingScheme = Literal["integer", "palettize"]
Scope = Literal["model", "block"]

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
INTEGER_BITS = (2, 3, 4, 8)
METHODS: dict[str, tuple[str, ...]] = {
    "palettize": ("kmeans", "lnq", "learned", "qat"),
    "integer": ("rtn", "hqq", "gptq", "awq", "learned", "qat"),
}
"""Methods by scheme, cheapest first; each has a file of its own that teaches it."""
DATA_FREE = ("kmeans", "rtn", "hqq")
"""Methods that need no calibration text."""
_WHOLE: dict[str, str] = {"palettize": "tensor", "integer": "channel"}


@dataclass(frozen=True)
class QuantizeOptions:
    """Which codes the decoder's linears and the embedding get, how they are found, and what stays float."""

    scheme: Scheme = "palettize"
    """`palettize`: indices into palettes of 2^bits fp16 values; `integer`: integers times an fp16 scale."""
    bits: int = 4
    """Bits of a code in the linears: 1, 2, 3, 4, 6 or 8 for palettes, 2, 3, 4 or 8 for integers."""
    target_bits_per_weight: float | None = None
    """Mixed bits: the best plan whose linears take at most this on average, scales and palettes included."""
    target_bytes: int | None = None
    """Mixed bits: the best plan whose whole model (embedding, norms and all) takes at most so many bytes."""
    allowed_bits: tuple[int, ...] = ()
    """Bits a mixed plan may use; empty: all that the scheme and `runtimes` carry."""
    group_size: int | str | None = None
    """Palettes: output rows that share one, or "tensor". Integers: inputs that share one scale, or "channel". None:
    16 rows or 32 inputs, and in a layer that those do not divide the nearest size that does (the plan shows it)."""
    symmetric: bool = True
    """Integers without zero points. Palettes know none."""
    row_scales: bool = False
    """Palettes: one fp16 scale per output row beside the palettes. Core ML carries it, its Neural Engine may not."""
    method: str | None = None
    """Palettes: kmeans, lnq, learned or qat. Integers: rtn, hqq, gptq, awq, learned or qat. None: lnq or gptq with a
    calibration text, kmeans or rtn without one."""
    importance: Importance | None = None
    """kmeans: weigh a weight's error by its magnitude, its input's second moment or its diagonal Fisher information.
    None: by Fisher with a calibration text, not at all without one."""
    guided: bool = False
    """lnq and gptq: weigh the Hessian's tokens by the gradient of the model's loss (GuidedQuant), instead of making
    good in every linear what was lost before it."""
    scope: Scope = "model"
    """learned: `model` learns how the weights of all blocks round together; `block` takes block after block, so that
    one is in memory at a time, and large checkpoints can be streamed."""
    iterations: int = 200
    """learned: steps, per block or in all. 100 will do at 4 bits, 2 bits gain from 400."""
    own_windows: int | None = None
    """learned with scope=model: windows that the unquantized model writes itself, beside the calibration's; None is 3
    for each of those."""
    tune_steps: int = 0
    """Steps in which palettes and scales (never codes) follow the unquantized model, whole model at once. 0: none."""
    tokens: int | None = None
    """qat: tokens to train on; None is the training text once, or the calibration windows 16 times without one."""
    learning_rate: float | None = None
    """learned, qat and tuning: peak rate; None is each one's own."""
    batch_size: int = 8
    """learned, qat and tuning: windows per step."""
    embedding_scheme: EmbeddingScheme = "integer"
    """Embedding and head: `integer` with one scale per row, or `palettize` with one palette for the table."""
    embedding_bits: int = 8
    """Bits of the embedding and the head."""
    keep_float: tuple[str, ...] = ()
    """Names or glob patterns of linears, embedding or head that stay float; each is a line in the report."""
    runtimes: tuple[str, ...] = ()
    """Runtimes that must be able to carry the result (coreml, coreai, coreai-engine, onnx); refused before any work
    if one cannot."""
    histogram_bins: int = 256
    """Palettes: cuts that the exact programme may take; more is slower and hardly better. See `kmeans`."""
    seed: int = 0
    """Order of the data in learned, qat and tuning."""

    def __post_init__(self) -> None:
        for name in ("keep_float", "runtimes"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "allowed_bits", tuple(sorted(set(self.allowed_bits))))
        if self.scheme not in get_args(Scheme):
            raise RecipeError(f"quantize: scheme={self.scheme!r} (needed: {' or '.join(get_args(Scheme))}).")
        wrong = [*self._wrong_formats(), *self._wrong_targets(), *self._wrong_method()]
        if wrong:
            raise RecipeError(f"quantize: {'; '.join(wrong)}.")

    @property
    def mixed(self) -> bool:
        """Return True if bits are chosen layer by layer."""
        return self.target_bits_per_weight is not None or self.target_bytes is not None

    def method_used(self, calibrated: bool) -> str:
        """Return the method, with the default for None.

        >>> QuantizeOptions().method_used(False), QuantizeOptions(scheme="integer").method_used(True)
        ('kmeans', 'gptq')
        """
        if self.method is not None:
            return self.method
        return {"palettize": ("kmeans", "lnq"), "integer": ("rtn", "gptq")}[self.scheme][calibrated]

    def _wrong_formats(self) -> list[str]:
        allowed = PALETTE_BITS if self.scheme == "palettize" else INTEGER_BITS
        listed = ", ".join(map(str, allowed))
        wrong = []
        if self.bits not in allowed:
            wrong.append(f"bits={self.bits!r} (needed with {self.scheme}: {listed})")
        if any(bits not in allowed for bits in self.allowed_bits):
            wrong.append(f"allowed_bits={list(self.allowed_bits)} (needed with {self.scheme}: some of {listed})")
        if self.embedding_scheme not in get_args(EmbeddingScheme):
            wrong.append(f"embedding_scheme={self.embedding_scheme!r} (needed: integer or palettize)")
        of_embedding = PALETTE_BITS if self.embedding_scheme == "palettize" else INTEGER_BITS
        if self.embedding_bits not in of_embedding:
            wrong.append(f"embedding_bits={self.embedding_bits!r} (needed: {', '.join(map(str, of_embedding))}; "
                         "keep_float keeps it float)")  # fmt: skip
        whole = _WHOLE[self.scheme]
        if not (self.group_size is None or self.group_size == whole or _is_positive(self.group_size)):
            wrong.append(f"group_size={self.group_size!r} (needed: a whole number of at least 1, or {whole!r})")
        if self.scheme == "palettize" and not self.symmetric:
            wrong.append("symmetric=False (palettes have no zero points; needed: scheme=integer)")
        if self.scheme == "integer" and self.row_scales:
            wrong.append("row_scales=True (integers have scales of their own; needed: scheme=palettize)")
        if not _is_positive(self.histogram_bins) or self.histogram_bins > 4096:
            wrong.append(f"histogram_bins={self.histogram_bins!r} (needed: 1 to 4096)")
        return wrong

    def _wrong_targets(self) -> list[str]:
        wrong = []
        target = self.target_bits_per_weight
        if target is not None and not 0 < target <= 16:
            wrong.append(f"target_bits_per_weight={target!r} (needed: above 0, at most 16)")
        if self.target_bytes is not None and not _is_positive(self.target_bytes):
            wrong.append(f"target_bytes={self.target_bytes!r} (needed: a whole number of at least 1)")
        if target is not None and self.target_bytes is not None:
            wrong.append("target_bits_per_weight and target_bytes (needed: one of the two)")
        return wrong

    def _wrong_method(self) -> list[str]:
        wrong = []
        known = METHODS[self.scheme]
        if self.method is not None and self.method not in known:
            wrong.append(f"method={self.method!r} (needed with {self.scheme}: {', '.join(known)})")
        if self.importance not in (None, *get_args(Importance)):
            wrong.append(f"importance={self.importance!r} (needed: {', '.join(get_args(Importance))})")
        if self.scope not in get_args(Scope):
            wrong.append(f"scope={self.scope!r} (needed: {' or '.join(get_args(Scope))})")
        if self.scope == "block" and self.guided:
            wrong.append("scope=block with guided=True (needed: one of the two)")
        counts = ["iterations", "batch_size"] + (["tokens"] if self.tokens is not None else [])
        wrong += [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least 1)"
            for name in counts
            if not _is_positive(getattr(self, name))
        ]
        wrong += [
            f"{name}={getattr(self, name)!r} (needed: a whole number of at least 0)"
            for name in ("tune_steps", "own_windows")
            if not (getattr(self, name) in (0, None) or _is_positive(getattr(self, name)))
        ]
        if self.learning_rate is not None and not self.learning_rate > 0:
            wrong.append(f"learning_rate={self.learning_rate!r} (needed: more than 0)")
        return wrong


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
