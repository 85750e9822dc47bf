r"""Trains the embedded teacher: stories in, a 3.7M-parameter Llama folder out, the same bits for the same seed.

    python -m dwindle.starter.train_teacher -o first --compile
    python -m dwindle.starter.train_teacher -o starter/teacher --start first --seed 1 --steps 800 --learning-rate 1e-3 \
        --compile

The teacher is a stock `LlamaForCausalLM` so that everything that reads a Hugging Face folder reads it. Its feed-forward
layers are wide for its hidden size (4x, and three matrices each) because that is what the demo prunes. It learns from
documents packed end to end, a document being `<s>` text `</s>`, and starts with heads that copy (`wired_start.py`). The
loop is the product's own, `dwindle.train`.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dwindle.data.document import Document
from dwindle.data.packing import pack
from dwindle.starter.build_tokenizer import build_tokenizer
from dwindle.starter.tasks import corpus
from dwindle.starter.wired_start import wire_copying
from dwindle.token_set import TokenSet
from dwindle.train import NextToken, Objective, TrainLine, TrainOptions, TrainResult, train

__all__ = ["CompiledNextToken", "TeacherOptions", "build_model", "export", "train_teacher", "training_tokens"]

LOG = "training_log.jsonl"  # one line per 20 steps; a run that goes on from a teacher keeps that teacher's lines
TOKENIZER_CORPUS = 999  # the corpus seed that trains the tokenizer; the model's own text starts at `seed`


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher's shape and its run. The defaults are the teacher that is shipped."""

    vocabulary: int = 2048
    """Tokens of the tokenizer."""
    hidden: int = 192
    """Width of the residual stream."""
    feed_forward: int = 768
    """Width of the feed-forward layers, which the demo prunes."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 6
    """Query heads of 32 channels; half as many key-value heads."""
    context: int = 512
    """Tokens the model can read."""
    tokenizer_documents: int = 6000
    """Documents that train the tokenizer."""
    documents: int = 11_702
    """Training documents, about 185 tokens each; a longer run reads them again in another order."""
    steps: int = 1700
    """Optimizer steps."""
    warmup_steps: int = 60
    """Steps with a rising learning rate."""
    batch_size: int = 4
    """Windows of `context` tokens per step."""
    learning_rate: float = 1.5e-3
    """Peak of the schedule."""
    seed: int = 0
    """Weights at the start, order of the windows, and the corpus."""
    start: Path | None = None
    """A teacher's folder to go on from, tokenizer and all, instead of the wired start."""
    wired: bool = True
    """Start with heads that copy, see `wired_start.py`."""
    compiled: bool = False
    """Run the loss through torch.compile: a quarter faster on CPU, needs a C++ compiler, rounds differently."""


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return NextToken().loss(model, batch)[0]


class CompiledNextToken:
    """`NextToken` through torch.compile; the values differ in rounding alone."""

    def __init__(self) -> None:
        self._loss = torch.compile(_loss, dynamic=False)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the mean cross-entropy of the next token in nats."""
        return self._loss(model, batch), {}


def build_model(options: TeacherOptions, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained teacher; the options' seed decides its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.feed_forward,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 2,
        head_dim=32,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config)
    if options.wired:
        wire_copying(model, options.seed)
    return model


def training_tokens(tokenizer: PreTrainedTokenizerBase, options: TeacherOptions) -> TokenSet:
    """Return the training text, packed as the product packs any corpus."""
    source = f"story world, corpus {options.seed}"
    documents = [Document(text, source) for text in corpus(options.seed, options.documents)]
    return pack(documents, tokenizer, role="train", context=options.context, seed=options.seed)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, log: str = "") -> None:
    """Write an fp16 Hugging Face folder beside `folder` and rename it, so that a reader never sees half of one."""
    fresh, stale = folder.with_name(f".{folder.name}-new"), folder.with_name(f".{folder.name}-old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    half = copy.deepcopy(model).half().eval()
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    half.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if log:
        (fresh / LOG).write_text(log, encoding="utf-8")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def _begin(options: TeacherOptions) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return the model and tokenizer a run starts from."""
    if options.start is not None:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(options.start)
    texts = corpus(TOKENIZER_CORPUS, options.tokenizer_documents)
    tokenizer = build_tokenizer(texts, options.vocabulary, options.context)
    return build_model(options, tokenizer), tokenizer


def train_teacher(
    options: TeacherOptions, output: Path, *, work: Path | None = None, export_every: int = 0
) -> tuple[LlamaForCausalLM, TrainResult]:
    """Train a teacher and write it to `output`; return it with how the run went.

    Args:
        options: Shape and run.
        output: The model folder, replaced as a whole.
        work: Where checkpoints and run.jsonl go; a killed run goes on from there. None keeps nothing.
        export_every: Steps between usable folders written to `output` while training; 0 for the end alone.
    """
    model, tokenizer = _begin(options)
    earlier = ""
    if options.start is not None and (options.start / LOG).exists():
        earlier = (options.start / LOG).read_text(encoding="utf-8")
    objective: Objective = CompiledNextToken() if options.compiled else NextToken()

    def on_step(line: TrainLine) -> None:
        if line.step % 20 == 0:
            click.echo(f"step {line.step}/{options.steps} loss {line.loss:.3f} {line.seconds:.0f} s", err=True)
        if export_every and line.step % export_every == 0 and line.step < options.steps:
            export(model, tokenizer, output)

    run = TrainOptions(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_share=min(options.warmup_steps / options.steps, 0.5),
        decay_share=0.3,
        seed=options.seed,
        precision="bf16",
        log_every=20,
        checkpoint_every=200,
    )
    result = train(model, objective, training_tokens(tokenizer, options), run, folder=work, on_step=on_step)
    export(model, tokenizer, output, earlier + "".join(json.dumps(asdict(line)) + "\n" for line in result.history))
    return model, result


@click.command(context_settings={"show_default": True})
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The model folder to write.")
@click.option("--steps", type=click.IntRange(1), default=TeacherOptions.steps, help="Optimizer steps.")
@click.option("--seed", type=click.IntRange(0), default=TeacherOptions.seed, help="Weights, order and corpus.")
@click.option("--learning-rate", type=float, default=TeacherOptions.learning_rate, help="Peak learning rate.")
@click.option("--start", type=click.Path(exists=True, path_type=Path), default=None, help="A teacher to go on from.")
@click.option("--work", type=click.Path(path_type=Path), default=None, help="Folder for checkpoints and the log.")
@click.option("--export-every", type=click.IntRange(0), default=0, help="Steps between folders on the way; 0: none.")
@click.option("--compile/--no-compile", "compiled", default=False, help="torch.compile: faster, rounds differently.")
def main(output: Path, work: Path | None, export_every: int, **chosen: Any) -> None:
    """Train the embedded teacher and write it as a Hugging Face folder."""
    _, result = train_teacher(TeacherOptions(**chosen), output, work=work, export_every=export_every)
    click.echo(f"{result.tokens:,} tokens in {result.seconds:.0f} s, last loss {result.last_loss:.4f} nats/token")


if __name__ == "__main__":
    main()
