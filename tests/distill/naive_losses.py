"""Every loss as its formula reads, for autograd in float64: what the library's own gradients are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def naive_rows(name: str, student: Tensor, teacher: Tensor, labels: Tensor, **given: float) -> Tensor:
    """Return the values [N] of a loss, with T^2; `student` and `teacher` are logits [N, V]."""
    temperature = given.get("temperature", 1.0)
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    top1, value = teacher.argmax(-1), None
    if name == "forward_kl":
        value = kl(p, q)
    elif name == "reverse_kl":
        value = kl(q, p)
    elif name == "jsd":
        beta = given["beta"]
        m = beta * p + (1 - beta) * q
        value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    elif name == "skew_kl":
        value = kl(p, given["alpha"] * p + (1 - given["alpha"]) * q)
    elif name == "skew_reverse_kl":
        value = kl(q, (1 - given["alpha"]) * p + given["alpha"] * q)
    elif name == "top_k":
        ids = p.topk(int(given["k"]), -1).indices
        p_k, q_k = p.gather(1, ids), q.gather(1, ids)
        p_all, q_all = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p_k, q_k))
        value = kl(p_all, q_all)
    elif name == "taid":
        t = given["t"]
        target = torch.softmax(((1 - t) * student.detach() + t * teacher) / temperature, -1)
        value = kl(target, q)
    elif name == "top1_blend":
        share = given["share"]
        value = share * F.cross_entropy(student, top1, reduction="none")
        value = value + (1 - share) * F.cross_entropy(student, labels, reduction="none")
    elif name == "label_cross_entropy":
        value = F.cross_entropy(student, labels, reduction="none")
    assert value is not None, name
    return temperature**2 * value
