r"""Recover what quantization lost: one adapter on the frozen codes, distilled from the unquantized model.

    minimise over A, B     KL(unquantized || quantized + s B A)      mean over positions, T^2 at temperature T

Apple ships its on-device model so: weights of 2 to 4 bits, on them an adapter that recovers the quality lost, and from
it every task adapter starts (arXiv 2407.21075, section 5.1). No label is needed, and any text will do that is like what
the model will read.

*Where to start.* LoRA begins without effect: B = 0. With `start="error"` it begins with the best rank-r part of what
was lost in the weights, with `start="outputs"` in what the linears give out on the text, with `start="fisher"` in the
divergence itself (`error_start`, `divergence_start`). The last is the default: pycode-6m at 2 bits and
rank 16 begins with 55 % of the KL gap closed, with 29 % from `outputs`. Begun so, an adapter wants a low rate: one at
which another may learn first undoes what it began with (`docs/experiments.md`).

*What it costs.* A rank-r adapter of float16 adds 16 r (O + I) bits to the O I weights of a linear: at r = 16 and width
2048 a quarter of a bit per weight, for small models far more. The record counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.adapter_card import AdapterCard
from dwindle.adapters.adapter import Adapter
from dwindle.adapters.attach import adapter_config, adapter_tensors, attach, fill, target_names
from dwindle.adapters.divergence_start import largest_divergences
from dwindle.adapters.error_start import largest_errors, largest_output_errors
from dwindle.adapters.options import RecoverOptions, Start
from dwindle.clock import StepClock
from dwindle.divergence import forward_kl
from dwindle.errors import RecipeError
from dwindle.measure import Meter
from dwindle.report import Measurement, StepRecord
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.train import TrainLine, train

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["adapted_size", "measured", "recover"]


class _FollowUnquantized:
    """The objective: mean KL(unquantized || adapted) over all predictions."""

    def __init__(self, teacher: ModelBundle, temperature: float) -> None:
        self._teacher, self._temperature = teacher.model.eval(), temperature

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss in nats per token of the B * (T - 1) predictions of `batch` [B, T]."""
        ids = batch[:, :-1]
        with torch.no_grad():
            wanted = _logits(self._teacher, ids)
        return forward_kl(_logits(model, ids), wanted, self._temperature), {}


def _logits(model: Any, ids: Tensor) -> Tensor:
    # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.flatten(0, 1)


def recover(
    bundle: ModelBundle,
    options: RecoverOptions,
    *,
    teacher: ModelBundle,
    train_tokens: TokenSet,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> tuple[Adapter, StepRecord]:
    """Return a recovery adapter for a quantized bundle, and its record (sizes and losses; a `Meter` fills in quality).

    With a `folder` the run logs and checkpoints there and goes on from where it stopped. Raises RecipeError, naming all
    reasons, when base, teacher and data do not go together.
    """
    _check(bundle, teacher, train_tokens)
    names = target_names(bundle, options.targets, options.rank)
    with StepClock() as clock:
        config = adapter_config(bundle, options, names)
        adapted = attach(bundle, config, options.seed)
        if options.begins != "zero":
            fill(adapted.model, _beginning(options.begins, bundle, teacher, adapted, names, train_tokens.ids[:, :-1]))
        identity = {"base": bundle.content_sha256, "teacher": teacher.content_sha256, "rank": options.rank,
                    "kind": options.kind, "targets": list(names), "alpha": options.scaled_by, "start": options.begins,
                    "temperature": options.temperature, "dropout": options.dropout}  # fmt: skip
        result = train(adapted.model, _FollowUnquantized(teacher, options.temperature), train_tokens,
                       options.training, folder=folder, on_step=on_step, identity=identity)  # fmt: skip
        tensors = {name: tensor.half() for name, tensor in adapter_tensors(adapted.model).items()}
        card = AdapterCard(
            base_name=_name_of(bundle), base_sha256=bundle.content_sha256, task="recovery", options=_recorded(options),
            data={"train": train_tokens.sha256, "teacher": teacher.content_sha256}, licence=train_tokens.licence,
        )  # fmt: skip
        made = Adapter(config, tensors, card)
        before, after = bundle.size(), adapted_size(bundle, made)
    details = {
        "rank": options.rank, "kind": options.kind, "linears": len(names), "adapter_bytes": made.bytes,
        "steps": result.steps, "tokens": result.tokens, "first_loss": result.first_loss, "last_loss": result.last_loss,
        "history": [{"step": line.step, "loss": line.loss} for line in result.history],
    }  # fmt: skip
    return made, StepRecord("recover", before, after, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes,
                            details=details)  # fmt: skip


def _beginning(
    start: Start, bundle: ModelBundle, teacher: ModelBundle, adapted: ModelBundle, names: list[str], ids: Tensor
) -> dict[str, Tensor]:
    if start == "error":
        return largest_errors(bundle, teacher, adapted, names)
    largest = largest_divergences if start == "fisher" else largest_output_errors
    return largest(bundle, teacher, adapted, names, ids)


def measured(
    adapter: Adapter, record: StepRecord, base: ModelBundle, meter: Meter
) -> tuple[Adapter, StepRecord, list[str]]:
    """Return adapter and record with the quality before and after in them, and both for a person.

    The KL gap is what quantization opened; `kl_closed` is the share of it that the adapter closes.
    """
    before, after = meter.measure(base), meter.measure(adapter.on(base))
    size = record.after
    after = replace(after, parameters=size.parameters, bytes=size.bytes, bits_per_weight=size.bits_per_weight,
                    bits_per_weight_linear=size.bits_per_weight_linear)  # fmt: skip
    lost, left = before.kl_nats_per_token, after.kl_nats_per_token
    metrics = {"nats_per_token": after.nats_per_token, "kl_nats_per_token": left, "kl_before": lost}
    if lost and left is not None:
        metrics["kl_closed"] = 1 - left / lost
    known = {name: value for name, value in metrics.items() if value is not None}
    told = [f"  quantized  {before.nats_per_token:.4f} nats/token, KL {lost:.4f}",
            f"  recovered  {after.nats_per_token:.4f} nats/token, KL {left:.4f}"
            + (f", {known['kl_closed']:.0%} of the gap closed" if "kl_closed" in known else "")]  # fmt: skip
    carded = replace(adapter, card=replace(adapter.card, metrics=known))
    return carded, replace(record, before=before, after=after), told


def adapted_size(base: ModelBundle, adapter: Adapter) -> Measurement:
    """Return the size of a base with an adapter beside it.

    The adapter's bytes count, its weights do not: bits per weight stay comparable with those of the base alone.
    """
    size, extra = base.size(), 8 * adapter.bytes
    linears = sum(weight for name in base.anatomy.linear_names() for weight in [_weights(base, name)])
    per_linear = size.bits_per_weight_linear
    return replace(
        size,
        bytes=size.bytes + adapter.bytes,
        bits_per_weight=size.bits_per_weight + extra / size.parameters,
        bits_per_weight_linear=None if per_linear is None else per_linear + extra / linears,
    )


def _weights(base: ModelBundle, name: str) -> int:
    linear: Any = base.model.get_submodule(name)
    return int(linear.in_features * linear.out_features)


def _name_of(bundle: ModelBundle) -> str:
    return str(bundle.lineage.entries[0].options.get("model", "model")) if bundle.lineage.entries else "model"


def _recorded(options: RecoverOptions) -> dict[str, Any]:
    return {**asdict(options), "betas": list(options.betas), "targets": list(options.targets),
            "trackers": list(options.trackers)}  # fmt: skip


def _check(bundle: ModelBundle, teacher: ModelBundle, tokens: TokenSet) -> None:
    """Raise RecipeError with every reason why nothing can be recovered here."""
    tokens.require("train")
    wrong = []
    if not bundle.quantized:
        wrong.append("the model is not quantized (nothing was lost; distill trains a float student)")
    if teacher.quantized:
        wrong.append("the teacher is quantized (give the model as it was before)")
    for name, of_base, of_teacher in (
        ("vocabulary", bundle.anatomy.vocab, teacher.anatomy.vocab),
        ("width", bundle.anatomy.width, teacher.anatomy.width),
        ("number of layers", bundle.anatomy.layers, teacher.anatomy.layers),
    ):
        if of_base != of_teacher:
            wrong.append(f"the {name} is {of_base:,}, the teacher's {of_teacher:,}")
    hashes = {"model": encoding_sha256(bundle.tokenizer), "teacher": encoding_sha256(teacher.tokenizer),
              "data": tokens.tokenizer_sha256}  # fmt: skip
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} {sha[:12]}" for name, sha in hashes.items())
        wrong.append(f"the tokenizers differ: {told}")
    if (window := tokens.ids.shape[-1] - 1) > bundle.anatomy.context:
        wrong.append(f"windows predict {window:,} tokens, the context is {bundle.anatomy.context:,}")
    if wrong:
        raise RecipeError(f"recover: {'; '.join(wrong)}.")
