"""The one training loop. Distillation, masks, adapters and quantization-aware training differ in their objective only.

    rate(s) = learning_rate * schedule(s)          g = mean over the batch's windows of d loss / d weights
    g <- g * min(1, clip_norm / |g|)               weights <- AdamW(weights, g, rate(s))

AdamW is Loshchilov and Hutter 2019 (arXiv 1711.05101); weights with fewer than two axes (norms, biases) do not
decay. The loop is PyTorch's own and not `transformers.Trainer`, because that shards on CUDA only and hands losses
logits where fused ones need hidden states.

Exact resume: the data order (`data_order`), the rate (`schedules`) and torch's random state, set before each forward
pass, are pure functions of seed and step; weights and moments come from the checkpoint. On a CPU a resumed run ends
with the same bits as an undisturbed one.

Under `torchrun` the batch is cut over the processes and the model is sharded (`sharding`). The batch is the same as in
one process, so the gradient is too, up to the order of additions. A `TokenSet` row of T tokens predicts T - 1: the
objective gets [B, T] and shifts inside.

Memory over the weights: one gradient and two fp32 moments per trainable weight, and the activations of one piece;
a checkpoint adds no copy.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dwindle.checkpoint import Checkpoints
from dwindle.data_order import mixed_seed, windows_of_step
from dwindle.errors import DataError, RecipeError
from dwindle.evaluation_mode import evaluating
from dwindle.pieces import Pieces
from dwindle.progress import progress_bar
from dwindle.recomputation import recomputed
from dwindle.resources import is_out_of_memory, require_memory
from dwindle.schedules import schedule_of
from dwindle.sharding import Processes, Sharded, repeated_layers, whole
from dwindle.storage import hash_json, require_space
from dwindle.token_set import TokenSet
from dwindle.trackers import Tracker, open_trackers
from dwindle.train_guard import require_finite, require_no_divergence
from dwindle.train_log import RunProgress, TrainLine, TrainResult, append_line, cut_log
from dwindle.train_options import TrainOptions
from dwindle.window_order import WindowOrder

__all__ = [
    "CountedObjective",
    "Evaluate",
    "NextToken",
    "Objective",
    "SteppedObjective",
    "TrainLine",
    "TrainOptions",
    "TrainResult",
    "train",
]


class Objective(Protocol):
    """What is minimised."""

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean loss over the predicted tokens of `batch` [B, T], and named parts of it for the log.

        `model` must be called as a whole: under `torchrun` it is a sharded twin of the module given to `train`, and
        its weights are gathered in its forward pass only. Random draws come from torch's default generator.
        """
        ...


Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
"""Measures a model in training after so many steps: named numbers. Under `torchrun` it must call the model as a whole,
in every process."""


@runtime_checkable
class SteppedObjective(Objective, Protocol):
    """An objective that changes over the run."""

    def at(self, step: int, steps: int) -> Objective:
        """Return the objective of optimizer step `step` (0-based) of `steps`: a pure function, so a run can resume."""
        ...


@runtime_checkable
class CountedObjective(Objective, Protocol):
    """An objective whose mean runs over something that rows hold unequal numbers of, such as the tokens of answers."""

    def over(self, batch: Tensor, pieces: int) -> Objective:
        """Return the objective of one of `pieces` equal parts of `batch`: the mean over them is the loss of all."""
        ...


class NextToken:
    """Cross-entropy of the next token in nats: the plain language-model objective."""

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Return the mean of -log p(token t+1 | tokens up to t) over B x (T - 1) predictions."""
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), {}


def _optimizer(trainable: list[nn.Parameter], options: TrainOptions) -> torch.optim.AdamW:
    """Return AdamW with its moments in place, so that a checkpoint can be loaded into them."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.learning_rate, betas=options.betas, fused=True
    )
    for parameter in trainable:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class _Run:
    """Model, optimizer and data of one call of `train`, and what one step does with them."""

    def __init__(
        self, model: nn.Module, objective: Objective, tokens: TokenSet, options: TrainOptions, processes: Processes,
        order: WindowOrder | None = None,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.tokens = model, objective, tokens
        self.options, self.processes, self.order = options, processes, order
        self.windows, self.window_tokens = tokens.ids.shape
        self.steps = options.total_steps(self.windows, self.window_tokens)
        self.schedule = schedule_of(options.schedule, options.warmup_share, options.decay_share, options.final_share)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.device = self.trainable[0].device
        self.optimizer = _optimizer(self.trainable, options)
        self.pieces = Pieces(options.gradient_accumulation, options.batch_size, processes.world)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers of this run, but for the weights it starts from."""
        free = {"tokens", "steps", "checkpoint_every", "checkpoints_kept", "log_every", "trackers", "evaluate_every",
                "divergence_margin", "activation_checkpointing"}  # fmt: skip
        chosen = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name not in free}
        shapes = [[name, list(p.shape), p.requires_grad] for name, p in self.model.named_parameters()]
        return {**chosen, "steps": self.steps, "token_set": self.tokens.sha256, "model": hash_json(shapes)}

    def gradients(self, step: int) -> tuple[float, dict[str, float]]:
        """Add the gradient of step `step`'s batch to the weights; return its mean loss and parts.

        Where memory runs out, the batch is cut into more pieces and the step begins again (`pieces`).
        """
        windows = self._windows(step)  # once: an order remembers what it gave
        while True:
            try:
                return self._gradients(step, windows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error) or type(error).__name__
            self.optimizer.zero_grad(set_to_none=True)
            self.pieces.shrink(why, self.window_tokens)

    def _windows(self, step: int) -> Tensor:
        """Return the numbers of the windows of a batch."""
        if self.order is None:
            return windows_of_step(self.windows, self.options.batch_size, self.options.seed, step)
        return self.order.windows(self.options.batch_size, step)

    def _gradients(self, step: int, windows: Tensor) -> tuple[float, dict[str, float]]:
        options, rank, world = self.options, self.processes.rank, self.processes.world
        objective = self.objective
        if isinstance(objective, SteppedObjective):
            objective = objective.at(step, self.steps)
        if isinstance(objective, CountedObjective):
            objective = objective.over(self.tokens.ids[windows].long(), self.pieces.count * world)
        pieces = windows.view(self.pieces.count, world, -1)[:, rank]
        total, parts = 0.0, dict[str, float]()
        for index, piece in enumerate(pieces):
            torch.manual_seed(mixed_seed(options.seed, step, index * world + rank))
            batch = self.tokens.ids[piece].to(self.device, torch.long)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss, named = objective.loss(self.model, batch)
            (loss / len(pieces)).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / len(pieces)
            for name, value in named.items():
                parts[name] = parts.get(name, 0.0) + float(value) / len(pieces)
        total, *means = self.processes.mean([total, *parts.values()])
        return total, dict(zip(parts, means, strict=True))

    def step(self, step: int) -> tuple[float, dict[str, float], float, float]:
        """Take optimizer step `step` (0-based); return loss, parts, learning rate and the norm before clipping."""
        rate = self.options.learning_rate * self.schedule.scale(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, parts = self.gradients(step)
        limit = math.inf if self.options.clip_norm is None else self.options.clip_norm
        norm = float(whole(nn.utils.clip_grad_norm_(self.trainable, limit)))
        require_finite(loss, norm, step, self.steps, self.options)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, parts, rate, norm

    def evaluation(self, evaluate: Evaluate, step: int) -> dict[str, float]:
        """Return what `evaluate` says of the model as it is now; training mode comes back."""
        with evaluating(self.model), torch.no_grad():
            return {f"evaluation_{name}": float(value) for name, value in evaluate(self.model, step).items()}

    def ordered(self, step: int) -> dict[str, Any] | None:
        """Return the state of the order after so many steps, changed if it is time; None without one."""
        if self.order is None:
            return None
        if self.order.due(step) and step < self.steps:
            with evaluating(self.model), torch.no_grad():
                self.order.update(self.model, step)
        return self.order.state()


def _content_sum(model: nn.Module) -> int:
    """Return the sum of all weights' and buffers' bit patterns, read as whole numbers: exact in any order, no copy."""
    whole_numbers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sum(
        int(value.detach().contiguous().view(whole_numbers[value.element_size()]).sum(dtype=torch.int64))
        for value in model.state_dict().values()
        if isinstance(value, Tensor) and value.numel() and value.element_size() in whole_numbers
    )


def _check(model: nn.Module, tokens: TokenSet, options: TrainOptions, world: int, ordered: bool) -> None:
    tokens.require("train")
    if tokens.mixture is not None and not ordered:
        raise RecipeError(f"{tokens.source}: the shares of this set are to be learned (data.learn_weights_every), and "
                          "only distillation does that. Leave the key out.")  # fmt: skip
    if tokens.ids.ndim != 2 or tokens.ids.shape[0] < 1 or tokens.ids.shape[1] < 2:
        raise DataError(
            f"{tokens.source}: the token set has the shape {tuple(tokens.ids.shape)}; training needs at least "
            "one window of at least 2 tokens. Add text or take a shorter context."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError("train: the model has no trainable weights. Unfreeze some, or attach an adapter first.")
    if options.batch_size % (options.gradient_accumulation * world):
        raise RecipeError(
            f"train: batch_size={options.batch_size} cannot be cut into gradient_accumulation="
            f"{options.gradient_accumulation} pieces for each of {world} processes. Take a multiple of "
            f"{options.gradient_accumulation * world}."
        )


def _require_room(model: nn.Module, world: int) -> None:
    """Raise DoesNotFit if gradients and moments, which are the least a step needs, have no room in memory."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trainable[0].device.type != "cpu":
        return
    weights = sum(p.numel() * p.element_size() for p in trainable) // world
    require_memory(f"train: {sum(p.numel() for p in trainable):,} trainable weights",
                   {"gradients": weights, "moments": 2 * weights},
                   "Train fewer weights (an adapter), or take more machines or memory.")  # fmt: skip


def _resume(run: _Run, folder: Path | None, fingerprint: Mapping[str, Any]) -> tuple[RunProgress, Checkpoints | None]:
    """Return where the run stands; weights and moments are loaded if `folder` holds a checkpoint."""
    progress = RunProgress(run.options.batch_size * run.window_tokens)
    if folder is None:
        return progress, None
    checkpoints = Checkpoints(folder, fingerprint, run.options.checkpoints_kept, run.processes)
    needed = 3 * sum(p.numel() * p.element_size() for p in run.trainable)
    require_space(folder, needed * (run.options.checkpoints_kept + 1))
    if (found := checkpoints.newest()) is not None:
        checkpoints.load(found, run.model, run.optimizer)
        progress = RunProgress.from_json(found.progress)
        if run.order is not None and progress.order is not None:
            run.order.restore(progress.order)
    if run.processes.first:
        cut_log(folder / "run.jsonl", progress.step)
    return progress, checkpoints


@contextlib.contextmanager
def _training(run: _Run) -> Iterator[None]:
    """Training mode and a random state of our own; both are put back, and no gradient stays behind."""
    modes = {module: module.training for module in run.model.modules()}
    run.model.train()
    layers = repeated_layers(run.model) if run.options.activation_checkpointing else []
    try:
        with recomputed(layers), torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        for module, mode in modes.items():
            module.training = mode


def _loop(
    run: _Run,
    progress: RunProgress,
    checkpoints: Checkpoints | None,
    listeners: list[Callable[[TrainLine], None]],
    line_listeners: list[Callable[[TrainLine], None]],
    evaluate: Evaluate | None,
    stop: Callable[[int], bool],
) -> None:
    """Take the steps that are left; tell `listeners` of each one, and `line_listeners` of each log line."""
    while progress.step < run.steps and not stop(progress.step):
        began = time.perf_counter()
        loss, parts, rate, norm = run.step(progress.step)
        now = progress.add(loss, parts, rate, norm, time.perf_counter() - began)
        progress.order = run.ordered(progress.step)
        for listener in listeners:
            listener(now)
        last = progress.step == run.steps
        closes = last or progress.step % run.options.log_every == 0
        saves = checkpoints is not None and (last or progress.step % run.options.checkpoint_every == 0)
        if closes or saves:
            require_no_divergence(progress, run.options)
        if closes:
            due = evaluate is not None and (last or progress.evaluation_due(run.options.evaluate_every))
            line = progress.close_line(now, run.evaluation(evaluate, progress.step) if due and evaluate else None)
            for listener in line_listeners:
                listener(line)
        if checkpoints is not None and (saves or stop(progress.step)):
            checkpoints.save(progress.step, run.model, run.optimizer, progress.to_json())


def train(
    model: nn.Module,
    objective: Objective,
    tokens: TokenSet,
    options: TrainOptions,
    *,
    folder: Path | None = None,
    on_step: Callable[[TrainLine], None] | None = None,
    identity: Mapping[str, object] | None = None,
    evaluate: Evaluate | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    order: WindowOrder | None = None,
) -> TrainResult:
    """Train `model` in place and return how it went. Under `torchrun` every process calls this alike.

    With a `folder`, run.jsonl and checkpoints are written there, and a call with the same arguments goes on from the
    newest whole checkpoint; a finished run only loads its weights. A checkpoint is refused if options, data, starting
    weights or `identity` differ: JSON values for what the loop cannot see, such as the losses and the teacher.
    `on_step` gets every step's own values, in every process. `evaluate` is called every `evaluate_every` steps and
    after the last, in every process, with the module in evaluation mode (under `torchrun` the sharded one); what it
    returns stands in the log, each name behind `evaluation_`. `stop` is asked before every step, with the number of
    steps taken, whether the run ends here; it must say the same in every process and in a resumed run. An `order`
    chooses the windows (`window_order`).

    Raises DataError for a token set of another role or without windows, RecipeError if nothing is trainable, the batch
    cannot be cut, or the folder holds another run, DoesNotFit when memory cannot hold the state or one window,
    MissingExtra for a tracker that is not installed, and GateFailed when a loss or gradient is no finite number, or
    the loss runs away (`train_guard`).
    """
    processes = Processes.current(next(model.parameters()).device)
    _check(model, tokens, options, processes.world, order is not None)
    _require_room(model, processes.world)
    start = {} if folder is None else {"start_weights": _content_sum(model), **(identity or {})}
    sharded = Sharded(model, processes)
    try:
        run = _Run(sharded.module, objective, tokens, options, processes, order)
        progress, checkpoints = _resume(run, folder, {**run.settings(), **start})
        names = options.trackers if processes.first and progress.step < run.steps else ()
        trackers: list[Tracker] = open_trackers(names, folder, run.settings(), progress.step)
        line_listeners: list[Callable[[TrainLine], None]] = [tracker.log for tracker in trackers]
        if folder is not None and processes.first:
            log = folder / "run.jsonl"
            line_listeners.append(lambda line: append_line(log, line))
        try:
            with _training(run), progress_bar(progress.step, run.steps, processes.first) as draw:
                told = [draw, *([] if on_step is None else [on_step])]
                _loop(run, progress, checkpoints, told, line_listeners, evaluate, stop)
        finally:
            for tracker in trackers:
                tracker.close()
        sharded.finish()
    finally:
        sharded.release()
    processes.wait()
    return progress.result()
