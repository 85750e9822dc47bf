"""The processes of a `torchrun` launch, and a model sharded over them with FSDP2.

Every process calls `train` with the same plain module. `Sharded` makes a second module of it whose decoder layers and
root are sharded by `torch.distributed.fsdp.fully_shard` (ZeRO-3; Zhao et al. 2023, arXiv 2304.11277): each process
holds 1/n of weights, gradients and moments, and gathers one layer at a time. The plain module waits (on the CPU, if it
came on a GPU) and gets the trained weights at the end, in every process, so that the next step of a pipeline
meets the type it expects. `fully_shard` itself has no way back.

gloo carries CPU tensors and Python objects, NCCL CUDA tensors. A launch on several machines needs one file system.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

__all__ = ["Processes", "Sharded", "fill_sharded", "repeated_layers", "shard", "sharded_reader", "whole"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls, device: torch.device) -> Processes:
        """Return the processes of this launch; joins them on the first call under `torchrun`."""
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return cls()
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Return whether this process writes the files that exist once."""
        return self.rank == 0

    def device(self, asked: torch.device) -> torch.device:
        """Return where this process computes if `asked` for a kind of device: under `torchrun` its own GPU."""
        if asked.type != "cuda" or self.world == 1:
            return asked
        return torch.device("cuda", torch.cuda.current_device())

    def shared(self, value: _T) -> _T:
        """Return the first process's `value` in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, values: list[float]) -> list[float]:
        """Return the mean of each value over the processes."""
        if self.world == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together)
        return [value / self.world for value in together.tolist()]

    def wait(self) -> None:
        """Return when every process has come here."""
        self.mean([0.0])


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the members of the longest outermost `nn.ModuleList`: a decoder's layers, whatever the family's names."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [m for name, m in lists.items() if not any(name.startswith(f"{o}.") for o in lists if o != name)]
    return list(max(outermost, key=len, default=[]))


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together (every process must call), any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_reader(plain: nn.Module, processes: Processes) -> nn.Module:
    """Return a module that only reads: `plain` itself in one process, a sharded twin of it in several.

    Each process holds 1/n of the twin's weights and gathers a layer at a time. Those outside the layers stay gathered
    from the twin's forward pass on, so that a head can be read after it. `plain` waits on the CPU, whole.
    """
    if processes.world == 1:
        return plain
    device = next(plain.parameters()).device
    if device.type == "cuda":
        plain.to(torch.device("cuda", torch.cuda.current_device()))
    twin = copy.deepcopy(plain, {id(p): p for p in plain.parameters()}).eval().requires_grad_(False)
    shard(twin, processes, device.type, keeps_root=True)
    if device.type == "cuda":
        plain.to("cpu")
    return twin


def shard(module: nn.Module, processes: Processes, device_type: str, *, keeps_root: bool = False) -> None:
    """Shard decoder layers and root in place; with `keeps_root` what is outside the layers stays gathered, once it is.

    Parameters may be on the meta device still: `fill_sharded` gives them values.
    """
    mesh = init_device_mesh(device_type, (processes.world,))
    for layer in repeated_layers(module):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=False if keeps_root else None)


def fill_sharded(module: nn.Module, rows_of: Callable[[str, int, int], Tensor]) -> None:
    """Give the parameters of a sharded module that is on the meta device this process's rows of each of them.

    `rows_of(name, start, stop)` returns those rows of a parameter, on the device they are to stay on.
    """
    parameters: dict[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        if id(parameter) in made:
            continue
        mesh, length = parameter.device_mesh, parameter.shape[0]
        most = -(-length // mesh.size())
        start = min(length, mesh.get_local_rank() * most)
        rows = rows_of(name, start, min(length, start + most))
        value = DTensor.from_local(rows, mesh, parameter.placements, run_check=False, shape=parameter.shape,
                                   stride=parameter.stride())  # fmt: skip
        made[id(parameter)] = nn.Parameter(value, requires_grad=False)
    module.load_state_dict({name: made[id(p)] for name, p in parameters.items()}, strict=False, assign=True)


class Sharded:
    """The module to train: `plain` itself in one process, a sharded twin of it in several."""

    def __init__(self, plain: nn.Module, processes: Processes) -> None:
        self._plain = plain
        self.module = plain
        self._device = next(plain.parameters()).device
        if processes.world > 1:
            self.module = self._twin(processes)

    def _twin(self, processes: Processes) -> nn.Module:
        """Return a sharded module that starts from the plain one's weights, without a second full copy of them."""
        if self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._plain.to(self._device)
        twin = copy.deepcopy(self._plain, {id(p): p for p in self._plain.parameters()})
        shard(twin, processes, self._device.type)
        if self._device.type == "cuda":
            self._plain.to("cpu")
        return twin

    def release(self) -> None:
        """Leave the plain module on the device it came on."""
        if self.module is not self._plain:
            self._plain.to(self._device)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the trained weights to the plain module, in every process."""
        if self.module is self._plain:
            return
        plain = dict(self._plain.named_parameters())
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                plain[name].copy_(whole(parameter))
        for own, trained in zip(self._plain.buffers(), self.module.buffers(), strict=True):
            own.copy_(trained)
