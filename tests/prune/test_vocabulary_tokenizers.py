"""Rebuilt tokenizers against the ones they come from, for each kind that can be rebuilt."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dwindle.errors import UnsupportedModel
from dwindle.prune.tokenizer_pieces import read_pieces, read_rules
from dwindle.prune.tokenizer_surgery import rebuild, renumbered
from dwindle.tokenization import encode_plain

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "the", "dog", "ran", "out", "of", "town;", "naïve", "café",
         "über", "好的", "日本", "return", "x**2", "+", "1.50", "def(x):"]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SPACE = "\u2581"
TEXT = st.text(max_size=40) | st.text(alphabet="theca sndog ,é好\n\t▁<s>", max_size=60)


def corpus() -> list[str]:
    chance = random.Random(5)
    return [" ".join(chance.choices(WORDS, k=12)) for _ in range(400)]


def wrapped(backend: Tokenizer, **options: Any) -> Any:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names, **options)


def byte_level() -> Any:
    """GPT-2 and Qwen: bytes as characters, words cut by a regular expression, special tokens after the vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)  # fmt: skip
    backend.train_from_iterator(corpus(), trainer)
    backend.add_special_tokens(SPECIAL[1:])
    backend.add_tokens(["<tool>"])
    return wrapped(backend)


def trained_pieces() -> list[str]:
    """Pieces as SentencePiece finds them, characters first, then in the order of their merges."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=160, show_progress=False))
    return [piece for piece, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]


SPM_DECODER = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def sentencepiece_bpe(*, byte_fallback: bool = True) -> Any:
    """Llama: no words, a space before the text, and every split of a piece into two pieces is a merge."""
    pieces = trained_pieces()
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256 if byte_fallback else 0)), *pieces]
    known = set(pieces)
    merges = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(SPM_DECODER)
    backend.add_special_tokens(SPECIAL)
    return wrapped(backend, unk_token="<unk>")


def unigram(*, byte_fallback: bool = True) -> Any:
    """SentencePiece's Unigram; without byte fallback as T5 has it, decoded by Metaspace."""
    chance = random.Random(3)
    found = [*trained_pieces(), "th", "cat" + SPACE + "sat"]
    pieces = [piece for piece in found if byte_fallback or SPACE not in piece[1:]]
    scored = [(piece, -chance.uniform(2, 12) - (4 if len(piece) == 1 else 0)) for piece in pieces]
    bytes_ = [(f"<0x{byte:02X}>", 0.0) for byte in range(256 if byte_fallback else 0)]
    backend = Tokenizer(
        models.Unigram([*((name, 0.0) for name in SPECIAL), *bytes_, *scored], unk_id=0, byte_fallback=byte_fallback)
    )
    if byte_fallback:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        backend.decoder = decoders.Sequence(SPM_DECODER)
    else:
        backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL)
    return wrapped(backend, unk_token="<unk>")


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "sentencepiece_bpe_without_bytes": functools.partial(sentencepiece_bpe, byte_fallback=False),
    "unigram": unigram,
    "unigram_without_bytes": functools.partial(unigram, byte_fallback=False),
}


def pruned(tokenizer: Any, share: float, seed: int) -> tuple[Any, dict[int, int]]:
    """The tokenizer with the essential tokens and about `share` of the others, and its ids by the old ones."""
    pieces = read_pieces(tokenizer)
    chance = random.Random(seed)
    chosen = {i for i in pieces.names if chance.random() < share}
    kept = sorted(pieces.closure(pieces.essential | chosen))
    new_ids = {old: new for new, old in enumerate(kept)}
    return rebuild(tokenizer, new_ids, len(kept)), new_ids


@functools.cache
def pair(kind: str) -> tuple[Any, Any, dict[int, int]]:
    tokenizer = KINDS[kind]()
    return tokenizer, *pruned(tokenizer, 0.4, seed=1)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_any_text_decodes_back_as_it_did(kind: str, text: str) -> None:
    full, small, new_ids = pair(kind)
    assert len(small) < 0.95 * len(full)
    old, new = encode_plain(full, [text])[0], encode_plain(small, [text])[0]
    assert decoded(small, new) == decoded(full, old)
    if set(old) <= new_ids.keys():
        assert new == [new_ids[i] for i in old]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_encode_as_before(kind: str) -> None:
    """Texts decoded from kept tokens at random: enough of them keep their tokens to test something."""
    full, small, new_ids = pair(kind)
    chance = random.Random(2)
    special = set(full.all_special_ids)
    kept = [i for i in new_ids if i not in special and not full.convert_ids_to_tokens(i).startswith("<0x")]
    texts = [decoded(full, chance.choices(kept, k=chance.randint(1, 8))) for _ in range(1500)]
    same = 0
    for text, old in zip(texts, encode_plain(full, texts), strict=True):
        if set(old) <= new_ids.keys():
            same += 1
            assert encode_plain(small, [text])[0] == [new_ids[i] for i in old]
    assert same > 300


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_templates_follow(kind: str) -> None:
    full, small, new_ids = pair(kind)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(small, name) == getattr(full, name)
    assert small.bos_token_id == new_ids[full.bos_token_id]
    assert small("the cat").input_ids[0] == small.bos_token_id
    assert small.get_added_vocab() == {token: new_ids[i] for token, i in full.get_added_vocab().items()}
    assert sorted(small.get_vocab().values()) == list(range(len(new_ids)))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    from dwindle.tokenizer_files import load_tokenizer, name_generic_tokenizer, tokenizer_sha256

    for kind in KINDS:
        _, small, new_ids = pair(kind)
        small.save_pretrained(tmp_path / kind)
        name_generic_tokenizer(tmp_path / kind)
        loaded = load_tokenizer(tmp_path / kind, trust_remote_code=False, vocab=len(new_ids))
        assert tokenizer_sha256(loaded) == tokenizer_sha256(small)


def test_words_known_whole_need_no_merges() -> None:
    """Llama 3 and tiktoken vocabularies (ignore_merges) hold tokens that no merges build."""
    tokenizer = byte_level()
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "<s>": 5}, [("a", "b")],
                                   ignore_merges=True))  # fmt: skip
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    tokenizer = wrapped(backend)
    pieces = read_pieces(tokenizer)
    assert pieces.needs(4) == {4}
    assert pieces.needs(3) == {0, 1, 3}
    kept = sorted(pieces.essential | {4})
    small = rebuild(tokenizer, {old: new for new, old in enumerate(kept)}, len(kept))
    assert small.convert_ids_to_tokens(encode_plain(small, ["abc"])[0]) == ["abc"]
    assert small.convert_ids_to_tokens(encode_plain(small, ["ab"])[0]) == ["a", "b"]


def test_bert_like_post_processors_and_padding_follow() -> None:
    tokenizer = sentencepiece_bpe()
    backend = tokenizer.backend_tokenizer
    ends = [(name, backend.token_to_id(name)) for name in ("</s>", "<s>")]
    backend.post_processor = processors.Sequence([processors.RobertaProcessing(*ends), processors.ByteLevel()])
    backend.enable_padding(pad_id=3, pad_token="<pad>")
    full = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    kept = {i: n for n, i in enumerate(sorted(read_pieces(full).essential - {0}))}  # <unk> goes: every id moves
    rules = read_rules(full)
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["id"]]
    found = renumbered(rules, kept)
    assert found["padding"]["pad_id"] == 2
    assert found["post_processor"]["processors"][0]["sep"] == ["</s>", 1]
    assert found["post_processor"]["processors"][0]["cls"] == ["<s>", 0]


def with_backend(change: Callable[[Tokenizer], None], model: Any = None) -> Any:
    backend = Tokenizer(model or models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.ByteLevel()
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def no_change(_: Tokenizer) -> None:
    """Leave the backend as it is."""


def set_decoder(decoder: Any) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, "decoder", decoder)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: with_backend(no_change, models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "WordPiece"),
        (lambda: with_backend(no_change, models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "WordLevel"),
        (lambda: with_backend(no_change, models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), "end_of_word_suffix"),
        (lambda: with_backend(no_change, models.BPE({"a": 0}, [], dropout=0.1)), "dropout"),
        (lambda: with_backend(set_decoder(decoders.CTC())), "decoder CTC"),
        (lambda: with_backend(lambda backend: backend.__setattr__("decoder", None)), "no decoder"),
        (lambda: with_backend(set_decoder(decoders.Strip(" ", 1, 0))), "Strip before Fuse"),
        (lambda: with_backend(set_decoder(decoders.Metaspace()), models.BPE({"a": 0, "▁▁": 1}, [])), "Metaspace"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused(tokenizer: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"cannot be rebuilt.*{reason}.*leave this model's vocabulary whole"):
        read_pieces(tokenizer())


def test_an_unknown_post_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dwindle.prune import tokenizer_pieces

    monkeypatch.setattr(tokenizer_pieces, "_POST_PROCESSORS", set())
    with pytest.raises(UnsupportedModel, match="post-processor TemplateProcessing, of which it is not known"):
        read_pieces(byte_level())


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"object has no tokenizer\.json to rebuild"):
        read_pieces(object())  # type: ignore[arg-type]


def test_ids_that_cannot_be_had_are_refused() -> None:
    """Added tokens always follow the vocabulary: a hole before them cannot be written."""
    tokenizer = byte_level()
    new_ids = {i: i if i < 300 else i + 5 for i in sorted(tokenizer.get_vocab().values())}
    with pytest.raises(UnsupportedModel, match="other ids than planned"):
        rebuild(tokenizer, new_ids, 1000)
