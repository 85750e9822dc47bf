"""An encoder as it lies in its folder: which task it was trained for, how its vectors are pooled, and the loaded model.

A decoder is known by its config's `architectures`: what ends in ForCausalLM, LMHeadModel or ForConditionalGeneration
writes text. Everything else reads it, and the end of the class name tells what for:

    BertModel                       hidden states      feature-extraction
    BertForSequenceClassification   a row of labels    text-classification
    BertForTokenClassification      a row a token      token-classification
    BertForMaskedLM                 logits a token     fill-mask
    BertForQuestionAnswering        two rows           question-answering

A sentence encoder carries `modules.json` (sentence-transformers): Transformer, then Pooling, then perhaps Normalize.
The exported graph ends with the hidden states, as the tools that load such folders expect; how they are pooled stands
in the manifest, and the parity check pools them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwindle.anatomy import FAMILIES
from dwindle.checkpoint_files import inspect_checkpoint, read_config
from dwindle.errors import UnsupportedModel, offenders
from dwindle.model_source import find_folder, quiet_transformers
from dwindle.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HIDDEN", "SENTENCE_FILES", "EncoderSource", "Task", "is_decoder"]

HIDDEN = "last_hidden_state"
SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""What sentence-transformers reads beside a transformers model, the pooling's own config apart."""
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of class names that generate text."""
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}
"""Keys of a Pooling config in the order in which its parts are concatenated."""


@dataclass(frozen=True)
class Task:
    """What a model's outputs are."""

    name: str
    """As optimum calls it."""
    loader: str
    """transformers' Auto class."""
    outputs: tuple[str, ...]
    per_token: bool
    """Outputs have one row a token, not one a text."""


_FEATURES = Task("feature-extraction", "AutoModel", (HIDDEN,), True)
_TASKS = {
    "ForSequenceClassification": Task("text-classification", "AutoModelForSequenceClassification", ("logits",), False),
    "ForTokenClassification": Task("token-classification", "AutoModelForTokenClassification", ("logits",), True),
    "ForMaskedLM": Task("fill-mask", "AutoModelForMaskedLM", ("logits",), True),
    "ForQuestionAnswering": Task("question-answering", "AutoModelForQuestionAnswering",
                                 ("start_logits", "end_logits"), True),
    "Model": _FEATURES,
}  # fmt: skip
"""Tasks by the end of the class name."""


def is_decoder(model: str | Path) -> bool:
    """Return whether a model folder (or Hugging Face id) says that it generates text; reads its config.json alone.

    Whether that decoder can be exported is for `ModelBundle.load` to say. Raises UnsupportedModel without a config.
    """
    return _writes_text(read_config(find_folder(model)[0]))


def _writes_text(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    if not names:
        return config.get("model_type") in FAMILIES
    return str(names[0]).endswith(_WRITERS)


@dataclass(frozen=True)
class EncoderSource:
    """A folder with an encoder, looked at but not loaded."""

    folder: Path
    revision: str | None
    """Of a Hugging Face id: its commit."""
    model_type: str
    architecture: str
    task: Task
    pooling: tuple[str, ...]
    """How sentence-transformers makes one vector a text; the mean where the folder says nothing."""
    pooling_named: bool
    """Whether the folder says it."""
    normalized: bool
    """Whether its vectors are scaled to length 1."""
    longest: int | None
    """Longest text in tokens that the folder names, if any."""

    @classmethod
    def find(cls, model: str | Path) -> EncoderSource:
        """Return what a folder or Hugging Face id holds. Raises UnsupportedModel for a decoder and unknown tasks."""
        folder, revision = find_folder(model)
        config = read_config(folder)
        names = config.get("architectures") or []
        architecture = str(names[0]) if names else "Model"
        named = f"{folder} ({config.get('model_type')!r}, {architecture})"
        if _writes_text(config):
            raise UnsupportedModel(f"{named} is a decoder: it generates text. Export it with `dwindle export`, which "
                                   "writes decoders with a KV cache.")  # fmt: skip
        if config.get("quantization_config") is not None:
            raise UnsupportedModel(f"{named} is already quantized. Give the unquantized checkpoint.")
        modules = _sentence_modules(folder)
        task = _FEATURES if modules else next((t for end, t in _TASKS.items() if architecture.endswith(end)), None)
        if task is None or config.get("is_encoder_decoder"):
            raise UnsupportedModel(f"{named} is no text encoder that is known. Known class names end in "
                                   f"{', '.join(_TASKS)}.")  # fmt: skip
        return cls(
            folder, revision, str(config.get("model_type")), architecture, task,
            pooling=_pooling(folder, modules) or ("mean",), pooling_named="Pooling" in modules,
            normalized="Normalize" in modules, longest=_longest(folder),
        )  # fmt: skip

    def load(self) -> tuple[PreTrainedModel, tuple[str, ...]]:
        """Return (the model in float32 and eval mode, its weight files). Never loads a pickle or foreign code."""
        import transformers

        files = inspect_checkpoint(self.folder)
        with quiet_transformers():
            try:
                model, info = getattr(transformers, self.task.loader).from_pretrained(
                    self.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True,
                    output_loading_info=True, trust_remote_code=False,
                )  # fmt: skip
            except Exception as error:  # modelling code raises whatever a nonsensical value makes it run into
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UnsupportedModel(f"{self.folder} cannot be loaded ({type(error).__name__}: {first}).") from error
        unread = ("pooler.",) if self.task is _FEATURES else ()
        problems = [f"{name} is missing" for name in sorted(info["missing_keys"]) if not name.startswith(unread)]
        problems += [f"{name} has the wrong shape" for name, *_ in info["mismatched_keys"]]
        problems += [f"{name} holds NaN or infinity" for name, p in model.named_parameters()
                     if p.is_floating_point() and not bool(torch.isfinite(p).all())]  # fmt: skip
        if problems:
            raise UnsupportedModel(f"{self.folder}: config.json and the weights disagree in {len(problems)} tensors: "
                                   f"{offenders(problems)}. Use the files that belong together.")  # fmt: skip
        return model.eval(), files.files


def _sentence_modules(folder: Path) -> dict[str, str]:
    """Return {kind: folder} of sentence-transformers' modules; empty if the folder is a plain transformers model."""
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    listed = {str(row["type"]).rpartition(".")[2]: str(row["path"]) for row in _read(path)}
    foreign = sorted(listed.keys() - {"Transformer", "Pooling", "Normalize"})
    if foreign:
        raise UnsupportedModel(f"{path}: {offenders(foreign)} would be left out: only Transformer, Pooling and "
                               "Normalize are exported. Choose an encoder without further modules.")  # fmt: skip
    return listed


def _pooling(folder: Path, modules: Mapping[str, str]) -> tuple[str, ...]:
    if "Pooling" not in modules:
        return ()
    path = folder / modules["Pooling"] / "config.json"
    if not path.is_file():
        raise UnsupportedModel(f"{path} is missing: how vectors are pooled is not known. Give the whole folder "
                               "(for a Hugging Face id: hf download ORG/NAME --local-dir FOLDER).")  # fmt: skip
    config = _read(path)
    wanted = {key for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    if not wanted or wanted - _POOLING_MODES.keys():
        raise UnsupportedModel(f"{path}: pooling by {offenders(sorted(wanted)) or 'nothing'} is not known; known: "
                               f"{', '.join(_POOLING_MODES)}.")  # fmt: skip
    return tuple(name for key, name in _POOLING_MODES.items() if key in wanted)


def _longest(folder: Path) -> int | None:
    path = folder / "sentence_bert_config.json"
    value = _read(path).get("max_seq_length") if path.is_file() else None
    return None if value is None else int(value)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise UnsupportedModel(f"{path} is no valid JSON ({error}). Copy or download the folder again.") from error
