"""The parity gate: an exported artifact, executed, against the torch model that was measured.

One prompt is one prefill of real tokens, then cached one-token steps along the text that the artifact itself writes
greedily; the cache is emptied between prompts. Then comes one text as long as the context (`longest`), fed in pieces
and its last tokens one by one: the cache's last slot, the far positions and the widest mask have all been computed.
The reference logits come from ONE forward pass of the stock transformers model over each whole text, without a cache,
so the check covers the artifact's cache as well: rotation, masks, order and positions. Compared at every position:

    max |logit error|          over all logits
    KL(reference || artifact)  nats, full vocabulary, float64, mean over positions
    top-1 agreement            share of positions with the same most likely token

The limit on logits is a share of the largest |logit| of the reference, because float32 errors grow with the numbers
that are summed. ONNX Runtime's float32, float and int4 weights, errs by at most 1.3e-6 of it and 2e-12 nats on tiny
random models of nine families and three trained ones, and by 1e-5 and 6e-11 nats on 20 random layers (162M
parameters). A wrong mask, position or scale, and numbers in 16 bits, lie above 1e-3. The limits stand between.

Logits of the reference are computed a few rows at a time and packed weights are unpacked one by one, so the gate needs
little more memory than the two models: a checkpoint of a billion parameters passes it within 3 GiB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.errors import DataError, GateFailed, RecipeError
from dwindle.measure import logit_slices
from dwindle.report import Artifact, Parity
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode

__all__ = ["Comparison", "DecodeRunner", "ParityLimits", "decode_parity", "parity_prompts", "require_parity"]

_PIECE = 256
"""Tokens of the longest text fed at a time, and rows of the reference's logits computed at a time."""
_LAST = 4
"""Tokens at the end of the longest text that are fed one by one."""
_ROWS = 16
"""Positions compared at a time; bounds the memory of the float64 softmax."""
_TEXT = (
    "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it because "
    "it was sharp. Lily wanted to share the needle with her mom, so she could sew a button on her shirt.\n\n"
    "def area(width, height):\n    \"\"\"Return the area of a rectangle.\"\"\"\n    return width * height\n\n"
    "The valley lay between two hills, and in spring the river that came down from the north carried so much water "
    "that the people of the three villages built their bridges anew every year. "
)  # fmt: skip


class DecodeRunner(Protocol):
    """An artifact that can be executed token by token; the KV cache is kept inside."""

    def reset(self) -> None:
        """Forget everything that was fed in."""

    def step(self, ids: Tensor) -> Tensor:
        """Feed ids [1, T] after what was fed before; return logits [T, V] float32."""


@dataclass(frozen=True)
class ParityLimits:
    """How far an artifact may be from the model that was measured."""

    logit_error_share: float = 5e-4
    """Largest |logit error| over the reference's largest |logit|."""
    kl_nats_per_token: float = 1e-8
    """Mean KL(reference || artifact)."""
    top1_agreement: float = 0.98
    """Smallest share of positions with the same top-1 token; ties may fall either way."""
    logit_error_floor: float = 0.0
    """Largest |logit error| that is allowed in any case, however small the logits are."""

    def __post_init__(self) -> None:
        problems = [f"{name}={value!r} must be a number from 0 on"
                    for name, value in asdict(self).items() if not value >= 0]  # fmt: skip
        if self.top1_agreement > 1:
            problems.append(f"top1_agreement={self.top1_agreement!r} is a share, at most 1")
        if problems:
            raise RecipeError(f"parity limits: {'; '.join(problems)}.")


@dataclass
class Comparison:
    """Running maxima and sums over all positions of all prompts."""

    tokens: int = 0
    agreeing: int = 0
    kl_sum: float = 0.0
    largest_error: float = 0.0
    largest_logit: float = 0.0
    finite: bool = True

    def add(self, reference: Iterator[Tensor], found: Iterable[Tensor]) -> None:
        """Count the logits [T, V] of one text, which come in different pieces from the two sides."""
        expected = torch.empty(0)
        for actual in found:
            while len(expected) < len(actual):
                expected = torch.cat([expected, next(reference)]) if len(expected) else next(reference)
            for one, other in zip(torch.split(expected[: len(actual)], _ROWS), torch.split(actual, _ROWS), strict=True):
                self._count(one, other)
            expected = expected[len(actual) :]

    def _count(self, expected: Tensor, actual: Tensor) -> None:
        if expected.shape != actual.shape:
            raise ValueError(f"logits have the shapes {list(expected.shape)} and {list(actual.shape)}")
        self.finite &= bool(torch.isfinite(actual).all())
        self.largest_error = max(self.largest_error, float((expected - actual).abs().max()))
        self.largest_logit = max(self.largest_logit, float(expected.abs().max()))
        self.agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        log_p, log_q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        self.kl_sum += float((log_p.exp() * (log_p - log_q)).sum())
        self.tokens += len(expected)

    def verdict(self, limits: ParityLimits, executed_by: str, longest: int) -> Parity:
        """Return the numbers; those of an artifact that gave NaN or infinity are the largest float."""
        worst = sys.float_info.max
        error = self.largest_error if self.finite else worst
        kl = max(0.0, self.kl_sum / self.tokens) if self.finite else worst
        agreement = self.agreeing / self.tokens
        allowed = max(limits.logit_error_share * self.largest_logit, limits.logit_error_floor)
        passed = error <= allowed and kl <= limits.kl_nats_per_token and agreement >= limits.top1_agreement
        listed = {"max_abs_logit_error": allowed, **asdict(limits), "max_abs_logit": self.largest_logit}
        return Parity(error, kl, agreement, self.tokens, executed_by, passed and self.finite, listed, longest)


def decode_parity(
    reference: ModelBundle, runner: DecodeRunner, prompts: Sequence[Tensor], decode_steps: int = 64,
    limits: ParityLimits | None = None, executed_by: str = "", *, longest: Tensor | None = None,
) -> Parity:  # fmt: skip
    """Return how closely `runner` follows `reference` over prompts [1, T] and `decode_steps` cached steps each.

    `longest` [1, S] is one more text, as long as the artifact's context if it can be.

    A miss is told by `passed`, never raised; `require_parity` raises. Raises DataError without a prompt.
    """
    if not prompts:
        raise DataError("parity: no prompt was given; at least one is needed.")
    comparison = Comparison()
    for prompt in prompts:
        runner.reset()
        found, text = [runner.step(prompt)], prompt
        for _ in range(decode_steps):
            text = torch.cat([text, found[-1][-1:].argmax(-1, keepdim=True)], dim=1)
            found.append(runner.step(text[:, -1:]))
        comparison.add(_reference(reference, text), found)
    if longest is not None:
        runner.reset()
        cut = max(1, longest.shape[1] - _LAST)
        pieces = [*torch.split(longest[:, :cut], _PIECE, dim=1), *torch.split(longest[:, cut:], 1, dim=1)]
        comparison.add(_reference(reference, longest), (runner.step(piece) for piece in pieces if piece.shape[1]))
    length = 0 if longest is None else longest.shape[1]
    return comparison.verdict(limits or ParityLimits(), executed_by, length)


def parity_prompts(reference: ModelBundle, count: int, length: int, evaluation: TokenSet | None = None) -> list[Tensor]:
    """Return `count` prompts [1, length], spread evenly over the evaluation tokens, or over a fixed text.

    A fixed text is repeated as often as needed. Raises DataError if the evaluation set holds fewer than `length`
    tokens.
    """
    if evaluation is None:
        ids = torch.tensor(encode(reference.tokenizer, _TEXT), dtype=torch.int64)
        ids = ids.repeat(-(-count * length // max(1, len(ids))))
    else:
        ids = evaluation.require("evaluation").ids.reshape(-1).to(torch.int64)
    if len(ids) < length:
        raise DataError(f"parity: the evaluation set has {len(ids):,} tokens, a prompt needs {length:,}. "
                        "Give a longer text, or lower prompt_tokens.")  # fmt: skip
    stride = (len(ids) - length) // max(1, count - 1)
    return [ids[None, start : start + length].clone() for start in (stride * i for i in range(count))]


def require_parity(artifacts: Sequence[Artifact]) -> None:
    """Raise GateFailed naming every artifact that was executed and missed its limits."""
    missed = [
        f"{a.format} {a.path}: max |logit error| {p.max_abs_logit_error:.3g} "
        f"(limit {p.limits.get('max_abs_logit_error', float('nan')):.3g}), KL {p.kl_nats_per_token:.3g} nats/token "
        f"(limit {p.limits.get('kl_nats_per_token', float('nan')):.3g}), top-1 agreement {p.top1_agreement:.1%} "
        f"(limit {p.limits.get('top1_agreement', float('nan')):.1%}) by {p.executed_by}"
        for a in artifacts
        if (p := a.parity) is not None and not p.passed
    ]
    if missed:
        raise GateFailed(f"{len(missed)} of {len(artifacts)} artifacts differ from the measured model: "
                         f"{'; '.join(missed)}. The files are kept for inspection; do not ship them.")  # fmt: skip


@torch.no_grad()
def _reference(bundle: ModelBundle, ids: Tensor) -> Iterator[Tensor]:
    """Yield the logits [rows, V] float32 of one forward pass over ids [1, T] without a cache."""
    for rows in logit_slices(bundle)(ids, _PIECE):
        yield rows.cpu()
