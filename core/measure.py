"""Quality of a model on one text: nats/token, bits/byte, KL from the teacher, top-1 agreement. One definition each.

The text is tokenised once as a whole (BOS first where the tokenizer adds one) to ids[0..S). With T the context,
window w reads ids[w*T : w*T + T] and predicts the tokens one to the right; the last window is shorter. So every
token but the first is predicted exactly once, S - 1 predictions in all:

    nats/token = 1/(S-1) * sum of -log q(ids[i+1] | window up to i)
    bits/byte  = (S-1) * nats/token / ln 2 / UTF-8 bytes of the text
    KL         = 1/(S-1) * sum over positions of sum over the vocabulary of p log(p/q), p teacher, q the model
    agreement  = share of positions where teacher and model have the same most probable token

Log-probabilities are fp32, as the models are; sums over positions are kept in float64.

A model whose vocabulary was cut reads the text in its own tokens, more of them where it lost some. Nats/token then
count other tokens than the full model's: bits/byte compare the two. A full teacher reads the same tokens by their old
ids, and KL and agreement are over the kept ones: p is the teacher's distribution given that the next token is one of
them (`vocabulary_map`).

Memory: the vocabulary is the large axis (T = 8192, V = 152k would be 5 GB of logits per window). The decoder's last
hidden state is taken whole, head and softmax run on slices of at most 64 MiB of logits. Peak above the models: the
activations of `batch_tokens` tokens plus about six slices (0.4 GB). The teacher's hidden states are kept from one
measurement to the next if all of them fit into 128 MiB; otherwise it is run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dwindle.errors import DataError, GateFailed, RecipeError, UnsupportedModel
from dwindle.report import Measurement
from dwindle.token_set import TokenSet
from dwindle.tokenization import require_tokenizer
from dwindle.vocabulary_map import VocabularyMap, map_between

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["LogitSlices", "Meter", "Quality", "logit_slices"]

_SLICE_BYTES = 64 << 20
_REMEMBERED_BYTES = 128 << 20

LogitSlices = Callable[[Tensor, int], Iterator[Tensor]]
"""(ids [B, T], n) -> fp32 logits [n, V] of the B * T positions in order, n at a time (the last slice shorter)."""


@dataclass(frozen=True)
class Quality:
    """The four measures. KL and agreement are None without a teacher, bits/byte when the text's bytes are unknown."""

    nats_per_token: float
    bits_per_byte: float | None
    kl_nats_per_token: float | None
    top1_agreement: float | None
    tokens: int
    """Predictions made."""


def logit_slices(bundle: ModelBundle, mapped: VocabularyMap | None = None) -> LogitSlices:
    """Return the function that gives a bundle's logits slice by slice, never [B, T, V] at once.

    With `mapped` the ids are those of a pruned vocabulary, and so are the logits: the full model's at the kept ids.
    """
    return lambda ids, n: _head_slices(bundle, _hidden(bundle, ids, mapped), n, mapped)


def _hidden(bundle: ModelBundle, ids: Tensor, mapped: VocabularyMap | None) -> Tensor:
    """Return the decoder's last hidden states [B * T, D].

    The mask of ones says that nothing is padded: without it transformers builds one against packed sequences, and
    attention pays for the masked half as well (a tenth of a training step).
    """
    ids = ids.to(bundle.model.device)
    if mapped is not None:
        ids = mapped.old_ids(ids)
    states = bundle.model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    found: Tensor = states.last_hidden_state.flatten(0, 1)
    return found


def _head_slices(bundle: ModelBundle, hidden: Tensor, n: int, mapped: VocabularyMap | None) -> Iterator[Tensor]:
    """Yield what follows the decoder in every family of the table: the head, then the soft cap where there is one."""
    head, cap = bundle.model.get_output_embeddings(), bundle.anatomy.traits.logit_softcap
    weight, bias = head.weight, getattr(head, "bias", None)  # a packed head is unpacked here, once for all slices
    if mapped is not None:
        rows = mapped.rows(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    for part in torch.split(hidden, n):
        logits = torch.nn.functional.linear(part, weight, bias).float()
        yield logits if cap is None else torch.tanh(logits / cap) * cap


def _remembering(bundle: ModelBundle, states: list[Tensor], mapped: VocabularyMap | None) -> LogitSlices:
    """Return slices of a bundle that is called on the same batches in the same order for every measurement."""
    position = 0

    def slices(ids: Tensor, n: int) -> Iterator[Tensor]:
        nonlocal position
        if position == len(states):
            states.append(_hidden(bundle, ids, mapped))
        position += 1
        yield from _head_slices(bundle, states[position - 1], n, mapped)

    return slices


@dataclass(frozen=True)
class Meter:
    """Measures models on one evaluation text, each against the same teacher."""

    evaluation: TokenSet
    """The text, tokenised once: ids [1, S], role `evaluation`."""
    teacher: ModelBundle | None = None
    """Reference of KL and agreement; None leaves them unmeasured."""
    context: int | None = None
    """Window length T; None is the context of the model that is measured."""
    batch_tokens: int = 4096
    """Tokens per forward pass: as many whole windows as they hold, at least one."""
    max_tokens: int | None = None
    """Measure the first so many tokens only; bits/byte is then None, because the bytes of a prefix of ids are not
    known here. `data.evaluation_set(..., max_tokens=...)` cuts text and ids together and keeps bits/byte."""
    _teacher_states: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Hidden states of the teacher by window length: the text's tokenizer, hence the map, is the same for all."""

    def __post_init__(self) -> None:
        self.evaluation.require("evaluation")
        if self.evaluation.ids.shape[0] != 1 or self.evaluation.tokens < 2:
            raise DataError(
                f"{self.evaluation.source}: the evaluation ids have the shape {tuple(self.evaluation.ids.shape)}; "
                "one row of at least 2 tokens is needed. Build them with data.evaluation_set."
            )
        for name, least in (("context", 1), ("batch_tokens", 1), ("max_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"meter: {name}={value} (needed: at least {least}).")

    def measure(self, bundle: ModelBundle) -> Measurement:
        """Return size and quality of a bundle.

        Raises DataError if its tokenizer is not the evaluation set's, UnsupportedModel if the teacher has another
        vocabulary and no map leads to it, RecipeError if the window is longer than a context.
        """
        context = bundle.anatomy.context if self.context is None else self.context
        mapped = self._checked(bundle, context)
        same = self.teacher is not None and self.teacher.model is bundle.model
        teacher = None if self.teacher is None or same else self._teacher_slices(self.teacher, context, mapped)
        models = [bundle.model] if teacher is None or self.teacher is None else [bundle.model, self.teacher.model]
        modes = [model.training for model in models]
        try:
            for model in models:
                model.eval()
            quality = self.quality(logit_slices(bundle), teacher, vocab=bundle.anatomy.vocab, context=context)
        finally:
            for model, mode in zip(models, modes, strict=True):
                model.train(mode)
        if same:
            quality = replace(quality, kl_nats_per_token=0.0, top1_agreement=1.0)
        return replace(
            bundle.size(),
            nats_per_token=quality.nats_per_token,
            bits_per_byte=quality.bits_per_byte,
            kl_nats_per_token=quality.kl_nats_per_token,
            top1_agreement=quality.top1_agreement,
        )

    @torch.inference_mode()
    def quality(self, model: LogitSlices, teacher: LogitSlices | None, *, vocab: int, context: int) -> Quality:
        """Return the measures of anything that gives logits; `measure` does this for a bundle."""
        slice_tokens = max(1, _SLICE_BYTES // (4 * vocab))
        total = torch.zeros(3, dtype=torch.float64)
        predictions = 0
        for ids, targets in self._batches(context):
            predictions += targets.numel()
            flat = torch.split(targets.flatten(), slice_tokens)
            if teacher is None:
                for logits, wanted in zip(model(ids, slice_tokens), flat, strict=True):
                    total[0] += _nats(torch.log_softmax(logits, -1), wanted)
            else:
                pairs = zip(model(ids, slice_tokens), teacher(ids, slice_tokens), flat, strict=True)
                for logits, reference, wanted in pairs:
                    total += _compare(logits, reference, wanted)
        nats, kl, agreed = total.tolist()
        if not math.isfinite(nats + kl):
            raise GateFailed(f"meter: logits on {self.evaluation.source} are no finite numbers, so the model (or the "
                             "teacher) has no quality to measure: its activations grow beyond float32.")  # fmt: skip
        whole = self.max_tokens is None or self.max_tokens >= self.evaluation.tokens
        return Quality(
            nats_per_token=nats / predictions,
            bits_per_byte=nats / math.log(2) / self.evaluation.text_bytes if whole else None,
            kl_nats_per_token=None if teacher is None else kl / predictions,
            top1_agreement=None if teacher is None else agreed / predictions,
            tokens=predictions,
        )

    def _teacher_slices(self, teacher: ModelBundle, context: int, mapped: VocabularyMap | None) -> LogitSlices:
        if 4 * self.evaluation.tokens * teacher.anatomy.width > _REMEMBERED_BYTES:
            return logit_slices(teacher, mapped)
        return _remembering(teacher, self._teacher_states.setdefault(context, []), mapped)

    def _batches(self, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs [B, T], targets [B, T]) over all windows; the last, shorter window comes alone."""
        ids = self.evaluation.ids[0, : self.max_tokens]
        whole = (len(ids) - 1) // context * context
        inputs, targets = ids[:whole].view(-1, context), ids[1 : whole + 1].view(-1, context)
        windows = max(1, self.batch_tokens // context)
        if whole:
            yield from zip(torch.split(inputs, windows), torch.split(targets, windows), strict=True)
        if whole < len(ids) - 1:
            yield ids[None, whole:-1], ids[None, whole + 1 :]

    def _checked(self, bundle: ModelBundle, context: int) -> VocabularyMap | None:
        """Return the map to the teacher's vocabulary, None where there is one; raise for what cannot be measured."""
        require_tokenizer(self.evaluation, bundle.tokenizer)
        named = [("model", bundle)] + ([("teacher", self.teacher)] if self.teacher is not None else [])
        short = [f"{name} has {b.anatomy.context:,}" for name, b in named if b.anatomy.context < context]
        if short:
            raise RecipeError(
                f"meter: windows of {context:,} tokens are longer than the context ({', '.join(short)}). "
                f"Set data.context={min(b.anatomy.context for _, b in named)}."
            )
        if self.teacher is None:
            return None
        try:
            return map_between(self.teacher, bundle)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"meter: {error} Or measure without a teacher.") from error


def _nats(log_q: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log q(target) in float64; log_q [n, V], targets [n]."""
    return -log_q.gather(1, targets.to(log_q.device)[:, None]).double().sum().cpu()


def _compare(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Return the float64 sums [nats, KL(reference || logits), agreements] over n positions; all [n, V]."""
    log_q, log_p = torch.log_softmax(logits, -1), torch.log_softmax(reference.to(logits.device), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().cpu()
    agreed = (log_q.argmax(-1) == log_p.argmax(-1)).double().sum().cpu()
    return torch.stack([_nats(log_q, targets), kl, agreed])
