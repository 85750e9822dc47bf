"""Text that a model writes: given beginnings go on with tokens drawn from its own distribution.

The tokens come from the full distribution at the given temperature: likelier tokens alone would never show the tail,
and what learns from such text learns what the model really says. Keys and values of the past are kept, so a window
costs about as much as one pass of training on it. Draws are made on the CPU, alike on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["continued"]


@torch.no_grad()
def continued(
    model: nn.Module, prompts: Tensor, length: int, draws: torch.Generator | None = None, temperature: float = 1.0
) -> Tensor:
    """Return int64 [B, length] on the CPU: `prompts` [B, P] and what a causal model of transformers says next.

    `draws` None takes torch's default generator. `temperature` 0 takes the most probable token.
    """
    device = next(model.parameters()).device
    call: Any = model
    text = news = prompts.to("cpu", torch.long)
    past = None
    while text.shape[1] < length:
        # Nothing is padded, and without a mask every model takes its plain causal path.
        out = call(input_ids=news.to(device), past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = out.past_key_values, out.logits[:, -1].float().cpu()
        if temperature == 0:
            news = logits.argmax(-1, keepdim=True)
        else:
            news = torch.multinomial((logits / temperature).softmax(-1), 1, generator=draws)
        text = torch.cat([text, news], dim=1)
    return text
