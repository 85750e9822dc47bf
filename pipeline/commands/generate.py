"""`dwindle generate`: ask a model or an exported artifact, with an adapter, once or several times."""

from __future__ import annotations

import sys
from typing import Any

import click

from dwindle.errors import RecipeError
from dwindle.pipeline.commands.shared import device_option, emit, json_option, made_options, model_option, notify

__all__ = ["generate"]


@click.command()
@model_option
@click.argument("prompt", required=False)
@click.option("--adapter", metavar="DIR", help="Adapter of this very base: a folder, or a name in an artifact.")
@click.option("--best-of", metavar="N", help="Sample N answers and keep the best.  [default: 1]")
@click.option("--checker", metavar="SPEC", help="Judges answers: exact, contains, arithmetic, python, json, "
              "regex:PATTERN, script:FILE.")  # fmt: skip
@click.option("--verifier", metavar="NAME", help="Picks the best: checker, log-probability or reward:ADAPTER.  "
              "[default: the checker if there is one]")  # fmt: skip
@click.option("--task", metavar="FILE", help="Records with a `prompt` (jsonl, csv ...): reports accuracy against N.")
@click.option("--temperature", help="0 takes the most likely token.  [default: 0; with --best-of 0.8]")
@click.option("--top-p", help="Draw from the most likely tokens that sum to this share.  [default: 1]")
@click.option("--top-k", help="Draw from so many most likely tokens.  [default: all]")
@click.option("--max-tokens", help="Longest answer.  [default: 128]")
@click.option("--seed", help="Seed of the first answer; further ones count on.  [default: 0]")
@click.option("--template", help="chat, plain or auto: the chat template where there is one.  [default: auto]")
@click.option("--system", help="System message, with a chat template.")
@device_option
@json_option
def generate(model: str, prompt: str | None, adapter: str | None, checker: str | None, task: str | None,
             torch_device: str, as_json: bool, **values: Any) -> None:  # fmt: skip
    """Answer PROMPT (or what stdin holds, for `-`) with a model folder or an exported artifact.

    \b
    An exported model with one of its adapters:
      dwindle generate -m OUT/onnx "Once upon a time" --adapter stories
    Of eight answers the best, by a checker:
      dwindle generate -m OUT/onnx "Write a JSON object." --best-of 8 --checker json
    What sampling buys on a task, N = 1, 2, 4 ... 16:
      dwindle generate -m OUT/coreai --task sums.jsonl --checker exact --best-of 16
    """
    from dwindle.checkers import make_checker
    from dwindle.pipeline import generate as room

    if (prompt is None) == (task is None):
        raise RecipeError("generate: give a PROMPT or --task FILE, one of the two.")
    options = made_options(room.GenerateOptions, values, "generate")
    judge = None if checker is None else make_checker(checker)
    records = [{"prompt": sys.stdin.read() if prompt == "-" else prompt}] if task is None else room.task_records(task)
    notify(f"loading {model}")
    opened = room.opened(model, torch_device)
    asked, rows, seconds = room.answered(opened, records, options, adapter=adapter, checker=judge)
    found = {"executed_by": opened.runner.executed_by, "adapter": adapter, "seconds": seconds,
             "curve": room.curve_json(rows), "answers": [one.to_json() for one in asked]}  # fmt: skip
    if task is None:
        text = asked[0].candidates[asked[0].picked].text
    else:
        text = f"{room.curve_table(rows)}\n{len(asked)} prompts, {seconds:.1f} s, {opened.runner.executed_by}"
    emit(found, text, as_json)
