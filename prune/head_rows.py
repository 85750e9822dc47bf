"""Which rows of q and k, and columns of o, belong to a KV group: whole heads, queries in the order of their groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dwindle.prune.shape import Shape

__all__ = ["group_rows", "head_rows"]


def group_rows(shape: Shape, groups: Sequence[int]) -> Tensor:
    """Return the rows of k (or v) of these KV groups."""
    return _rows(torch.tensor(groups), shape.head_dim)


def head_rows(shape: Shape, groups: Sequence[int]) -> Tensor:
    """Return the rows of q (or columns of o) of the query heads of these KV groups."""
    return _rows(torch.tensor(groups), shape.head_dim * shape.queries_per_group)


def _rows(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()
