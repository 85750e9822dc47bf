"""Measure a model folder or an exported artifact on a text: the numbers of report.json, made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwindle.bundle import ModelBundle
from dwindle.data import evaluation_set
from dwindle.errors import DataError, RecipeError
from dwindle.measure import LogitSlices, Meter, logit_slices
from dwindle.report import Measurement
from dwindle.storage import folder_bytes
from dwindle.token_set import TokenSet
from dwindle.vocabulary_map import VocabularyMap, map_between, map_from

__all__ = ["evaluate"]


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    reference: str | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    torch_device: str = "cpu",
) -> Measurement:
    """Return size and quality of a model folder, a Hugging Face id, an exported artifact's folder or a bare package.

    `reference` is the teacher for KL and agreement; `max_tokens` cuts the text as a recipe's `evaluation_tokens`
    does (where the vocabulary was cut, in tokens of a full reference); `context` is the window length T (the model's
    context if None). A bare `.mlpackage` is computed by the evaluator (by Core ML on a Mac); its tokenizer lies beside
    it, or is the reference's. Raises RecipeError for fewer than 2 tokens or a window of none.
    """
    for name, given, least in (("tokens", max_tokens, 2), ("context", context, 1)):
        if given is not None and given < least:
            raise RecipeError(f"evaluate: {name}={given} (needed: at least {least}).")
    teacher = None if reference is None else ModelBundle.load(reference, torch_device=torch_device)
    folder = Path(model)
    if (folder / "manifest.json").exists():
        return _evaluate_artifact(folder, text, teacher, max_tokens, context)
    if folder.suffix == ".mlpackage" and folder.is_dir():
        return _evaluate_package(folder, text, teacher, max_tokens, context)
    bundle = ModelBundle.load(model, torch_device=torch_device)
    mapped = None if teacher is None else map_between(teacher, bundle)
    evaluation = _evaluation(text, bundle.tokenizer, teacher, mapped, max_tokens)
    return Meter(evaluation, teacher, context).measure(bundle)


def _evaluate_artifact(
    folder: Path, text: str | Path, teacher: ModelBundle | None, max_tokens: int | None, context: int | None
) -> Measurement:
    from dwindle.export import open_artifact
    from dwindle.export.artefact import read_manifest

    manifest = read_manifest(folder)
    runner = open_artifact(folder)
    told = map(manifest.get, ("parameters", "bytes", "vocabulary", "context_length"))
    size = _Size.read(folder / "manifest.json", *told)
    tokenizer = _tokenizer(folder, size.vocabulary)
    return _measured(runner, size, folder, tokenizer, text, teacher, max_tokens, context)


def _evaluate_package(
    package: Path, text: str | Path, teacher: ModelBundle | None, max_tokens: int | None, context: int | None
) -> Measurement:
    from dwindle.export.coreml_files import read_specification
    from dwindle.export.coreml_runner import open_package

    runner = open_package(package)
    told = read_specification(package).description.metadata.userDefined
    beside = package.parent / "tokenizer_config.json"
    parameters, vocabulary = told.get("dwindle.parameters"), runner.vocabulary
    if teacher is not None:
        parameters, vocabulary = parameters or teacher.size().parameters, vocabulary or teacher.anatomy.vocab
    tokenizer = (
        _tokenizer(package.parent, vocabulary or 1 << 24)
        if beside.exists()
        else None
        if teacher is None
        else teacher.tokenizer
    )
    if parameters is None or vocabulary is None or tokenizer is None:
        known = {"number of parameters": parameters, "vocabulary": vocabulary, "tokenizer": tokenizer}
        missing = " and ".join(what for what, found in known.items() if found is None)
        raise DataError(f"{package}: its {missing} cannot be told from the package. Give the model it was made from as "
                        "--reference.")  # fmt: skip
    size = _Size.read(package, parameters, folder_bytes(package), vocabulary, runner.context)
    return _measured(runner, size, package.parent, tokenizer, text, teacher, max_tokens, context)


@dataclass(frozen=True)
class _Size:
    parameters: int
    bytes: int
    vocabulary: int
    context: int

    @classmethod
    def read(cls, place: Path, *numbers: Any) -> _Size:
        """Return the size that a file tells; raise DataError unless it is four whole numbers of at least 1."""
        try:
            found = [int(number) for number in numbers if not isinstance(number, bool)]
        except (TypeError, ValueError, OverflowError):
            found = []
        if len(found) != 4 or min(found) < 1:
            told = ", ".join(f"{number!r:.40}" for number in numbers)
            raise DataError(f"{place}: parameters, bytes, vocabulary and context_length must be whole numbers of at "
                            f"least 1, found {told}. Export the model again.")  # fmt: skip
        return cls(*found)


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    from dwindle.tokenizer_files import load_tokenizer

    return load_tokenizer(folder, trust_remote_code=False, vocab=vocabulary)


def _evaluation(text: str | Path, tokenizer: Any, teacher: ModelBundle | None, mapped: VocabularyMap | None,
                max_tokens: int | None) -> TokenSet:  # fmt: skip
    """Return the text in the model's tokens; how much of it `max_tokens` means, a full teacher's tokens say."""
    counted_by = None if teacher is None or mapped is None else teacher.tokenizer
    return evaluation_set(str(text), tokenizer, max_tokens=max_tokens, counted_by=counted_by)


def _measured(runner: Any, size: _Size, folder: Path, tokenizer: Any, text: str | Path, teacher: ModelBundle | None,
              max_tokens: int | None, context: int | None) -> Measurement:  # fmt: skip
    """Return the quality of anything that is executed token by token."""
    known = VocabularyMap.read(folder)
    mapped = None if teacher is None else map_from(teacher, size.vocabulary, tokenizer, known)
    evaluation = _evaluation(text, tokenizer, teacher, mapped, max_tokens)
    if context is not None and context > size.context:
        raise DataError(f"--context {context}: the artifact takes at most {size.context} tokens.")

    def slices(ids: Tensor, n: int) -> Iterator[Tensor]:
        for row in ids:
            runner.reset()
            yield from torch.split(runner.step(row[None]), n)

    quality = Meter(evaluation, teacher, batch_tokens=1).quality(
        slices, None if teacher is None else _reference(teacher, mapped), vocab=size.vocabulary,
        context=context or size.context,
    )  # fmt: skip
    return Measurement(
        parameters=size.parameters,
        bytes=size.bytes,
        bits_per_weight=8 * size.bytes / size.parameters,
        nats_per_token=quality.nats_per_token,
        bits_per_byte=quality.bits_per_byte,
        kl_nats_per_token=quality.kl_nats_per_token,
        top1_agreement=quality.top1_agreement,
    )


def _reference(teacher: ModelBundle, mapped: VocabularyMap | None) -> LogitSlices:
    teacher.model.eval()
    return logit_slices(teacher, mapped)
