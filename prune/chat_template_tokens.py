r"""The tokens of a chat template: what it writes around the messages must stay one token where it was one.

Two readings together, because neither sees all: short conversations are rendered, so that the tokens come out as they
do in use; and every piece of fixed text in the template's source (outside of its tags, and quoted inside them) is
tokenised alone, which also reaches the branches that no short conversation enters (tools, images).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dwindle.tokenization import encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_template_tokens"]

_log = logging.getLogger("dwindle")
_TAG = re.compile(r"\{#.*?#\}|\{%(.*?)%\}|\{\{(.*?)\}\}", re.DOTALL)
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
_SYSTEM = {"role": "system", "content": "a"}
_CONVERSATIONS = ([_USER], [_USER, _ASSISTANT, _USER, _ASSISTANT], [_SYSTEM, _USER, _ASSISTANT])


def chat_template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all tokens that the tokenizer's chat templates write; none without a template."""
    given: Any = getattr(tokenizer, "chat_template", None) or {}
    templates = [given] if isinstance(given, str) else list(given.values())
    texts = [text for template in templates for text in (*_fixed_text(template), *_rendered(tokenizer, template))]
    return {i for ids in encode_plain(tokenizer, texts) for i in ids} if texts else set()


def _fixed_text(template: str) -> Iterator[str]:
    """Yield the text outside of the tags, and the quoted text inside them, of a Jinja template."""
    yield from filter(None, _TAG.sub("\0", template).split("\0"))
    for tag in _TAG.finditer(template):
        for quoted in _QUOTED.finditer(tag.group(1) or tag.group(2) or ""):
            text = quoted.group(1) or quoted.group(2) or ""
            if text:
                yield re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape.group(1), escape.group(1)), text)


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[str]:
    for messages in _CONVERSATIONS:
        for prompts in (False, True):
            try:
                text = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=prompts
                )
            except Exception as refusal:  # noqa: BLE001  (templates refuse roles in their own ways, or need jinja2)
                _log.debug("chat template: %s for %s", refusal, [message["role"] for message in messages])
            else:
                yield str(text)
