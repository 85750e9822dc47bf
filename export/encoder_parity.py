"""The parity gate of encoders: an exported model, executed, against transformers on the same texts.

The artifact gets all texts as one padded batch, and one text that fills the context by itself; the reference gets every
text alone, without padding. So masks, positions and the longest context are part of the check. Compared are

    embeddings   (a model without a head) hidden states at real tokens, and one vector a text: pooled as the folder's
                 `1_Pooling/config.json` says (sentence-transformers), else the mean over tokens
    logits       (a model with a head) one row a text, or one a token

    max |error|         over hidden states or logits
    cosine              of embeddings with the reference's, smallest and mean
    KL                  KL(reference || artifact) of the softmax of logits; of a head with one output, a score, of the
                        softmax over the texts, for that of one number is always 1; of embeddings, of each text's
                        ranking of the other texts, the softmax of 20 times their cosines, which is the distribution
                        that sentence encoders are trained with (sentence-transformers, MultipleNegativesRankingLoss)
    top-1 agreement     same label, same token, or same nearest other text

A float export has to agree as float32 does. What 8 and 4 bits may cost is a quality limit. On the texts of
`EncoderOptions`, MiniLM has a mean cosine of 0.9987 in 8 bits and 0.969 in 4, and a smallest of 0.994 and 0.910. The
limits were set after these numbers, with some room below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dwindle.export.encoder_source import HIDDEN, Task
from dwindle.report import Parity

__all__ = ["LIMITS", "POOLINGS", "EncoderLimits", "EncoderParity", "EncoderSession", "encoder_parity", "pooled",
           "reference_outputs"]  # fmt: skip

_SCALE = 20.0
"""Cosines are multiplied by it before the softmax of the ranking."""
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
}
"""What makes one vector of the hidden states [T, D] of a text."""
Outputs = Mapping[str, Tensor]
"""name -> [T, D] hidden states, [T] or [T, L] logits a token, or [L] logits of one text; padding removed."""
Encoding = Mapping[str, list[int]]
"""What a tokenizer makes of one text: input_ids, attention_mask and, for some models, token_type_ids."""


@dataclass(frozen=True)
class EncoderLimits:
    """How far an exported encoder may be from the one it was made of; None: reported, not limited."""

    error_share: float | None
    """Largest |error| over the reference's largest |value|."""
    cosine_mean: float
    """Mean cosine of embeddings with the reference's; of models without a head."""
    cosine_min: float
    """The smallest one."""
    kl_nats: float
    """Mean KL a row of logits; of models with a head."""
    top1_agreement: float
    """Smallest share of rows with the same largest entry."""


LIMITS: dict[int | None, EncoderLimits] = {
    None: EncoderLimits(error_share=5e-4, cosine_mean=0.99999, cosine_min=0.9999, kl_nats=1e-6, top1_agreement=0.98),
    8: EncoderLimits(error_share=None, cosine_mean=0.995, cosine_min=0.98, kl_nats=5e-3, top1_agreement=0.9),
    4: EncoderLimits(error_share=None, cosine_mean=0.95, cosine_min=0.85, kl_nats=0.1, top1_agreement=0.7),
}
"""Limits by the bits of the weights; None: float."""


class EncoderSession:
    """`model.onnx` of an exported encoder, executed by plain ONNX Runtime on the CPU."""

    def __init__(self, folder: Path) -> None:
        """Open a session over the folder's model."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(str(folder / "model.onnx"), options,
                                                         providers=["CPUExecutionProvider"])  # fmt: skip
        self.executed_by = f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, batch: Sequence[Encoding], pad: int, task: Task) -> list[Outputs]:
        """Return the outputs of each text of one right-padded batch, padding removed."""
        lengths = [len(text["input_ids"]) for text in batch]
        feeds = {}
        for name in self.inputs:
            rows = np.full((len(batch), max(lengths)), pad if name == "input_ids" else 0, np.int64)
            for row, text in zip(rows, batch, strict=True):
                row[: len(text["input_ids"])] = text.get(name, 0)
            feeds[name] = rows
        found = [torch.from_numpy(array).float() for array in self.session.run(list(task.outputs), feeds)]
        return [{name: array[i, :length] if task.per_token else array[i]
                 for name, array in zip(task.outputs, found, strict=True)}
                for i, length in enumerate(lengths)]  # fmt: skip


@dataclass(frozen=True)
class EncoderParity:
    """The common numbers of a parity check, and those of embeddings."""

    common: Parity
    """`max_abs_logit_error` is that of hidden states for a model without a head; its KL and top-1 that of rankings."""
    cosine_min: float | None
    """None for a model with a head."""
    cosine_mean: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the object that stands under `parity` in the manifest."""
        return {**asdict(self.common), "cosine_min": self.cosine_min, "cosine_mean": self.cosine_mean}


@torch.no_grad()
def reference_outputs(model: Any, text: Encoding, task: Task) -> Outputs:
    """Return transformers' outputs of one text, unpadded."""
    found = model(**{name: torch.tensor([values]) for name, values in text.items()})
    return {name: found[name][0].float() for name in task.outputs}


def encoder_parity(
    model: Any, session: EncoderSession, texts: Sequence[Encoding], task: Task, *, pooling: tuple[str, ...], pad: int,
    limits: EncoderLimits,
) -> EncoderParity:  # fmt: skip
    """Return how closely `session` follows `model`; the last of `texts` is run by itself, the others as one batch."""
    expected = [reference_outputs(model, text, task) for text in texts]
    found = [*session.run(texts[:-1], pad, task), *session.run(texts[-1:], pad, task)]
    values = [(e[name], f[name]) for e, f in zip(expected, found, strict=True) for name in task.outputs]
    if any(e.shape != f.shape for e, f in values):
        raise ValueError(f"outputs have the shapes {[(list(e.shape), list(f.shape)) for e, f in values]}")
    error = max(float((e - f).abs().max()) for e, f in values)
    largest = max(float(e.abs().max()) for e, _ in values)
    finite = all(bool(torch.isfinite(f).all()) for _, f in values)
    cosines: Tensor | None = None
    if task.outputs == (HIDDEN,):
        sides = [torch.stack([pooled(out[HIDDEN], pooling) for out in side]).double() for side in (expected, found)]
        cosines = functional.cosine_similarity(sides[0], sides[1], dim=-1)
        rows = [(_ranking(sides[0]), _ranking(sides[1]))]
    else:
        rows = _logit_rows(values)
    kl, agreement = _divergence(rows)
    lengths = [len(text["input_ids"]) for text in texts]
    return _verdict(limits, executed_by=session.executed_by, lengths=lengths, error=error, largest=largest,
                    cosines=cosines, kl=kl, agreement=agreement, finite=finite)  # fmt: skip


def pooled(hidden: Tensor, pooling: Sequence[str]) -> Tensor:
    """Return one vector of the hidden states [T, D] of a text, its parts concatenated.

    >>> pooled(torch.tensor([[1.0, 4.0], [3.0, 0.0]]), ("mean", "max")).tolist()
    [2.0, 2.0, 3.0, 4.0]
    """
    return torch.cat([POOLINGS[name](hidden) for name in pooling])


def _logit_rows(values: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the rows that are compared; of a head with one output, the scores of all texts are one row."""
    rows = [(e.double().reshape(-1, e.shape[-1]), f.double().reshape(-1, f.shape[-1])) for e, f in values]
    if all(e.shape[-1] > 1 for e, _ in rows):
        return rows
    expected, found = (torch.cat([row.flatten() for row in side])[None] for side in zip(*rows, strict=True))
    return [(expected, found)]


def _ranking(embeddings: Tensor) -> Tensor:
    """Return each text's scaled cosines with the other texts, [N, N - 1]."""
    unit = functional.normalize(embeddings, dim=-1)
    count = len(unit)
    return (_SCALE * unit @ unit.T)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)


def _divergence(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return mean KL(softmax of the first || of the second) and top-1 agreement over all rows."""
    kl, agreeing, count = 0.0, 0, 0
    for expected, actual in rows:
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        count += len(expected)
    return kl / count, agreeing / count


def _verdict(limits: EncoderLimits, *, executed_by: str, lengths: Sequence[int], error: float, largest: float,
             cosines: Tensor | None, kl: float, agreement: float, finite: bool) -> EncoderParity:  # fmt: skip
    held: dict[str, float] = {"top1_agreement": limits.top1_agreement}
    passed = finite and agreement >= limits.top1_agreement
    if limits.error_share is not None:
        held["max_abs_logit_error"] = limits.error_share * largest
        passed &= error <= held["max_abs_logit_error"]
    lowest = mean = None
    if cosines is None:
        held["kl_nats_per_token"] = limits.kl_nats
        passed &= kl <= limits.kl_nats
    else:
        lowest, mean = float(cosines.min()), float(cosines.mean())
        held |= {"cosine_min": limits.cosine_min, "cosine_mean": limits.cosine_mean}
        passed &= lowest >= limits.cosine_min and mean >= limits.cosine_mean
    numbers = Parity(max_abs_logit_error=error, kl_nats_per_token=max(0.0, kl), top1_agreement=agreement,
                     tokens_checked=sum(lengths), executed_by=executed_by, passed=bool(passed), limits=held,
                     longest_tokens=max(lengths))  # fmt: skip
    return EncoderParity(numbers, lowest, mean)
