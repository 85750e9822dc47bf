"""A tiny language model with the shape of a decoder, and a run of it in two processes (started by torchrun)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dwindle import checkpoint
from dwindle.errors import RecipeError
from dwindle.token_set import TokenSet
from dwindle.train import TrainLine, TrainOptions, train

VOCAB, WIDTH, TOKENS = 17, 8, 12
OPTIONS = TrainOptions(
    steps=12, batch_size=8, gradient_accumulation=2, learning_rate=1e-2, checkpoint_every=5, log_every=1
)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
        return hidden + self.dropout(torch.tanh(self.mix(self.norm(mean))))


class TinyModel(nn.Module):
    """Embedding, two blocks, norm, and a head tied to the embedding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(dropout), Block(dropout)])
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class TinyLoss:
    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss, {"twice": 2 * loss.item()}


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Callable[[TrainLine], None]:
    def listen(line: TrainLine) -> None:
        if line.step == step:
            raise Interrupted

    return listen


def tiny_tokens(windows: int = 21, sha256: str = "0" * 64) -> TokenSet:
    ids = torch.randint(0, VOCAB, (windows, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[:, 1::2] = (ids[:, ::2] + 1) % VOCAB
    return TokenSet(ids, "train", "tiny.txt", sha256, 1000, "1" * 64)


def outcome(folder: Path | None, options: TrainOptions = OPTIONS, stop: int | None = None) -> dict[str, object]:
    """Return losses, norms and final weights of a run, as JSON."""
    model = TinyModel()
    listen = None if stop is None else interrupt_at(stop)
    try:
        result = train(model, TinyLoss(), tiny_tokens(), options, folder=folder, on_step=listen)
    except Interrupted:
        return {}
    lines = [asdict(line) for line in result.history]
    for line in lines:
        del line["seconds"], line["tokens_per_second"]
    weights = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    return {"lines": lines, "weights": weights, "kind": type(model).__name__, "buffer": model.calls.item()}


def main() -> None:
    """Run whole, interrupted and resumed, and from a checkpoint of one process; write each outcome per rank."""
    folder = Path(sys.argv[1])
    found = {"whole": outcome(None)}
    outcome(folder / "two", stop=8)
    found["resumed"] = outcome(folder / "two")
    found["from_one"] = outcome(folder / "one")
    outcome(folder / "two_for_one", stop=8)
    try:
        outcome(None, replace(OPTIONS, batch_size=6))
    except RecipeError as error:
        found["uneven"] = {"error": str(error)}
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def kill_in_a_checkpoint(folder: Path) -> None:
    """Train until the second checkpoint is half written, then die at once."""
    write_index = checkpoint.write_json

    def die_later(place: Path, data: Mapping[str, object]) -> None:
        if data["step"] == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        write_index(place, data)

    checkpoint.write_json = die_later
    outcome(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:] == ["kill"]:
        kill_in_a_checkpoint(Path(sys.argv[1]))
    main()
