"""The default start against least squares on what the whole models read and give out, damping as further rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.adapters.attach import adapter_config, attach, fill, target_names
from dwindle.adapters.divergence_start import largest_divergences
from dwindle.adapters.error_start import largest_output_errors
from dwindle.adapters.linear_moments import gradient_moments, weights_frozen
from dwindle.adapters.options import RecoverOptions
from dwindle.decoder_blocks import InMemoryBlocks
from dwindle.divergence import forward_kl
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
RANK = 4
IDS = torch.randint(97, 123, (32, 24), generator=torch.Generator().manual_seed(0))


def begun(tiny_bundle: Callable[..., Any], family: str, targets: tuple[str, ...] = ("all",)) -> dict[str, Any]:
    teacher = tiny_bundle(family, initializer_range=0.2)
    base = quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0]
    names = target_names(base, targets, RANK)
    adapted = attach(base, adapter_config(base, RecoverOptions(rank=RANK), names))
    found = largest_divergences(base, teacher, adapted, names, IDS)
    return {"teacher": teacher, "base": base, "adapted": adapted, "names": names, "found": found}


def whole_run(model: Any, anatomy: Any, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What every linear reads in a pass of the whole model, and the residual stream beside it."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    stream: list[Tensor] = []
    hooks = []
    for layer in range(anatomy.layers):
        for norm in anatomy.layer_norms(layer)[:2]:
            hooks.append(model.get_submodule(norm).register_forward_pre_hook(lambda m, given: stream.append(given[0])))
    for name in names:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(
            lambda m, given, name=name: kept.update({name: (given[0].flatten(0, 1).double(),
                                                            stream[-1].flatten(0, 1).double())})))  # fmt: skip
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_no_product_of_the_rank_leaves_less(family: str, tiny_bundle: Callable[..., Any]) -> None:
    made = begun(tiny_bundle, family)
    teacher, base, names = made["teacher"], made["base"], made["names"]
    ours, theirs = (whole_run(one.model, base.anatomy, names) for one in (made["adapted"], teacher))
    blocks, checked = InMemoryBlocks(teacher), 0
    with torch.no_grad(), weights_frozen(teacher.model):
        states = blocks.embed(IDS)
        for layer in range(base.anatomy.layers):
            parts = base.anatomy.parts(layer)
            modules = {name: teacher.model.get_submodule(name) for name in parts.values()}
            slopes = gradient_moments(blocks, layer, modules, [states])
            for part, name in parts.items():
                dense, codes = (one.model.get_submodule(name).weight.detach().double() for one in (teacher, base))
                (given, stream), (wanted, float_stream) = ours[name], theirs[name]
                missing = wanted @ dense.T - given @ codes.T
                if part in ("o", "down"):
                    missing = missing + float_stream - stream
                damping = 0.1 * (given**2).sum() / given.shape[1]
                rows = torch.cat([given, damping.sqrt() * torch.eye(given.shape[1], dtype=torch.float64)])
                missing = torch.cat([missing, damping.sqrt() * (dense - codes).T])
                slope = slopes[name] / slopes[name].diagonal().mean()
                weigh = torch.linalg.cholesky(slope + 0.1 * torch.eye(len(slope), dtype=torch.float64))
                best = torch.linalg.lstsq(rows, missing @ weigh).solution
                least = ((missing @ weigh - rows @ best) ** 2).sum() + (
                    torch.linalg.svdvals(rows @ best)[RANK:] ** 2).sum()  # fmt: skip
                a, b = (made["found"][f"base_model.model.{name}.lora_{leaf}.weight"].double() for leaf in "AB")
                left = (((missing - rows @ (2 * b @ a).T) @ weigh) ** 2).sum()  # alpha is 2 r
                assert float(left) == pytest.approx(float(least), rel=1e-3), name
                checked += 1
            states = blocks.forward(layer, states)
    assert checked == len(names)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3"])
def test_it_is_nearer_to_the_teacher_than_the_outputs_start(family: str, tiny_bundle: Callable[..., Any]) -> None:
    made = begun(tiny_bundle, family)
    other = attach(made["base"], adapter_config(made["base"], RecoverOptions(rank=RANK), made["names"]))
    fill(other.model, largest_output_errors(made["base"], made["teacher"], other, made["names"], IDS))
    new = torch.randint(97, 123, (16, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = made["teacher"].model(input_ids=new).logits.flatten(0, 1)
        ours, theirs, none = (forward_kl(one.model(input_ids=new).logits.flatten(0, 1), wanted).item()
                              for one in (made["adapted"], other, made["base"]))  # fmt: skip
    assert ours < theirs < none


def test_what_is_returned_is_what_the_adapter_holds_and_only_for_the_linears_asked_for(
    tiny_bundle: Callable[..., Any],
) -> None:
    made = begun(tiny_bundle, "llama", ("v", "down"))
    assert len(made["found"]) == 2 * 2 * made["base"].anatomy.layers
    assert all(("v_proj" in name) or ("down_proj" in name) for name in made["found"])
    again = attach(made["base"], adapter_config(made["base"], RecoverOptions(rank=RANK), made["names"]))
    fill(again.model, made["found"])
    with torch.no_grad():
        ours, theirs = (one.model(input_ids=IDS).logits for one in (made["adapted"], again))
    assert torch.equal(ours, theirs)
    assert all(weight.requires_grad for weight in made["teacher"].model.parameters())
