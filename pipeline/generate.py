"""Try a model or an exported artifact, with an adapter: one answer, the best of several, or a task file's accuracy.

The same sampling and the same adapter whatever executes: transformers, ONNX Runtime, Apple's Core AI runtime, or
dwindle's evaluator of a Core ML package. An adapter's folder as it was trained is packaged on the way where the runtime
needs a file of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_rows import read_rows
from dwindle.adapters.task_tokens import Encoder
from dwindle.bundle import ModelBundle
from dwindle.checkers import Checker
from dwindle.errors import DataError, RecipeError, UnsupportedModel, did_you_mean, offenders
from dwindle.export import open_artifact, package_adapter
from dwindle.export.adapter_package import ADAPTERS
from dwindle.export.artefact import MANIFEST_FILE, read_manifest
from dwindle.export.backends import ExecutedRunner
from dwindle.export.best_of import Candidate, Curve, best, curve, reward_scores
from dwindle.export.generation import sampled_answers
from dwindle.export.torch_runner import TorchRunner
from dwindle.sampling import SamplingOptions
from dwindle.tokenizer_files import load_tokenizer

__all__ = [
    "VERIFIERS",
    "Asked",
    "GenerateOptions",
    "Opened",
    "answered",
    "curve_json",
    "curve_table",
    "opened",
    "task_records",
]

VERIFIERS = ("checker", "log-probability", "reward:ADAPTER")


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """What is asked of the model."""

    best_of: int = 1
    """Answers sampled for each prompt."""
    verifier: str | None = None
    """What picks the best: `checker`, `log-probability`, or `reward:` and an adapter's folder or name. None: the
    checker where there is one, else log-probability."""
    template: str = "auto"
    """`chat`, `plain`, or `auto`: the chat template where the tokenizer has one."""
    system: str | None = None
    """System message, with a chat template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = []
        if self.best_of < 1:
            wrong.append(f"best_of={self.best_of} (needed: at least 1)")
        if self.best_of > 1 and self.temperature == 0:
            wrong.append(f"best_of={self.best_of} with temperature=0 makes equal answers (needed: above 0)")
        known = self.verifier in (None, "checker", "log-probability")
        if not known and not str(self.verifier).startswith("reward:"):
            wrong.append(f"verifier={self.verifier!r} is unknown{did_you_mean(str(self.verifier), VERIFIERS)}")
        if wrong:
            raise RecipeError(f"generate: {'; '.join(wrong)}.")


@dataclass
class Opened:
    """A model that can be asked."""

    runner: ExecutedRunner
    tokenizer: Any
    ends: frozenset[int]
    artefact: Path | None

    def adapter(self, given: str) -> str:
        """Load an adapter by its folder, or by its name in the artifact; return its name."""
        inside = (
            {} if self.artefact is None else {p.name: p for p in (self.artefact / ADAPTERS).glob("*") if p.is_dir()}
        )
        folder = inside.get(given, Path(given))
        if not folder.is_dir():
            hint = did_you_mean(given, inside) if inside else ""
            raise RecipeError(f"adapter {given!r} is no folder, and none of the artifact's own{hint}.")
        try:
            return self.runner.load_adapter(folder)
        except UnsupportedModel as error:
            if self.artefact is None or not (folder / "adapter_config.json").is_file() or "holds no" not in str(error):
                raise
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / folder.resolve().name
            package_adapter(folder, [self.artefact], place)
            return self.runner.load_adapter(place)


@dataclass(frozen=True)
class Asked:
    """The answers to one prompt, and which of them was picked."""

    prompt: str
    candidates: tuple[Candidate, ...]
    picked: int

    def to_json(self) -> dict[str, Any]:
        """Return what a program reads."""
        rows = [{"text": one.text, "tokens": one.answer.tokens, "ended": one.answer.end is not None,
                 "mean_log_probability": one.answer.mean_log_probability,
                 **({} if one.verdict is None else {"passed": one.verdict.passed, "why": one.verdict.why}),
                 **({} if one.reward is None else {"reward": one.reward})}
                for one in self.candidates]  # fmt: skip
        return {"prompt": self.prompt, "answer": rows[self.picked]["text"], "picked": self.picked, "candidates": rows}


def opened(model: str, torch_device: str = "cpu") -> Opened:
    """Return a model folder, a Hugging Face id or an exported artifact, ready to be asked."""
    folder = Path(model)
    if (folder / MANIFEST_FILE).is_file():
        from transformers import GenerationConfig

        if torch_device != "cpu":
            raise RecipeError(f"generate: --torch-device {torch_device}: {folder} is an exported artifact, "
                              "which its own runtime executes. Leave it out.")  # fmt: skip
        runner, vocabulary = open_artifact(folder), read_manifest(folder).get("vocabulary")
        tokenizer = load_tokenizer(folder, trust_remote_code=False,
                                   vocab=vocabulary if isinstance(vocabulary, int) else 1 << 24)  # fmt: skip
        has_config = (folder / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(folder) if has_config else None
        return Opened(runner, tokenizer, _ends(tokenizer, config), folder)
    bundle = ModelBundle.load(model, torch_device=torch_device)
    ends = _ends(bundle.tokenizer, bundle.model.generation_config)
    return Opened(TorchRunner(bundle), bundle.tokenizer, ends, None)


def _ends(tokenizer: Any, config: Any) -> frozenset[int]:
    of_config = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(of_config if isinstance(of_config, list) else [of_config])]
    return frozenset(int(i) for i in found if i is not None)


def task_records(place: str) -> list[Mapping[str, Any]]:
    """Return the records of a task file; raise DataError naming every one that is damaged or has no prompt."""
    rows = read_rows(place)
    bad = [f"{row.place} ({row.problem})" if row.problem else row.place for row in rows
           if row.problem or not isinstance(row.values.get("prompt"), str) or not row.values["prompt"]]  # fmt: skip
    if bad:
        raise DataError(f"{place}: {len(bad)} of {len(rows)} records have no text under 'prompt': {offenders(bad, 6)}.")
    return [row.values for row in rows]


def answered(
    model: Opened, records: Sequence[Mapping[str, Any]], options: GenerateOptions, *, adapter: str | None = None,
    checker: Checker | None = None,
) -> tuple[list[Asked], list[Curve], float]:  # fmt: skip
    """Return the answers to every record's prompt, accuracy against N, and the seconds that sampling took.

    Raises RecipeError for a verifier that needs a checker, an unknown adapter or one of another base; DataError for a
    prompt that does not fit into the context; all before the first answer but for the latter.
    """
    verifier = options.verifier or ("checker" if checker else "log-probability")
    if verifier == "checker" and checker is None:
        raise RecipeError("generate: the verifier is a checker, but none was named. Give --checker.")
    reward = model.adapter(verifier.removeprefix("reward:")) if verifier.startswith("reward:") else None
    name = None if adapter is None else model.adapter(adapter)
    encoder = Encoder(model.tokenizer, TaskOptions("prompt", ("-",), template=options.template,  # type: ignore[arg-type]
                                                   system=options.system))  # fmt: skip
    asked, seconds = [], 0.0

    def pick(found: Sequence[Candidate]) -> int:
        return best(found, verifier == "checker")

    for record in records:
        prompt = torch.tensor([encoder.prompt(record["prompt"])], dtype=torch.int64)
        start = time.perf_counter()
        found = _candidates(model, prompt, record, options, name, checker, reward)
        seconds += time.perf_counter() - start
        asked.append(Asked(record["prompt"], found, pick(found)))
    passes = 0 if reward is None else 2
    return asked, curve([one.candidates for one in asked], pick, passes), seconds


def _candidates(
    model: Opened, prompt: Tensor, record: Mapping[str, Any], options: GenerateOptions, adapter: str | None,
    checker: Checker | None, reward: str | None,
) -> tuple[Candidate, ...]:  # fmt: skip
    model.runner.activate(adapter)
    answers = list(sampled_answers(model.runner, prompt, options, model.ends, options.best_of))
    rewards: Sequence[float | None] = [None] * len(answers)
    if reward is not None:
        rewards = reward_scores(model.runner, prompt, answers, reward)
    texts = model.tokenizer.batch_decode([list(one.ids) for one in answers], skip_special_tokens=True)
    return tuple(
        Candidate(one, text, None if checker is None else checker(record["prompt"], text, record), worth)
        for one, text, worth in zip(answers, texts, rewards, strict=True)
    )


def curve_table(rows: Sequence[Curve]) -> str:
    """Return accuracy against N and tokens spent, for a person."""
    lines = [f"{'N':>4} {'accuracy':>9} {'any right':>9} {'tokens':>9} {'verifier tokens':>15}"]
    for row in rows:
        shares = ["-" if share is None else f"{share:.1%}" for share in (row.accuracy, row.solved)]
        lines.append(f"{row.n:4} {shares[0]:>9} {shares[1]:>9} {row.tokens:9,.1f} {row.verifier_tokens:15,.1f}")
    return "\n".join(lines)


def curve_json(rows: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return accuracy against N for a program."""
    return [asdict(row) for row in rows]
