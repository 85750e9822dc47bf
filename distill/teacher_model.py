"""A model that is asked and never changed: what distilling needs of a teacher.

A bundle (`dwindle.bundle`) is a model that dwindle can take apart, so its family is one of the table. A teacher is
read only: any causal language model of transformers will do, as long as its token ids mean what the student's do, and
its weights may stay in its folder, or be sharded as they are read (`dwindle.offloaded_model`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dwindle.anatomy import anatomy_of
from dwindle.bundle import ModelBundle, content_digest, lineage_of
from dwindle.causal_model import causal_config, causal_model, context_of, in_table
from dwindle.checkpoint_files import read_config
from dwindle.distill.head import Head, ModelTail, decoder_of, head_of, tail_of
from dwindle.errors import UnsupportedModel
from dwindle.lineage import Lineage
from dwindle.model_source import find_folder
from dwindle.offloaded_model import offloaded_model, sharded_model
from dwindle.sharding import Processes, repeated_layers
from dwindle.tokenizer_files import load_tokenizer
from dwindle.torch_device import usable_device
from dwindle.vocabulary_map import VocabularyMap
from dwindle.weight_source import StoredTensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Teacher", "TeacherShape"]

_UNBOUNDED = 1 << 30
"""Context of a model whose config names none."""


@dataclass(frozen=True)
class TeacherShape:
    """The numbers that a teacher is held against a student and its data by."""

    vocab: int
    context: int
    layers: int
    width: int


@dataclass(frozen=True, eq=False)
class Teacher:
    """A causal language model to learn from."""

    model: Any
    """A transformers model in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    anatomy: TeacherShape
    device: torch.device
    """Where it reads and answers."""
    name: str
    digest: Callable[[], str]
    """Makes `content_sha256`: a pass over all weights."""
    vocabulary_map: VocabularyMap | None = None
    tail: ModelTail | None = None
    """Makes logits for families outside the table; the others have a `Head`."""
    offloaded: bool = False
    sharded: bool = False
    """Every process of a launch holds a part of it, and all must ask it in step."""

    @classmethod
    def of(cls, given: ModelBundle | Teacher) -> Teacher:
        """Return a bundle as a teacher; a teacher as it is."""
        if isinstance(given, Teacher):
            return given
        anatomy, entries = given.anatomy, given.lineage.entries
        shape = TeacherShape(anatomy.vocab, anatomy.context, anatomy.layers, anatomy.width)
        name = str(entries[0].options.get("model", "")) if entries else ""
        return cls(given.model.eval(), given.tokenizer, shape, given.model.device, name,
                   lambda: given.content_sha256, given.vocabulary_map)  # fmt: skip

    @classmethod
    def load(
        cls, path_or_id: str | Path, *, torch_device: str | torch.device = "cpu", offload: bool = False,
        alone: bool = True,
    ) -> Teacher:  # fmt: skip
        """Return the teacher in a local folder or of a Hugging Face id; with `offload` its weights stay on the disk.

        Unless each process of a launch is to have it `alone` (to write a cache, say), it is sharded over them as it is
        read, and no process ever holds the whole.

        Raises UnsupportedModel for what is no causal language model of transformers, or damaged.
        """
        asked = usable_device(torch_device)
        folder, revision = find_folder(path_or_id)
        config = causal_config(folder)
        packed = getattr(config, "quantization_config", None) is not None
        if offload and packed:
            raise UnsupportedModel(f"{folder} is quantized, and codes are not read layer by layer. Load it whole.")
        processes = Processes.current(asked)
        device = processes.device(asked)
        sharded = not (alone or offload or packed) and processes.world > 1
        if in_table(config) and not (offload or sharded):
            return cls.of(ModelBundle.load(path_or_id, torch_device=device))
        model: Any
        if offload:
            model = offloaded_model(folder, config, device)
        elif sharded:
            model = sharded_model(folder, config, device, processes)
        else:
            model = causal_model(folder, config).to(device)
        tokenizer = load_tokenizer(folder, trust_remote_code=False, vocab=config.vocab_size)
        layers = repeated_layers(model)
        context = context_of(config) or _UNBOUNDED
        embedded = model.get_input_embeddings()
        width = int(getattr(config, "hidden_size", None) or embedded.embedding_dim)
        shape = TeacherShape(int(config.vocab_size), context, len(layers), width)
        named = folder.resolve().name if revision is None else str(path_or_id)
        mapped = VocabularyMap.read(folder)
        if in_table(config):
            told = lineage_of(folder, (), named, revision)
            named = str(told.entries[0].options.get("model", named))
            digest, tail = _table_digest(model, tokenizer, folder, told), None
        else:
            digest, tail = _file_digest(folder, tokenizer), tail_of(model, device)
        return cls(model, tokenizer, shape, device, named, digest, mapped, tail, offload, sharded)

    @cached_property
    def content_sha256(self) -> str:
        """Return one hash over config, weights as stored, and tokenizer: a bundle's own, offloaded or not."""
        return self.digest()

    def decoder(self, model: Any) -> nn.Module:
        """Return the part of `model`, this teacher's or a sharded twin, that makes hidden states."""
        return decoder_of(model)

    def head(self, model: Any) -> Head | ModelTail:
        """Return what makes logits of them."""
        return head_of(model) if self.tail is None else replace(self.tail, model=model, decoder=decoder_of(model))


def _table_digest(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, told: Lineage) -> Callable[[], str]:
    """Return what hashes an offloaded model of the table as `ModelBundle.content_sha256` hashes it in memory."""

    def digest() -> str:
        source = StoredTensors(folder)
        anatomy = anatomy_of(model.config)
        bundle = ModelBundle(model, tokenizer, anatomy, told, source.storage_dtype)
        head = f"{anatomy.head}.weight"
        names = [
            one for one in source.names if one.endswith((".weight", ".bias")) and not (anatomy.tied and one == head)
        ]
        tensors = ((one, source.read(one).float().to(source.storage_dtype)) for one in names)
        return content_digest(bundle.config_json(), tokenizer, tensors)

    return digest


def _file_digest(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], str]:
    """Return what hashes a model of another family by its config and stored tensors."""

    def digest() -> str:
        source = StoredTensors(folder)
        return content_digest(read_config(folder), tokenizer, ((one, source.read(one)) for one in source.names))

    return digest
