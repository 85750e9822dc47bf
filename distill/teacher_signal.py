"""What a teacher says about a batch, in the form it has: hidden states before its head, logits, or a few tokens.

The objective sees this small type only, and cannot tell a live teacher from one read from disk. A live teacher gives
hidden states [N, D] and its head: N * V logits are never held (`fused_loss` makes them a chunk at a time).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dwindle.distill.head import Head, HeadStates, ModelTail, inside
from dwindle.distill.layer_match import LayerOutputs
from dwindle.distill.sparse_targets import SparseTargets
from dwindle.distill.teacher_model import Teacher
from dwindle.errors import RecipeError
from dwindle.measure import LogitSlices
from dwindle.sharding import Processes, sharded_reader

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.vocabulary_map import VocabularyMap

__all__ = ["LiveTeacher", "SeveralTeachers", "TeacherSignal", "TeacherTargets", "logit_slices"]


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's word on N positions; `states`, `logits` and `sparse` are three forms of one thing."""

    top1: Tensor | None = None
    """[N] most probable tokens; None where they have to be found in the logits."""
    logits: Tensor | None = None
    """[N, V]."""
    sparse: SparseTargets | None = None
    """Weighted tokens in place of the logits: what a cache has."""
    states: tuple[HeadStates, ...] = ()
    """Hidden states and head of each teacher."""
    shares: tuple[float, ...] = (1.0,)
    """Each teacher's part in the mean of their probabilities; together 1."""
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    """Hidden states [N, D] after the decoder layers asked for, counted from 1."""

    @property
    def sources(self) -> tuple[HeadStates | Tensor, ...]:
        """Return what logits are made of: for each teacher its states, or the logits themselves."""
        return self.states or (() if self.logits is None else (self.logits,))

    def at(self, index: Tensor) -> TeacherTargets:
        """Return the targets of some positions."""

        def chosen(values: Tensor) -> Tensor:
            return values[index.to(values.device)]

        return TeacherTargets(
            None if self.top1 is None else chosen(self.top1), None if self.logits is None else chosen(self.logits),
            None if self.sparse is None else self.sparse.at(index.to(self.sparse.ids.device)),
            tuple(states.at(index) for states in self.states), self.shares,
            {layer: chosen(hidden) for layer, hidden in self.layers.items()},
        )  # fmt: skip


class TeacherSignal(Protocol):
    """Where targets come from."""

    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the targets at the B * T positions of `ids` [B, T]."""
        ...


class LiveTeacher:
    """Runs the teacher on every batch, without gradients; its hidden states stay on its device.

    Under `torchrun` the teacher is sharded over the processes, as the student is, if it is not yet, unless each is to
    run it by itself (`alone`) or its weights are on the disk anyway.

    With `mapped` batches are in the ids of a pruned vocabulary, and the head is cut to the tokens of it. `layers` names
    the decoder layers (counted from 1) of which hidden states are wanted.
    """

    def __init__(
        self, teacher: ModelBundle | Teacher, *, mapped: VocabularyMap | None = None, layers: Sequence[int] = (),
        alone: bool = False,
    ) -> None:  # fmt: skip
        self._teacher = Teacher.of(teacher)
        self._device, plain = self._teacher.device, self._teacher.model
        shares = not (alone or self._teacher.offloaded or self._teacher.sharded)
        self._model: Any = sharded_reader(plain, Processes.current(self._device)) if shares else plain
        self._mapped, self._layers = mapped, tuple(layers)
        self._head: Head | ModelTail | None = None

    @torch.no_grad()
    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the teacher's targets for `ids` [B, T]."""
        read = ids.to(self._device)
        if self._mapped is not None:
            read = self._mapped.old_ids(read)

        def forward(read: Tensor) -> Tensor:
            # The mask of ones: nothing is padded, so attention may take its causal fast path (see core.measure).
            decoder = self._teacher.decoder(self._model)
            found = decoder(input_ids=read, attention_mask=torch.ones_like(read), use_cache=False)
            if self._head is None:  # the weights outside the layers are gathered now, and stay so
                head = self._teacher.head(self._model)
                self._head = head if self._mapped is None else head.rows(self._mapped.rows(self._device))
            hidden: Tensor = found.last_hidden_state.flatten(0, 1)
            return hidden

        with LayerOutputs(self._model, self._layers) as outputs:
            hidden = inside(self._model, forward, read)
        assert self._head is not None
        return TeacherTargets(states=(HeadStates(hidden, self._head),), layers=outputs.flat())


def logit_slices(teacher: Teacher, mapped: VocabularyMap | None = None) -> LogitSlices:
    """Return what gives a teacher's logits slice by slice, never [B, T, V] at once, in this process alone."""
    live = LiveTeacher(teacher, mapped=mapped, alone=True)

    def slices(ids: Tensor, n: int) -> Iterator[Tensor]:
        states = live.targets(ids).states[0]
        for part in torch.split(states.hidden, n):
            yield states.head.logits(part).float()

    return slices


class SeveralTeachers:
    """Several live teachers as one: the mean of their probabilities, weighted by `shares`.

    The mean of probabilities and not of logits, since it is what a reader who asked one of the teachers at random
    would see. Layers to match are the first teacher's.
    """

    def __init__(self, teachers: Sequence[TeacherSignal], shares: Sequence[float]) -> None:
        if len(teachers) != len(shares) or not all(share > 0 for share in shares):
            raise RecipeError(f"distill: {len(teachers)} teachers with the shares {list(shares)} (needed: one share "
                              "above 0 for each).")  # fmt: skip
        self._teachers = tuple(teachers)
        self._shares = tuple(share / sum(shares) for share in shares)

    def targets(self, ids: Tensor) -> TeacherTargets:
        """Return the targets of all teachers for `ids` [B, T]."""
        found = [teacher.targets(ids) for teacher in self._teachers]
        states = tuple(states for targets in found for states in targets.states)
        return TeacherTargets(states=states, shares=self._shares, layers=found[0].layers)
