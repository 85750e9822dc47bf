r"""Starting weights of the teacher: two layers that can copy before the first training step.

Answering a question about a story is copying: find the earlier place that looks like this one, and write what came
next. Transformers do it with a pair of heads (Olsson et al. 2022, "In-context learning and induction heads",
arXiv 2209.11895) that training from random weights finds late: after 2.1 million tokens a teacher begun at random had
learned the stories' grammar and answered 5 of 96 questions. So the pair is wired here, and training only has to use it:

    layer 0, a previous-token head.  score(m, n) = sum_i A^2 cos(theta_i (m - n - 1)),  largest at n = m - 1
    layer 1, two induction heads.    score(m, n) = S^2 <P x_m, P x_{n-1}>,              large where x_{n-1} is x_m

The first needs a query and a key that are the same for every token: channel 0 of every embedding holds a constant
(with tied embeddings that moves all logits alike, so no prediction changes). The rotation by one step lies in the
query, over the fast frequencies of the rotary embedding. It copies a projection P of the token before into channels
that no embedding uses. The second compares tokens over the slow frequencies, which hardly turn within a story, and adds
the matched token's own embedding to the residual stream, which the tied head reads as a vote for that token.

Everything else starts as transformers starts it, with the outputs of each block scaled down so that they do not drown
the wiring. Nothing is frozen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

__all__ = ["wire_copying"]

_EMBEDDING_STD = 0.04
_CONSTANT = 0.24  # channel 0 of every embedding
_RESERVED = 32  # last channels: what the previous-token head writes
_OUTPUT_SCALE = 0.3  # of the blocks that are not wired
_SHARPNESS = 13.0  # A
_MATCH = 2.5  # S
_VOTE = 0.4  # how strongly a matched token is written
_FAST, _SLOW = 8, 9  # rotary frequencies: of 16, the fastest 8 tell positions, the slowest 9 compare tokens


@torch.no_grad()
def wire_copying(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Overwrite the embeddings and three heads of an untrained model so that it copies.

    Args:
        model: Llama with tied embeddings, head_dim 32, two query heads per key-value head, at least two layers.
        seed: Of the embeddings and the projection.
    """
    config = model.config
    width = config.hidden_size
    if config.head_dim != 32 or config.num_attention_heads < 4 or not config.tie_word_embeddings or width < 128:
        raise ValueError(
            f"wire_copying: found head_dim={config.head_dim}, {config.num_attention_heads} heads, width {width}, "
            f"tied={config.tie_word_embeddings}; needs head_dim 32, at least 4 heads, width 128 and tied embeddings."
        )
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= _OUTPUT_SCALE
        layer.mlp.down_proj.weight *= _OUTPUT_SCALE
    generator = torch.Generator().manual_seed(seed)
    used = width - _RESERVED - 1
    _write_embeddings(model.get_input_embeddings().weight, used, generator)
    projection = torch.zeros(64, width)
    projection[:, 1 : used + 1] = torch.linalg.qr(torch.randn(used, 64, generator=generator))[0].T
    norm = math.sqrt((_CONSTANT**2 + used * _EMBEDDING_STD**2) / width)  # what RMSNorm divides an embedding by
    _wire_previous_token(model, projection[:32], norm)
    for key_value_head, compared in ((0, slice(0, 2 * _SLOW)), (1, slice(32 - 2 * _SLOW, 32))):
        _wire_induction(model, projection, key_value_head, compared)


def _write_embeddings(weight: Tensor, used: int, generator: torch.Generator) -> None:
    """Random embeddings of one length in the used channels, the constant before them, nothing after."""
    weight.normal_(0, _EMBEDDING_STD, generator=generator)
    weight[:, used + 1 :] = 0
    weight[:, 0] = 0
    weight *= _EMBEDDING_STD * used**0.5 / weight.norm(dim=1, keepdim=True)
    weight[:, 0] = _CONSTANT


def _wire_previous_token(model: LlamaForCausalLM, projection: Tensor, norm: float) -> None:
    """Head 0 of layer 0 copies `projection` [32 x D] of the token before into the reserved channels."""
    attention = model.model.layers[0].self_attn
    angles = 10000 ** (-torch.arange(16) / 16.0)
    fast = (torch.arange(16) < _FAST).float()
    unit = _SHARPNESS / (_CONSTANT / norm)
    attention.q_proj.weight[:32] = 0
    attention.k_proj.weight[:32] = 0
    attention.q_proj.weight[:32, 0] = unit * torch.cat([fast * torch.cos(angles), -fast * torch.sin(angles)])
    attention.k_proj.weight[:32, 0] = unit * torch.cat([fast, torch.zeros(16)])
    attention.v_proj.weight[:32] = projection * norm / _EMBEDDING_STD
    attention.o_proj.weight[:, :32] = 0
    attention.o_proj.weight[-_RESERVED:, :32] = torch.eye(_RESERVED) * _EMBEDDING_STD


def _wire_induction(model: LlamaForCausalLM, projection: Tensor, key_value_head: int, compared: slice) -> None:
    """A head of layer 1 looks for the token after an earlier copy of this one and votes for it.

    `compared` are the projected channels it matches on; each head votes with its own half of the 64 projections.
    """
    attention = model.model.layers[1].self_attn
    width = projection.shape[1]
    slots = torch.cat([torch.arange(16 - _SLOW, 16), torch.arange(32 - _SLOW, 32)])
    query, key = torch.zeros(32, width), torch.zeros(32, width)
    query[slots] = _MATCH * projection[:32][compared]
    key[slots, torch.arange(width - _RESERVED, width)[compared]] = _MATCH
    query_rows = slice(64 * key_value_head, 64 * key_value_head + 32)
    key_rows = slice(32 * key_value_head, 32 * key_value_head + 32)
    attention.q_proj.weight[query_rows] = query
    attention.k_proj.weight[key_rows] = key
    attention.v_proj.weight[key_rows] = projection[key_rows]
    attention.o_proj.weight[:, query_rows] = _VOTE * projection[key_rows].T
