"""The experts of a model under one set of names, whatever the version of transformers that built it.

Checkpoint files hold a router and three linears per expert (`block_sparse_moe.experts.3.w1`, or
`mlp.experts.3.gate_proj`), and so does a model of transformers 4.57. transformers 5 calls the block `mlp` in every
family and holds all experts of a layer in two parameters, gate above up,

    mlp.experts.gate_up_proj [E, 2 F, D]        mlp.experts.down_proj [E, D, F]

which it splits and joins as it writes and reads. Everything here speaks the files' names (`Anatomy.router`,
`expert_parts`): `stored_layout` renames and splits, `built_layout` goes back. Splitting gives views; nothing is copied.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dwindle.families import family_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dwindle.anatomy import Anatomy

__all__ = ["built_layout", "mixture_module", "name_expert_count", "stored_layout", "stored_parameter"]

_BUILT = "mlp"
"""What transformers 5 calls the block with router and experts."""
_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"


def name_expert_count(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config dict with the number of experts under the key that all versions read.

    transformers 5 writes qwen3_moe's `num_experts` as `num_local_experts`, for which 4.57 would take its default.

    >>> name_expert_count({"model_type": "qwen3_moe", "num_local_experts": 8})
    {'model_type': 'qwen3_moe', 'num_experts': 8}
    """
    config = dict(raw)
    keys = family_of(raw.get("model_type")).experts
    if keys is not None and keys.count_key == "num_experts" and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config


def mixture_module(model: nn.Module, anatomy: Anatomy, layer: int) -> str:
    """Return the full name that the block with a layer's router and experts has in a loaded model."""
    names = {name for name, _ in model.get_submodule(anatomy.layer_path(layer)).named_children()}
    path = anatomy.mixture_path(layer)
    return path if path.rpartition(".")[2] in names else f"{anatomy.layer_path(layer)}.{_BUILT}"


def stored_parameter(model: nn.Module, anatomy: Anatomy, name: str) -> Tensor:
    """Return a loaded model's parameter by its name in files; of joined experts a view of their rows."""
    layer = next((i for i in _numbered(name) if i < anatomy.layers and anatomy.experts_of(i)), None)
    if layer is None or not name.startswith(f"{anatomy.mixture_path(layer)}."):
        return model.get_parameter(name)
    built, leaf = mixture_module(model, anatomy, layer), name.removeprefix(f"{anatomy.mixture_path(layer)}.")
    joined = model.get_submodule(built).get_submodule("experts")
    found = re.fullmatch(r"experts\.(\d+)\.\w+\.weight", leaf)
    if found is None or not hasattr(joined, "gate_up_proj"):
        return model.get_parameter(f"{built}.{leaf}")
    expert = int(found[1])
    parts = {path: part for part, path in anatomy.expert_parts(layer, expert).items()}
    part = parts[name.removesuffix(".weight")]
    if part == "down":
        return joined.get_parameter("down_proj")[expert]
    return joined.get_parameter("gate_up_proj")[expert].chunk(2)[0 if part == "gate" else 1]


def _numbered(name: str) -> list[int]:
    """Return the number of the layer that a full name lies in, if it lies in one.

    >>> _numbered("model.layers.3.mlp.gate.weight"), _numbered("model.norm.weight")
    ([3], [])
    """
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return [int(found[1])] if found else []


def stored_layout(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors by their names in checkpoint files; those of a dense model as they are."""
    layers = {f"{anatomy.layer_path(i)}.{_BUILT}.": i for i in range(anatomy.layers) if anatomy.experts_of(i)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = ".".join(name.split(".")[:4]) + "."
        if path not in layers:
            found[name] = tensor
            continue
        layer, leaf = layers[path], name.removeprefix(path)
        if leaf == _GATE_UP:
            for expert, both in enumerate(tensor.unbind()):
                parts = anatomy.expert_parts(layer, expert)
                found[f"{parts['gate']}.weight"], found[f"{parts['up']}.weight"] = both.chunk(2)
        elif leaf == _DOWN:
            for expert, down in enumerate(tensor.unbind()):
                found[f"{anatomy.expert_parts(layer, expert)['down']}.weight"] = down
        else:
            found[f"{anatomy.mixture_path(layer)}.{leaf}"] = tensor
    return found


def built_layout(anatomy: Anatomy, tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return tensors named as in checkpoint files by the names a model has: `names`, its state dict's keys."""
    import torch

    found = dict(tensors)
    for layer in range(anatomy.layers):
        experts, built = anatomy.experts_of(layer), f"{anatomy.layer_path(layer)}.{_BUILT}"
        if experts is None or f"{built}.{_GATE_UP}" not in names:
            continue
        rows = [anatomy.expert_parts(layer, expert) for expert in range(experts.count)]
        if f"{rows[0]['gate']}.weight" not in found:  # another layer's tensors were given
            continue
        taken = [{part: found.pop(f"{name}.weight") for part, name in row.items()} for row in rows]
        found[f"{built}.{_GATE_UP}"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in taken])
        found[f"{built}.{_DOWN}"] = torch.stack([one["down"] for one in taken])
        path = f"{anatomy.mixture_path(layer)}."
        for name in [name for name in found if name.startswith(path)]:
            found[f"{built}.{name.removeprefix(path)}"] = found.pop(name)
    return found
