"""A model that writes: prompts in a batch, sampled with keys and values kept, the same text for the same seed.

`transformers`' own `generate` does the work, with a generation config of ours alone: what a checkpoint brings along
(penalties, a top-k) would make the text another than the model's own distribution. Prompts are padded in front.
A piece ends at EOS or BOS: models without an EOS put the next text's BOS behind a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dwindle.data.synthesis.kinds import Kind
from dwindle.errors import RecipeError
from dwindle.evaluation_mode import evaluating
from dwindle.model_source import quiet_transformers
from dwindle.tokenization import adds_bos, encode_plain

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["Draft", "Prompt", "Writer"]


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    ids: list[int]
    shown: list[int]
    """Those of them that the written text begins with."""


@dataclass(frozen=True)
class Draft:
    """What the model said to one prompt."""

    text: str
    """With the shown part of the prompt."""
    tokens: int
    ended: bool
    """It came to an end by itself."""


class Writer:
    """Writes with one model under one way of sampling."""

    def __init__(self, bundle: ModelBundle, *, temperature: float, top_p: float, most_tokens: int) -> None:
        self.bundle = bundle
        self.most_tokens = most_tokens
        tokenizer = bundle.tokenizer
        bos: Any = tokenizer.bos_token_id
        self._bos = [int(bos)] if bos is not None and (adds_bos(tokenizer) or tokenizer.chat_template is None) else []
        ends = {tokenizer.eos_token_id, bos, *_listed(getattr(bundle.model.generation_config, "eos_token_id", None))}
        self._ends = sorted(int(end) for end in ends - {None})
        self._temperature, self._top_p = temperature, top_p

    def prompt(self, kind: Kind, passage: str, seed: int, prefix_tokens: int) -> Prompt:
        """Return what the model is given. Raises RecipeError if it has nothing to begin with, or no room."""
        tokenizer = self.bundle.tokenizer
        shown: list[int] = []
        if kind.start == "template":
            request = kind.template.replace("{text}", passage)
            if tokenizer.chat_template is not None:
                message = [{"role": "user", "content": request}]
                ids = [int(i) for i in tokenizer.apply_chat_template(message, add_generation_prompt=True)]
            else:
                ids = self._bos + encode_plain(tokenizer, [f"{request}\n\n{kind.cue}"])[0]
        elif kind.start == "prefix":
            shown = encode_plain(tokenizer, [passage])[0][:prefix_tokens]
            ids = self._bos + shown
        elif kind.start == "token":
            special = set(tokenizer.all_special_ids)
            plain = [i for i in range(len(tokenizer)) if i not in special]
            drawn = int(torch.randint(len(plain), (1,), generator=torch.Generator().manual_seed(seed)))
            shown = [plain[drawn]]
            ids = self._bos + shown
        elif self._bos:
            ids = list(self._bos)
        else:
            raise RecipeError(f"synthesis: {kind.name} begins with a BOS token, and this model's tokenizer has none. "
                              "Take free:seeded, or continue.")  # fmt: skip
        room = self.bundle.anatomy.context - self.most_tokens
        if len(ids) > room:
            raise RecipeError(
                f"synthesis: {kind.name}: a request of {len(ids):,} tokens and {self.most_tokens:,} to write do not "
                f"fit into the model's context of {self.bundle.anatomy.context:,}. Set a smaller piece_tokens."
            )
        return Prompt(ids, shown)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], seed: int) -> list[Draft]:
        """Return what the model says to each prompt; the draws come from `seed` alone."""
        from transformers import GenerationConfig

        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, longest - len(prompt.ids) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            sampling = {"do_sample": True, "temperature": self._temperature, "top_p": self._top_p, "top_k": 0}
        pad = self._ends[0] if self._ends else 0
        config = GenerationConfig(max_new_tokens=self.most_tokens, eos_token_id=self._ends or None, pad_token_id=pad,
                                  use_cache=True, **sampling)  # fmt: skip
        model: Any = self.bundle.model
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices), quiet_transformers():
            torch.manual_seed(seed)
            text = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                                  generation_config=config)[:, longest:].cpu().tolist()  # fmt: skip
        return [self._draft(prompt, row) for prompt, row in zip(prompts, text, strict=True)]

    def _draft(self, prompt: Prompt, row: list[int]) -> Draft:
        end = next((index for index, token in enumerate(row) if token in self._ends), None)
        said = row if end is None else row[:end]
        text: str = self.bundle.tokenizer.decode(prompt.shown + said, skip_special_tokens=True)
        return Draft(text, len(said), end is not None)


def _listed(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
