"""A PEFT adapter on a model as it is: float linears, or the exact codes of a quantized base.

PEFT's own layers do the arithmetic (LoRA, rsLoRA, DoRA), so the folder that is written loads wherever PEFT does. They
are injected into the model itself and not wrapped around it: the model stays the class that transformers made, and
everything that works on a bundle (measuring, training, generating) works on an adapted one.

A quantized linear stays packed. Its weight is rebuilt for each product and kept by none (`dwindle.quantized_model`),
so training holds the codes, A and B with their gradients and moments, and the activations: never a float twin.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwindle.adapters.options import AdapterOptions
from dwindle.anatomy import Anatomy, require_dense
from dwindle.errors import MissingExtra, RecipeError, offenders
from dwindle.quantized_model import QuantizedLinear
from dwindle.sharding import whole

if TYPE_CHECKING:
    from peft import LoraConfig

    from dwindle.bundle import ModelBundle

__all__ = ["adapter_config", "adapter_tensors", "attach", "fill", "target_names"]

NAME = "default"
"""PEFT's name of the one adapter that is on a model."""


def target_names(bundle: ModelBundle, targets: Iterable[str], rank: int) -> list[str]:
    """Return the full names of the linears that `targets` mean, in the order of the layers.

    Raises RecipeError with every target that means none (and the nearest that would), and every linear that is too
    small for the rank; UnsupportedModel for a model with experts.
    """
    anatomy = bundle.anatomy
    require_dense(anatomy, "adapter")
    parts = [anatomy.parts(layer) for layer in range(anatomy.layers)]
    known = [name for layer in parts for name in layer.values()]
    words = {"all", *parts[0], *(name.rpartition(".")[2] for name in known), *known}
    chosen, unknown = set[str](), []
    for target in targets:
        found = {name for layer in parts for part, name in layer.items()
                 if target in ("all", part, name) or name.endswith(f".{target}")}  # fmt: skip
        if not found:
            near = difflib.get_close_matches(target, words, n=1)
            unknown.append(f"{target} (nearest: {near[0]})" if near else target)
        chosen |= found
    if unknown:
        raise RecipeError(
            f"adapter: {len(unknown)} targets are no linears of this model: {', '.join(unknown)}. "
            f"Its parts are {', '.join(parts[0])}; 'all' means all of them."
        )
    shapes = {name: _shape(anatomy, name) for name in known if name in chosen}
    small = [f"{name} ({o} x {i})" for name, (o, i) in shapes.items() if rank > min(o, i)]
    if small:
        raise RecipeError(f"adapter: rank={rank} is larger than {len(small)} linears: {offenders(small)}. Lower it.")
    return list(shapes)


def _shape(anatomy: Anatomy, name: str) -> tuple[int, int]:
    return next(
        anatomy.linear_shape(layer, part)
        for layer in range(anatomy.layers)
        for part, found in anatomy.parts(layer).items()
        if found == name
    )


def adapter_config(bundle: ModelBundle, options: AdapterOptions, names: list[str]) -> LoraConfig:
    """Return PEFT's configuration of the adapter."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtra("Training an adapter", "adapters") from error
    config: LoraConfig = LoraConfig(
        r=options.rank,
        lora_alpha=options.scaled_by,
        lora_dropout=options.dropout,
        target_modules=names,
        use_rslora=options.kind == "rslora",
        use_dora=options.kind == "dora",
        task_type="CAUSAL_LM",
    )
    return config


def attach(bundle: ModelBundle, config: LoraConfig, seed: int = 0) -> ModelBundle:
    """Return a bundle of a copied model with a fresh adapter on it; only the adapter's weights are trainable.

    The adapter is without effect until it is trained or filled. Packed codes are shared with `bundle`, not copied.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear

    class PackedLoraLinear(LoraLinear):  # type: ignore[misc]
        """PEFT's LoRA over packed codes; PEFT asks for a class of one's own for layers that it does not know."""

    chosen = copy.deepcopy(config)
    chosen._register_custom_module({QuantizedLinear: PackedLoraLinear})
    packed = {id(tensor): tensor for tensor in bundle.model.buffers()}
    model: Any = copy.deepcopy(bundle.model, packed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT needs in_features and out_features only
        model = inject_adapter_in_model(chosen, model, adapter_name=NAME)
    return replace(bundle, model=model.to(bundle.model.device))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's weights on the CPU by the names of a PEFT folder; if sharded, every process must call."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=NAME)
    return {f"base_model.model.{name}": whole(tensor.detach()).cpu().contiguous() for name, tensor in found.items()}


def fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the adapter on `model` the weights of a PEFT folder; raise RecipeError for any that do not fit."""
    from peft import set_peft_model_state_dict

    own = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        told = [f"{name} {given.get(name, 'missing')} (needed: {own.get(name, 'none')})" for name in wrong]
        raise RecipeError(f"adapter: {len(wrong)} tensors do not fit this model: {offenders(told)}.")
    set_peft_model_state_dict(model, {n.removeprefix("base_model.model."): t for n, t in tensors.items()}, NAME)
