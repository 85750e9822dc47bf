"""A model with its tokenizer, anatomy and lineage: what every step takes and returns.

On disk a bundle is a plain Hugging Face folder (config.json, generation_config.json, model.safetensors, tokenizer
files) plus `lineage.json` and, where the vocabulary was cut, `vocabulary_map.json`; stock transformers loads it. In
memory it computes in float32, whatever the checkpoint stores; `storage_dtype` remembers that, and
`stored_dtype_rounded()` makes the model in memory equal to its file, so that what was measured is what ships.

Why not `save_pretrained`: it needs the model to have been loaded by a quantizer to write packed weights, validates the
generation config of other people's models, and leaves half a folder when killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dwindle.anatomy import Anatomy, anatomy_of, check_model
from dwindle.checkpoint_files import read_config
from dwindle.errors import GateFailed, offenders
from dwindle.experts import name_expert_count, stored_layout
from dwindle.lineage import LINEAGE_FILE, Lineage
from dwindle.model_source import (
    find_folder,
    load_config,
    load_model,
    quiet_transformers,
    separate_rope,
    warn_remote_code,
)
from dwindle.report import Measurement
from dwindle.storage import atomic_folder, hash_file, hash_json, require_place, require_space, write_json
from dwindle.tokenizer_files import load_tokenizer, name_generic_tokenizer, tokenizer_sha256
from dwindle.torch_device import usable_device
from dwindle.vocabulary_map import VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dwindle.weights import AffineWeight, PalettizedWeight

__all__ = ["ModelBundle", "content_digest", "lineage_of", "not_storable", "require_model_place"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", ".gitattributes")
_SPARE_BYTES = 32_000_000
"""Room asked for beyond the weights: tokenizer, configs, and the file system's own."""

_log = logging.getLogger("dwindle")


@dataclass(frozen=True, eq=False)
class ModelBundle:
    """One model, ready to be measured, changed or exported."""

    model: PreTrainedModel
    """float32 compute, eval mode."""
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    lineage: Lineage
    storage_dtype: torch.dtype
    """Type its float tensors are stored in: float32, float16 or bfloat16."""
    vocabulary_map: VocabularyMap | None = None
    """Where its vocabulary was cut: which token of the full one each of its tokens is."""

    @classmethod
    def load(
        cls, path_or_id: str | Path, *, trust_remote_code: bool = False, torch_device: str | torch.device = "cpu"
    ) -> ModelBundle:
        """Return the bundle of a local folder or Hugging Face id. Raises UnsupportedModel; never loads a pickle.

        Raises RecipeError for a device that is not there. `trust_remote_code` concerns the tokenizer: the model's own
        class is always transformers'.
        """
        device = usable_device(torch_device)
        if trust_remote_code:
            warn_remote_code(str(path_or_id))
        folder, revision = find_folder(path_or_id)
        config = load_config(folder)
        model, files = load_model(folder, config)
        anatomy = anatomy_of(model.config)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code, vocab=anatomy.vocab)
        stored = files.float_dtype()
        if getattr(model.config, "quantization_config", None) is not None:
            stored = {"float16": "F16", "bfloat16": "BF16"}.get(str(read_config(folder).get("dtype")), "F32")
        else:
            check_model(model, anatomy)
        named = folder.resolve().name if revision is None else str(path_or_id)
        lineage = lineage_of(folder, files.files, named, revision)
        mapped = VocabularyMap.read(folder)
        return cls(model.to(device), tokenizer, anatomy, lineage, _DTYPES[stored], mapped)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str,
        storage_dtype: torch.dtype = torch.float32,
    ) -> ModelBundle:  # fmt: skip
        """Return a bundle around a model made in memory, its weights rounded to `storage_dtype`."""
        anatomy = anatomy_of(model.config)
        bundle = cls(model.float().eval(), tokenizer, anatomy, Lineage(()), storage_dtype).stored_dtype_rounded()
        return replace(bundle, lineage=Lineage.origin(name, {"content": bundle.content_sha256}))

    @property
    def quantized(self) -> bool:
        """Return whether some weights are codes (integers or palettes) rather than floats."""
        from dwindle.quantized_model import is_quantized

        return is_quantized(self.model)

    def quantized_weights(self) -> Mapping[str, AffineWeight | PalettizedWeight]:
        """Return the packed weights by module name; empty for a float model."""
        if getattr(self.model.config, "quantization_config", None) is None:
            return {}
        from dwindle.quantized_model import quantized_weights

        return quantized_weights(self.model)

    def derive(
        self, model: PreTrainedModel, step: str, options: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> ModelBundle:
        """Return a bundle around what `step` made of this one, with one more lineage entry."""
        lineage = self.lineage.adding(step, options, inputs)
        return replace(self, model=model.eval(), anatomy=anatomy_of(model.config), lineage=lineage)

    def stored_dtype_rounded(self) -> ModelBundle:
        """Round all float parameters to `storage_dtype` in place and return self; the compute type stays float32.

        Raises GateFailed, naming the tensors, if a weight is NaN or lies outside the range of that type.
        """
        broken = []
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.is_floating_point():
                    rounded = parameter.to(self.storage_dtype)
                    if not torch.isfinite(rounded).all():
                        broken.append(name)
                    parameter.copy_(rounded)
        if broken:
            raise not_storable(broken, self.storage_dtype)
        return self

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of model.safetensors: floats in `storage_dtype`, codes as they are, a tied head once.

        Experts stand under the names of files (`dwindle.experts`), as views of the model's.
        """
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            if self.anatomy.tied and name == f"{self.anatomy.head}.weight":
                continue
            rounded = name in parameters and tensor.is_floating_point()
            tensors[name] = (tensor.to(self.storage_dtype) if rounded else tensor).detach().cpu().contiguous()
        return stored_layout(self.anatomy, tensors)

    def config_json(self) -> dict[str, Any]:
        """Return the object of config.json, readable by transformers 4.57 and 5.x alike."""
        raw: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=True))
        raw.pop("_name_or_path", None)
        raw.pop("torch_dtype", None)
        dtype = str(self.storage_dtype).removeprefix("torch.")
        raw = name_expert_count(raw)
        return {**raw, **separate_rope(raw), "architectures": [type(self.model).__name__], "dtype": dtype}

    def save(self, folder: str | Path) -> None:
        """Write the bundle as a Hugging Face folder with lineage.json; the old state or the new one, never half.

        The model in memory is rounded to what is written. Raises OutputError for a place that holds something else
        than a model, or without room.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        require_model_place(folder)
        self.stored_dtype_rounded()
        tensors = self.stored_tensors()
        require_space(folder, sum(t.nbytes for t in tensors.values()) + _SPARE_BYTES)
        with atomic_folder(folder) as partial:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            self.write_description(partial)
        _log.info("saved %s", folder)

    def write_description(self, folder: Path) -> None:
        """Write all files but the weights into a folder: configs, tokenizer, lineage, the map of a cut vocabulary."""
        with quiet_transformers():
            write_json(folder / "config.json", self.config_json())
            if self.model.generation_config is not None:
                self.model.generation_config.to_json_file(folder / "generation_config.json")
            self.tokenizer.save_pretrained(folder)
            name_generic_tokenizer(folder)
            self.lineage.write(folder)
            if self.vocabulary_map is not None:
                self.vocabulary_map.write(folder)

    @property
    def content_sha256(self) -> str:
        """Return one hash over config, weights as stored, and tokenizer: equal before a save and after its load."""
        return content_digest(self.config_json(), self.tokenizer, sorted(self.stored_tensors().items()))

    def size(self) -> Measurement:
        """Return parameters, stored bytes and bits per weight (tied tensors once); the quality fields are None."""
        from dwindle.quantized_model import packed_specs
        from dwindle.weights import spec_bits

        bits: dict[str, tuple[int, int]] = {
            f"{_without_adapter(name)}.weight": (spec["shape"][0] * spec["shape"][1], spec_bits(spec))
            for name, spec in packed_specs(self.model).items()
        }
        width = torch.finfo(self.storage_dtype).bits
        for name, parameter in self.model.named_parameters():
            bits.setdefault(_without_adapter(name), (parameter.numel(), parameter.numel() * width))
        linears = {f"{name}.weight" for name in self.anatomy.linear_names()}
        ends = {f"{self.anatomy.embedding}.weight", f"{self.anatomy.head}.weight"}
        parameters, stored = (sum(column) for column in zip(*bits.values(), strict=True))
        return Measurement(
            parameters=parameters,
            bytes=-(-stored // 8),
            bits_per_weight=stored / parameters,
            bits_per_weight_linear=_bits_per_weight(bits, linears),
            bits_per_weight_embedding=_bits_per_weight(bits, ends),
        )


def content_digest(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tensors: Iterable[tuple[str, torch.Tensor]]
) -> str:
    """Return one hash over a config, a tokenizer, and named tensors as they are stored, in the order of their names."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    digest = hashlib.sha256(f"{hash_json(kept)}\n{tokenizer_sha256(tokenizer)}\n".encode())
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_adapter(name: str) -> str:
    """Return the name that a tensor has in the model without the adapter that PEFT put around its module."""
    return name.replace(".base_layer", "")


def _bits_per_weight(bits: Mapping[str, tuple[int, int]], names: set[str]) -> float:
    chosen = [bits[name] for name in names if name in bits]
    return sum(stored for _, stored in chosen) / sum(count for count, _ in chosen)


def lineage_of(folder: Path, weight_files: Iterable[str], name: str, revision: str | None = None) -> Lineage:
    """Return the lineage that a checkpoint folder tells, or that of a new origin with the hashes of its files."""
    if (folder / LINEAGE_FILE).is_file():
        return Lineage.read(folder)
    names = {*(p.name for p in folder.glob("*.json")), *weight_files, "tokenizer.model"}
    hashes = {file: hash_file(folder / file) for file in sorted(names) if (folder / file).is_file()}
    return Lineage.origin(name, hashes, **({} if revision is None else {"revision": revision}))


def not_storable(names: Sequence[str], dtype: torch.dtype) -> GateFailed:
    """Return the error for tensors that are NaN, or lie outside the range of the type they are to be stored in."""
    return GateFailed(
        f"{len(names)} tensors do not fit into {dtype}: {offenders(names)}. They hold NaN or "
        "values out of its range; lower the learning rate, or start from a checkpoint stored in bfloat16."
    )


def require_model_place(folder: Path) -> None:
    """Raise OutputError unless `folder` is absent, empty, or holds nothing but a model's files."""
    require_place(folder, "config.json", "a model", _MODEL_FILES)
