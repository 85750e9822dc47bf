"""Where recovery begins: the best low-rank part of the error of weights and of outputs, by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.adapters.attach import adapter_config, attach, target_names
from dwindle.adapters.error_start import largest_errors, largest_output_errors
from dwindle.adapters.options import RecoverOptions
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized

pytest.importorskip("peft")
RANK = 4
IDS = torch.randint(97, 123, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def starts(tiny_bundle: Callable[..., Any]) -> dict[str, Any]:
    teacher = tiny_bundle("llama", initializer_range=0.2)
    base = quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0]
    names = target_names(base, ("all",), RANK)
    adapted = attach(base, adapter_config(base, RecoverOptions(rank=RANK), names))
    inputs: dict[str, Tensor] = {}
    hooks = [base.model.get_submodule(name).register_forward_hook(
                 lambda module, given, out, name=name: inputs.update({name: given[0].flatten(0, 1).double()}))
             for name in names]  # fmt: skip
    with torch.no_grad():
        base.model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    lost = {name: (teacher.model.get_submodule(name).weight - base.model.get_submodule(name).weight).detach().double()
            for name in names}  # fmt: skip
    return {"names": names, "inputs": inputs, "lost": lost, "error": largest_errors(base, teacher, adapted, names),
            "outputs": largest_output_errors(base, teacher, adapted, names, IDS)}  # fmt: skip


def left(starts: dict[str, Any], kind: str, name: str) -> Tensor:
    """What the adapter leaves of a linear's error; alpha is 2 r, so the product counts twice."""
    a, b = (starts[kind][f"base_model.model.{name}.lora_{leaf}.weight"].double() for leaf in "AB")
    return starts["lost"][name] - 2 * b @ a


def test_the_weights_start_is_the_best_of_its_rank(starts: dict[str, Any]) -> None:
    for name in starts["names"]:
        sigma = torch.linalg.svdvals(starts["lost"][name])
        assert left(starts, "error", name).norm() == pytest.approx(float(sigma[RANK:].norm()), rel=1e-5)


def test_the_outputs_start_repairs_more_of_the_outputs_and_no_rank_of_that_size_more(starts: dict[str, Any]) -> None:
    for name in starts["names"]:
        read = starts["inputs"][name]
        moment = read.T @ read
        moment = moment / moment.diagonal().mean() + 0.1 * torch.eye(len(moment), dtype=torch.float64)
        root = torch.linalg.cholesky(moment)
        ours, theirs = ((left(starts, kind, name) @ root).norm() for kind in ("outputs", "error"))
        least = torch.linalg.svdvals(starts["lost"][name] @ root)[RANK:].norm()
        assert ours <= theirs
        assert float(ours) == pytest.approx(float(least), rel=1e-4)


def test_a_part_of_the_linears_is_begun_alone(starts: dict[str, Any], tiny_bundle: Callable[..., Any]) -> None:
    teacher = tiny_bundle("llama", initializer_range=0.2)
    base = quantized(teacher, QuantizeOptions(scheme="palettize", bits=2))[0]
    names = target_names(base, ("v", "down"), RANK)
    adapted = attach(base, adapter_config(base, RecoverOptions(rank=RANK), names))
    found = largest_output_errors(base, teacher, adapted, names, IDS)
    for name, tensor in found.items():
        assert torch.allclose(tensor.abs(), starts["outputs"][name].abs(), atol=1e-4), name
