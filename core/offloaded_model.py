"""A model whose weights stay in its checkpoint folder: each layer's are read as it runs, and given up after it.

The module is transformers' own, of any causal language model, built with its parameters on the meta device, where they
have shapes and no storage (buffers, such as rotary frequencies and masks, are real). Before a decoder layer runs, hooks
read its tensors in the stored type and make them float32 on the device, as a resident model has them: the same
arithmetic on the same numbers, bit for bit. Of an embedding that is not the head's twin, only the rows that a batch
asks for are read. Final norm, head and what else stands outside the layers are there all the time: a teacher's head is
read after its forward pass.

Under `torchrun` a model can be sharded instead (`sharded_model`): each process then reads its own rows of every tensor.

Memory on the device: 4 bytes per weight of one layer and of what stands outside the layers (head: 4 V D), and the
activations of a forward pass without gradients. Time: a pass reads the file once, from the disk or from what the
operating system holds of it, so larger batches cost less per token.

Why not accelerate's `disk_offload`: it moves single modules, refuses models that are wholly on disk, and needs a
package that nothing else here needs.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.anatomy import Anatomy, anatomy_of
from dwindle.causal_model import in_table
from dwindle.errors import UnsupportedModel, offenders
from dwindle.experts import built_layout
from dwindle.model_source import attention_of, compare_tensors, quiet_transformers
from dwindle.sharding import Processes, fill_sharded, repeated_layers, shard
from dwindle.weight_source import StoredTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["StoredWeights", "offloaded_model", "sharded_model", "weightless_model"]


_HEADS = ("lm_head.weight", "embed_out.weight")
"""What files call a head: transformers 5 knows GPT-NeoX's by another name."""


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are built within a `with` have parameters without storage, and buffers as they are."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def weightless_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the float32 model of a config with its parameters on the meta device and its buffers computed.

    Raises UnsupportedModel for values that the model's class refuses.
    """
    from transformers import AutoModelForCausalLM

    attention = {"attn_implementation": attention_of(config)} if in_table(config) else {}
    try:
        with _parameters_on_meta(), quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    except Exception as error:  # modelling code raises whatever a nonsensical value makes it run into
        why = f"{type(error).__name__}: {error}"
        raise UnsupportedModel(f"config.json: this {config.model_type} model cannot be built ({why}).") from error
    return model.eval().requires_grad_(False)


class StoredWeights:
    """Where the parameters of a built model stand in a checkpoint's files.

    Raises UnsupportedModel, naming them, for parameters that no file holds.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.source = StoredTensors(folder)
        self._anatomy: Anatomy | None = anatomy_of(model.config) if in_table(model.config) else None
        if self._anatomy is not None:
            compare_tensors(folder, model.config, self.source.files)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        twins: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            twins[id(parameter)].append(name)
        prefix = f"{model.base_model_prefix}."
        self._names: dict[str, str] = {}
        lost, head = [], model.get_output_embeddings()
        of_head = None if head is None else head.weight
        for name, parameter in parameters.items():
            spelt = [form for twin in (name, *twins[id(parameter)])
                     for form in (twin, twin.removeprefix(prefix), prefix + twin)]  # fmt: skip
            spelt += _HEADS if parameter is of_head else ()
            stored = next((form for form in spelt if form in self.source), None)
            if stored is not None and self.source.shape(stored) == tuple(parameter.shape):
                self._names[name] = stored
            elif self._layer_of(name) is None:
                found = "missing" if stored is None else f"{list(self.source.shape(stored))} there"
                lost.append(f"{name} {list(parameter.shape)} ({found})")
        if lost:
            raise UnsupportedModel(
                f"{folder}: {len(lost)} parameters of {type(model).__name__} are not in the files under these names "
                f"and shapes: {offenders(lost)}. Use the config.json that belongs to these weights; where files "
                "spell names in a way of their own, the checkpoint can teach in memory only, without offloading."
            )
        left = [] if self._anatomy is not None else self._left_over(model)
        if left:
            raise UnsupportedModel(
                f"{folder}: {len(left)} tensors have no place in {type(model).__name__}: {offenders(left)}. "
                "Use the config.json that belongs to these weights."
            )

    def _left_over(self, model: PreTrainedModel) -> list[str]:
        """Return the stored tensors that are no parameter, no buffer, and nothing the class knows to leave out."""
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        buffers = {name for name, _ in model.named_buffers()}
        known = {
            *self._names.values(),
            *buffers,
            *(name.removeprefix(f"{model.base_model_prefix}.") for name in buffers),
        }
        return sorted(name for name in self.source.names if name not in known
                      and not any(pattern.search(name) for pattern in ignored))  # fmt: skip

    def _layer_of(self, name: str) -> int | None:
        """Return the layer of a parameter of a router, or of experts, that transformers 5 renames or joins."""
        anatomy = self._anatomy
        if anatomy is None:
            return None
        layers = [i for i in range(anatomy.layers) if name.startswith(f"{anatomy.layer_path(i)}.mlp.")]
        return layers[0] if layers and anatomy.experts_of(layers[0]) else None

    def stored_name(self, name: str) -> str | None:
        """Return what the files call a parameter; None for joined experts, which are several there."""
        return self._names.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a parameter by its name in the model, in the stored type; only they are read."""
        stored = self._names.get(name)
        return self.read([name])[name][start:stop] if stored is None else self.source.read(stored, start, stop)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Return parameters by their names in the model, in the stored type."""
        found = {name: self.source.read(self._names[name]) for name in names if name in self._names}
        joined = [name for name in names if name not in self._names]
        for layer in sorted({layer for name in joined if (layer := self._layer_of(name)) is not None}):
            assert self._anatomy is not None
            path = f"{self._anatomy.mixture_path(layer)}."
            parts = {name: self.source.read(name) for name in self.source.files.tensors if name.startswith(path)}
            built = built_layout(self._anatomy, parts, joined)
            found |= {name: built[name] for name in joined if name in built}
        return found


class _Slots:
    """Some parameters of a model that are filled and emptied together."""

    def __init__(self, model: nn.Module, names: list[str], weights: StoredWeights, device: torch.device) -> None:
        self._names, self._weights, self._device = names, weights, device
        self._places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        self._empty = {name: owner._parameters[leaf] for name, (owner, leaf) in self._places.items()}

    def fill(self, *_: Any) -> None:
        """Read the parameters; those that were one stay one."""
        made: dict[int, nn.Parameter] = {}
        first = {id(self._empty[name]): name for name in reversed(self._names)}
        for name, tensor in self._weights.read(list(first.values())).items():
            wide = tensor.to(self._device).float()
            made[id(self._empty[name])] = nn.Parameter(wide, requires_grad=False)
        for name, (owner, leaf) in self._places.items():
            owner._parameters[leaf] = made[id(self._empty[name])]

    def empty(self, *_: Any) -> None:
        """Give the parameters up."""
        for name, (owner, leaf) in self._places.items():
            owner._parameters[leaf] = self._empty[name]


class _EmbeddingRows:
    """Lets an embedding see a table of the rows that a batch asks for, and ids that count in it."""

    def __init__(self, name: str, weights: StoredWeights, device: torch.device) -> None:
        stored = weights.stored_name(name)
        assert stored is not None
        self._stored, self._source, self._device = stored, weights.source, device

    def fill(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Read the rows."""
        self._empty = module._parameters["weight"]
        unique, places = torch.unique(arguments[0].cpu(), return_inverse=True)
        rows = self._source.gather(self._stored, unique).to(self._device)
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        return (places.to(self._device), *arguments[1:])

    def empty(self, module: nn.Module, *_: Any) -> None:
        """Give the rows up."""
        module._parameters["weight"] = self._empty


def offloaded_model(folder: Path, config: PretrainedConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a model that reads its layers from `folder` as they run.

    It computes what the resident one computes; its parameters must not be trained, and outside of a layer's forward
    pass that layer has none. Raises UnsupportedModel for a checkpoint whose files name other tensors.
    """
    device = torch.device(device)
    model = weightless_model(config)
    weights = StoredWeights(model, folder)
    layers = repeated_layers(model)
    paths = {id(module): name for name, module in model.named_modules()}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    rest = set(names)
    for layer in layers:
        path = f"{paths[id(layer)]}."
        own = [name for name in names if name.startswith(path)]
        rest -= set(own)
        slots = _Slots(model, own, weights, device)
        layer.register_forward_pre_hook(slots.fill)
        layer.register_forward_hook(slots.empty, always_call=True)
    embedding: Any = model.get_input_embeddings()
    name, head = f"{paths[id(embedding)]}.weight", model.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and name in rest and getattr(head, "weight", None) is not embedding.weight:
        rest.remove(name)
        embedding.padding_idx = None  # of use to gradients only, and it counts rows of the whole table
        rows = _EmbeddingRows(name, weights, device)
        embedding.register_forward_pre_hook(rows.fill)
        embedding.register_forward_hook(rows.empty, always_call=True)
    _Slots(model, [name for name in names if name in rest], weights, device).fill()
    _place_buffers(model, weights, device)
    return model


def sharded_model(
    folder: Path, config: PretrainedConfig, device: torch.device | str, processes: Processes
) -> PreTrainedModel:
    """Return a model to read from that is sharded over the processes; each reads its own rows of every tensor.

    So no process ever holds the whole of it. All processes must call it in step. Raises as `offloaded_model` does.
    """
    device = torch.device(device)
    model = weightless_model(config)
    weights = StoredWeights(model, folder)
    shard(model, processes, device.type, keeps_root=True)
    fill_sharded(model, lambda name, start, stop: weights.rows(name, start, stop).to(device).float())
    _place_buffers(model, weights, device)
    return model


def _place_buffers(model: nn.Module, weights: StoredWeights, device: torch.device) -> None:
    """Move the buffers to the device; those that a file holds are read."""
    stored: Mapping[str, Tensor] = {n: weights.source.read(n) for n, _ in model.named_buffers() if n in weights.source}
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        value = stored[name].to(buffer.dtype) if name in stored else buffer
        model.get_submodule(path)._buffers[leaf] = value.to(device)
