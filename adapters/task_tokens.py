"""Records to rows of token ids for the training loop, and to ids for measuring.

    chat     the tokenizer's template around system message, prompt and answer; the answer is what the template writes
             behind the generation prompt
    plain    [BOS] prompt separator answer EOS

Prompt and answer are tokenised so that the prompt's ids are those that a model reads when it is asked, and the answer's
begin behind them. Rows of a `TokenSet` are of fixed length, so lengths stand in front:

    completion     [length, start, id 0, id 1, ... padding]                         loss on ids start ... length - 1
    preference     [index, start, length of chosen, length of rejected, chosen ids ..., rejected ids ...]

A row of general text (replay) is a completion that starts at 0: every token but the first is predicted. Among
preferences it stands on the chosen side, of index 0; its other side is its first two tokens, which count for nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.adapters.task_options import TaskOptions
from dwindle.adapters.task_records import BadRecords, Record, TaskRecords
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.report import Skipped
from dwindle.token_set import TokenSet
from dwindle.tokenization import encode, encode_plain, encoding_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dwindle.bundle import ModelBundle

__all__ = ["Encoded", "Encoder", "TaskTokens", "completion_rows", "preference_rows", "tokenised"]


@dataclass(frozen=True)
class Encoded:
    """A record in ids: the prompt's, and those of each answer that is scored."""

    record: Record
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    rejected: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with its longer answer."""
        return len(self.prompt) + max(len(self.answer), len(self.rejected))


class Encoder:
    """A task's records as ids of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> None:
        self.tokenizer: Any = tokenizer
        self.options = options
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if options.template == "chat" and not has_template:
            raise RecipeError(
                f"task {options.name!r}: template=chat, but the tokenizer has no chat template. Set template=plain."
            )
        self.chat = has_template if options.template == "auto" else options.template == "chat"
        if options.system is not None and not self.chat:
            raise RecipeError(f"task {options.name!r}: a system message needs a chat template. Put it into prompt.")
        self.stops = {int(i) for i in (tokenizer.eos_token_id,) if i is not None}
        """Ids that end an answer."""

    def prompt(self, text: str) -> tuple[int, ...]:
        """Return the ids that a model reads before it answers."""
        if self.chat:
            return tuple(encode_plain(self.tokenizer, [self._rendered(text, None)])[0])
        return tuple(encode(self.tokenizer, text))

    def answer(self, prompt: str, text: str) -> tuple[int, ...]:
        """Return the ids of an answer to `prompt`, its end included."""
        if self.chat:
            asked, whole = self._rendered(prompt, None), self._rendered(prompt, text)
            if not whole.startswith(asked):
                raise UnsupportedModel(
                    f"task {self.options.name!r}: with an answer the chat template writes another text before it than "
                    "without one, so the two cannot be told apart. Set template=plain."
                )
            ids = encode_plain(self.tokenizer, [whole[len(asked) :]])[0]
        else:
            before = encode(self.tokenizer, prompt)
            joined = encode(self.tokenizer, prompt + self.options.separator + text)
            apart = joined[: len(before)] == before
            ids = joined[len(before) :] if apart else encode_plain(self.tokenizer, [self.options.separator + text])[0]
        return (*ids, *self._end(ids))

    def _end(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return EOS, unless the template has ended the answer with a special token of its own."""
        special = set(self.tokenizer.all_special_ids)
        ends = [i for i in ids[-2:] if i in special]
        if ends:
            self.stops.add(ends[-1])
            return ()
        return () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)

    def _rendered(self, prompt: str, answer: str | None) -> str:
        messages = [] if self.options.system is None else [{"role": "system", "content": self.options.system}]
        messages.append({"role": "user", "content": prompt})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        return text

    def record(self, record: Record) -> Encoded:
        """Return a record's ids."""
        rejected = () if record.rejected is None else self.answer(record.prompt, record.rejected)
        return Encoded(record, self.prompt(record.prompt), self.answer(record.prompt, record.completion), rejected)


@dataclass(frozen=True)
class TaskTokens:
    """A task in ids: what is trained on and what is held out."""

    encoder: Encoder
    train: tuple[Encoded, ...]
    held_out: tuple[Encoded, ...]
    skipped: tuple[Skipped, ...] = ()


def tokenised(bundle: ModelBundle, records: TaskRecords) -> TaskTokens:
    """Return the task in the model's tokens. Raises DataError naming every record longer than the context."""
    encoder, bad, context = Encoder(bundle.tokenizer, records.options), BadRecords(), bundle.anatomy.context
    parts: list[tuple[Encoded, ...]] = []
    for part in (records.train, records.held_out):
        encoded = [encoder.record(record) for record in part]
        for one in encoded:
            if one.longest > context:
                bad.add(f"more tokens than the context of {context:,}", f"{one.record.place} ({one.longest:,})")
        parts.append(tuple(one for one in encoded if one.longest <= context))
    skipped = bad.settle(records.options, min(map(len, parts)))
    return TaskTokens(encoder, parts[0], parts[1], records.skipped + skipped)


def completion_rows(
    bundle: ModelBundle, examples: Sequence[Encoded], general: Tensor | None = None, licence: str | None = None
) -> TokenSet:
    """Return rows of the completion layout, with the windows of `general` [M, T] after them."""
    rows = [(len(e.prompt), (*e.prompt, *e.answer)) for e in examples]
    width = max(max(len(ids) for _, ids in rows), 0 if general is None else general.shape[1])
    found = torch.zeros(len(rows) + (0 if general is None else len(general)), 2 + width, dtype=torch.int64)
    for row, (start, ids) in zip(found, rows, strict=False):
        row[: 2 + len(ids)] = torch.tensor([len(ids), start, *ids])
    if general is not None:
        found[len(rows) :, 0] = general.shape[1]
        found[len(rows) :, 2 : 2 + general.shape[1]] = general
    return _token_set(bundle, found, examples, licence)


def preference_rows(
    bundle: ModelBundle, pairs: Sequence[Encoded], general: Tensor | None = None, licence: str | None = None
) -> TokenSet:
    """Return rows of the preference layout, with the windows of `general` [M, T] after them."""
    width = max(max(pair.longest for pair in pairs), 0 if general is None else general.shape[1])
    found = torch.zeros(len(pairs) + (0 if general is None else len(general)), 4 + 2 * width, dtype=torch.int64)
    for index, (row, pair) in enumerate(zip(found, pairs, strict=False)):
        sides = [[*pair.prompt, *pair.answer], [*pair.prompt, *pair.rejected]]
        row[:4] = torch.tensor([index, len(pair.prompt), len(sides[0]), len(sides[1])])
        for at, side in zip((4, 4 + width), sides, strict=True):
            row[at : at + len(side)] = torch.tensor(side)
    if general is not None:
        windows = found[len(pairs) :]
        windows[:, 2], windows[:, 3] = general.shape[1], 2
        windows[:, 4 : 4 + general.shape[1]] = general
        windows[:, 4 + width : 6 + width] = general[:, :2]
    return _token_set(bundle, found, pairs, licence)


def _token_set(bundle: ModelBundle, rows: Tensor, examples: Sequence[Encoded], licence: str | None) -> TokenSet:
    identity = encoding_sha256(bundle.tokenizer)
    digest = hashlib.sha256(f"{identity} {tuple(rows.shape)}".encode())
    digest.update(rows.contiguous().numpy().data)
    files = dict.fromkeys(e.record.place.partition(":")[0] for e in examples)
    size = sum(len((e.record.prompt + e.record.completion + (e.record.rejected or "")).encode()) for e in examples)
    return TokenSet(rows, "train", ", ".join(files), digest.hexdigest(), size, identity, licence=licence)
