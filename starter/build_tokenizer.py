"""The teacher's tokenizer: byte-level BPE of about 2,000 tokens, saved as a stock Hugging Face fast tokenizer.

Byte-level, so any text encodes and decodes to itself, whatever alphabet it is in. `<s>` starts a text, `</s>` ends a
document. The chat template writes the story world's plain format, so a chat with the teacher is a question about a
story: a system message is the story, a user message a question, an assistant message its answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

__all__ = ["BOS", "CHAT_TEMPLATE", "EOS", "PAD", "build_tokenizer"]

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\nAnswer:' }}"
    "{% else %}{{ ' ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int = 2048, context: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts; the same texts give the same tokenizer.

    Args:
        texts: Documents; a few thousand are enough for a story world.
        vocabulary: Number of tokens, the three special ones and 256 bytes included.
        context: Longest input of the model, recorded as `model_max_length`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
