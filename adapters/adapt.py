"""One adapter for one task, on the exact base it will be carried by.

The base stays as it is, codes and all; the adapter starts from the recovery adapter, as Apple's task adapters do (arXiv
2407.21075, section 5.1), or from nothing. It learns answers (`completion_loss`) or preferences (`preference_loss`),
between windows of general text against forgetting, and the state with the lowest held-out loss is what is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.adapter_card import AdapterCard
from dwindle.adapters.adapt_options import AdaptOptions, TaskObjective
from dwindle.adapters.adapter import Adapter
from dwindle.adapters.attach import adapter_config, attach, fill, target_names
from dwindle.adapters.completion_loss import CompletionLoss
from dwindle.adapters.early_stopping import BestAdapter
from dwindle.adapters.options import AdapterOptions
from dwindle.adapters.preference_loss import PreferenceLoss, reference_log_probs
from dwindle.adapters.recovery import adapted_size
from dwindle.adapters.task_metrics import task_metrics
from dwindle.adapters.task_records import TaskRecords
from dwindle.adapters.task_tokens import Encoded, TaskTokens, completion_rows, preference_rows, tokenised
from dwindle.clock import StepClock
from dwindle.errors import RecipeError
from dwindle.evaluation_mode import evaluating
from dwindle.report import Skipped, StepRecord
from dwindle.sharding import Processes
from dwindle.storage import hash_json
from dwindle.token_set import TokenSet
from dwindle.tokenization import require_tokenizer
from dwindle.train import Objective, TrainLine, TrainOptions, train

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["adapt", "task_quality"]

_REPLAY_TOKENS = 128
"""A window of general text is cut to the longest record, but to no less than this: rows share one width."""


def adapt(
    bundle: ModelBundle,
    options: AdaptOptions,
    *,
    records: TaskRecords,
    start: Adapter | None = None,
    general: TokenSet | None = None,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
) -> tuple[Adapter, StepRecord]:
    """Return a task adapter for `bundle` and its record, with the task's metrics before and after.

    `start` is the adapter that training begins with, `general` a training set of general text for replay. With a
    `folder` the run logs and checkpoints there and goes on from where it stopped. Raises RecipeError for options that
    do not go together or an adapter of another base, DataError for records that do not fit the context.
    """
    objective = options.objective_of(records.options)
    tokens = tokenised(bundle, records)
    with StepClock() as clock:
        adapted, config = _begun(bundle, options, start)
        run = _Run(bundle, adapted, options, objective, tokens, general)
        began = task_quality(bundle if start is None else adapted, records, tokens, options.held_out_records)
        identity = run.identity(start)
        best = BestAdapter(run.held_out_loss, options.patience, folder, hash_json(identity),
                           Processes.current(next(adapted.model.parameters()).device))  # fmt: skip
        with evaluating(adapted.model):
            best.start(adapted.model)
        result = train(adapted.model, run.objective, run.rows, run.training, folder=folder, on_step=on_step,
                       identity=identity, evaluate=best.evaluate, stop=best.stopped)  # fmt: skip
        made = Adapter(config, {name: tensor.half() for name, tensor in best.tensors.items()},
                       _card(bundle, options, config, objective, records, run.rows, start))  # fmt: skip
        fill(adapted.model, dict(made.tensors))
        ended = task_quality(adapted, records, tokens, options.held_out_records)
        made = replace(made, card=replace(made.card, metrics=ended))
        before = bundle.size() if start is None else adapted_size(bundle, start)
    details = {
        "task": records.options.name, "objective": objective, "rank": config.r, "adapter_bytes": made.bytes,
        "started_from": None if start is None else start.card.task,
        "records": len(tokens.train), "held_out": len(tokens.held_out), "replayed_windows": run.replayed,
        "metrics_before": began, "metrics_after": ended,
        "steps": result.steps, "planned_steps": run.training.steps, "best_step": best.best_step,
        "held_out_losses": {str(at): loss for at, loss in sorted(best.losses.items())},
        "first_loss": result.first_loss, "last_loss": result.last_loss,
        "history": [{"step": line.step, "loss": line.loss} for line in result.history],
    }  # fmt: skip
    skipped = tokens.skipped + run.skipped
    if best.best_step == 0:
        skipped += (Skipped(f"an improvement by adapt ({records.options.name})", "the held-out loss only rose; lower "
                            "the rate, or add records"),)  # fmt: skip
    return made, StepRecord("adapt", before, adapted_size(bundle, made), seconds=clock.seconds,
                            peak_rss_bytes=clock.peak_rss_bytes, details=details, skipped=skipped)  # fmt: skip


def task_quality(bundle: ModelBundle, records: TaskRecords, tokens: TaskTokens, most: int) -> dict[str, float]:
    """Return the task's metrics of a model on at most so many held-out records."""
    return task_metrics(bundle, records, tokens.encoder, _sample(tokens.held_out, most))


def _sample(examples: Sequence[Encoded], most: int) -> list[Encoded]:
    """Return at most so many examples, evenly spread; short answers where there are traces, which cost the most."""
    short = [e for e in examples if not e.record.is_trace] or list(examples)
    stride = max(1, -(-len(short) // most))
    return short[::stride]


def _begun(bundle: ModelBundle, options: AdaptOptions, start: Adapter | None) -> tuple[ModelBundle, Any]:
    """Return the base with the adapter that training begins with, trainable, and its configuration."""
    if start is None:
        names = target_names(bundle, options.targets, options.rank)
        config = adapter_config(bundle, options, names)
        return attach(bundle, config, options.seed), config
    _require_same_shape(options, start)
    config = copy.deepcopy(start.config)
    config.lora_dropout = options.dropout
    return replace(start, config=config).on(bundle), config


def _require_same_shape(options: AdaptOptions, start: Adapter) -> None:
    """Raise RecipeError if the options ask for another shape than the adapter to start from has."""
    default, config = AdapterOptions(), start.config
    kind = _kind(config)
    wrong = [f"{name}={asked} (it has {has})" for name, asked, usual, has in (
        ("rank", options.rank, default.rank, config.r), ("kind", options.kind, default.kind, kind),
        ("alpha", options.alpha, default.alpha, config.lora_alpha),
    ) if asked not in (usual, has)]  # fmt: skip
    if options.targets != default.targets:
        wrong.append(f"targets={', '.join(options.targets)} (it has {len(config.target_modules)} linears)")
    if wrong:
        raise RecipeError(
            f"adapt: an adapter keeps the shape of the one it starts from: {'; '.join(wrong)}. Leave these options "
            "out, or start without it."
        )


def _kind(config: Any) -> str:
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


class _Run:
    """Rows, objective and held-out loss of one training."""

    def __init__(self, base: ModelBundle, adapted: ModelBundle, options: AdaptOptions, objective: TaskObjective,
                 tokens: TaskTokens, general: TokenSet | None) -> None:  # fmt: skip
        self._base, self._options, self._kind = base, options, objective
        licence, kept = tokens.encoder.options.licence, _sample(tokens.held_out, options.held_out_records)
        self.skipped: tuple[Skipped, ...] = ()
        self.replayed = 0
        self.objective: Objective
        self._judge: Objective
        windows = self._replay(general, len(tokens.train), max(e.longest for e in tokens.train))
        if objective == "sft":
            self.rows = completion_rows(base, tokens.train, windows, licence)
            held_out = completion_rows(base, kept)
            self.objective = self._judge = CompletionLoss()
        else:
            self.rows = preference_rows(base, tokens.train, windows, licence)
            held_out = preference_rows(base, kept)
            held_to = adapted if options.reference == "start" else base
            with evaluating(held_to.model):
                size = max(1, options.batch_size // options.gradient_accumulation)
                pairs = self.rows.ids[: len(tokens.train)]
                known = [reference_log_probs(held_to.model, ids, size) for ids in (pairs, held_out.ids)]
            self.objective = PreferenceLoss(known[0], options.beta, options.nll_weight)
            self._judge = PreferenceLoss(known[1], options.beta)
        self._held_out, self._held_out_sha256 = held_out.ids, held_out.sha256
        self.training: TrainOptions = options.run_options(objective, *self.rows.ids.shape)

    def _replay(self, general: TokenSet | None, records: int, longest: int) -> Tensor | None:
        """Return the windows of general text that are trained on among so many records of so many tokens."""
        if general is None or not self._options.replay:
            return None
        require_tokenizer(general.require("train"), self._base.tokenizer)
        share = self._options.replay
        wanted = max(1, round(records * share / (1 - share)))
        width = min(self._base.anatomy.context, max(longest, _REPLAY_TOKENS))
        windows = general.ids[: min(wanted, len(general.ids)), :width]
        self.replayed = len(windows)
        if self.replayed < wanted:
            told = f"the general text has {self.replayed:,} windows, {wanted:,} were wanted"
            self.skipped += (Skipped("a part of the replay", told),)
        return windows

    def held_out_loss(self, model: nn.Module) -> float:
        """Return the mean loss of the held-out records: nats per answer token, or dpo's loss per pair."""
        device, size = next(model.parameters()).device, max(1, self._options.batch_size)
        total, count = 0.0, 0
        for part in torch.split(self._held_out, size):
            batch = part.to(device)
            if isinstance(self._judge, CompletionLoss):
                loss, tokens = self._judge.sums(model, batch)
                total, count = total + float(loss[0]), count + int(tokens[0])
            else:
                total, count = total + float(self._judge.loss(model, batch)[0]) * len(part), count + len(part)
        return total / count

    def identity(self, start: Adapter | None) -> dict[str, Any]:
        """Return what decides the numbers of this training besides options and rows."""
        o = self._options
        return {"base": self._base.content_sha256, "start": None if start is None else start.sha256,
                "objective": self._kind, "rank": o.rank, "kind": o.kind, "targets": list(o.targets),
                "alpha": o.scaled_by, "dropout": o.dropout, "beta": o.beta, "reference": o.reference,
                "nll_weight": o.nll_weight, "patience": o.patience, "rows": self.rows.sha256,
                "held_out": self._held_out_sha256,
                "evaluate_every": self.training.evaluate_every}  # fmt: skip


def _card(bundle: ModelBundle, options: AdaptOptions, config: Any, objective: TaskObjective, records: TaskRecords,
          rows: TokenSet, start: Adapter | None) -> AdapterCard:  # fmt: skip
    recorded: Mapping[str, Any] = {
        **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}, "objective": objective,
        "rank": config.r, "alpha": config.lora_alpha, "kind": _kind(config),
        **({} if start is None else {"targets": sorted(config.target_modules)}),
    }  # fmt: skip
    base = str(bundle.lineage.entries[0].options.get("model", "model")) if bundle.lineage.entries else "model"
    return AdapterCard(
        base_name=base, base_sha256=bundle.content_sha256, task=records.options.name, options=recorded,
        started_from=None if start is None else start.sha256, data={"train": rows.sha256}, licence=rows.licence,
    )  # fmt: skip
