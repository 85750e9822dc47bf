from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.data import DataOptions, build_token_sets, calibration_set, evaluation_set, training_set
from dwindle.data.document import Document
from dwindle.data.packing import joined_text, pack
from dwindle.errors import DataError, RecipeError
from dwindle.tokenization import encode

BOS, EOS = 256, 257


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>\n".join(f"Story {i}: {'once upon a time ' * (i % 7 + 3)}\n" for i in range(120)))
    return path


def rows(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def test_the_training_stream_is_bos_document_eos(tiny_tokenizer: Any) -> None:
    documents = [Document("ab", "f"), Document("cd", "f", continues=True), Document("e", "g")]
    found = pack(documents, tiny_tokenizer, role="train", context=8, seed=0)
    ab, cd, e = (encode(tiny_tokenizer, text)[1:] for text in ("ab", "cd", "e"))
    assert rows(found.ids) == [(BOS, *ab, *cd, EOS, BOS, *e, EOS)]
    assert found.text_bytes == 5


def test_calibration_reads_documents_as_one_text(tiny_tokenizer: Any) -> None:
    documents = [Document("ab", "f"), Document("cd", "f", continues=True), Document("e", "g")]
    found = pack(documents, tiny_tokenizer, role="calibration", context=8, seed=0)
    assert rows(found.ids) == [tuple(encode(tiny_tokenizer, joined_text(documents)))]
    assert found.text_bytes == 5


def test_long_texts_are_tokenised_in_pieces_that_join(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("word " * 10, "f", continues=i > 0) for i in range(9)] + [Document("last", "g")]
    whole = pack(documents, tiny_tokenizer, role="train", context=7, seed=3)
    monkeypatch.setattr("dwindle.data.packing._PIECE_CHARACTERS", 100)
    monkeypatch.setattr("dwindle.data.packing._BATCH_CHARACTERS", 150)
    assert torch.equal(pack(documents, tiny_tokenizer, role="train", context=7, seed=3).ids, whole.ids)


def test_training_windows_predict_every_token_once(tiny_tokenizer: Any) -> None:
    text = "".join(chr(33 + i % 90) for i in range(200))
    found = pack([Document(text, "f")], tiny_tokenizer, role="train", context=16, seed=0)
    stream = [*encode(tiny_tokenizer, text), EOS]
    expected = [tuple(stream[i : i + 17]) for i in range(0, len(stream) - 16, 16)]
    assert sorted(rows(found.ids)) == sorted(expected)
    assert rows(found.ids) != expected
    assert rows(pack([Document(text, "f")], tiny_tokenizer, role="train", context=16, seed=0).ids) == rows(found.ids)
    other = pack([Document(text, "f")], tiny_tokenizer, role="train", context=16, seed=1)
    assert rows(other.ids) != rows(found.ids)
    assert other.sha256 != found.sha256


def test_roles_carved_out_of_the_training_text_are_disjoint(stories: Path, tiny_tokenizer: Any) -> None:
    options = DataOptions((str(stories),), calibration_windows=10, evaluation_share=0.1, context=32)
    sets = build_token_sets(options, tiny_tokenizer, context=64)
    assert (sets.train.ids.shape[1], sets.calibration.ids.shape) == (33, (10, 32))
    parts = [sets.train.document_sha256, sets.calibration.document_sha256, sets.evaluation.document_sha256]
    assert sum(map(len, parts)) == len(frozenset().union(*parts)) == 120
    text = tiny_tokenizer.decode(sets.evaluation.ids[0], skip_special_tokens=True)
    assert "Story 119:" in text
    assert "Story 60:" not in text
    assert sets.evaluation.text_bytes == len(text.encode())
    assert sets.held_out_text is not None
    (stories.parent / "held-out.txt").write_text(sets.held_out_text, newline="")
    assert evaluation_set(stories.parent / "held-out.txt", tiny_tokenizer).sha256 == sets.evaluation.sha256
    assert [s.role for s in (sets.train, sets.calibration, sets.evaluation)] == ["train", "calibration", "evaluation"]


def test_a_document_that_stands_twice_goes_to_one_role(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "twice.txt"
    stories = [f"Story {i % 20}: {'once upon a time ' * 9}\n" for i in range(60)]
    path.write_text("<|endoftext|>\n".join(stories))
    build_token_sets(
        DataOptions(str(path), calibration_windows=3, evaluation_share=0.1, context=32), tiny_tokenizer, 64
    )  # type: ignore[arg-type]


def test_stretches_of_one_file_are_carved_too(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Paragraph {i}. {'It rained all day. ' * 20}\n\n" for i in range(200)))
    sets = build_token_sets(DataOptions((str(path),), calibration_windows=8), tiny_tokenizer, 64)
    assert path.read_text().endswith(tiny_tokenizer.decode(sets.evaluation.ids[0], skip_special_tokens=True))


def test_few_calibration_windows_are_said(stories: Path, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    sets = build_token_sets(DataOptions((str(stories),), calibration_windows=10_000), tiny_tokenizer, 64)
    assert 1 <= len(sets.calibration.ids) < 10_000
    assert "instead of 10000" in caplog.text


def test_places_of_their_own(tmp_path: Path, stories: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "c.txt").write_text("calibration " * 40)
    (tmp_path / "e.txt").write_text("evaluation\r\n" * 40, newline="")
    options = DataOptions((str(stories),), str(tmp_path / "c.txt"), str(tmp_path / "e.txt"), evaluation_tokens=101)
    sets = build_token_sets(options, tiny_tokenizer, 64)
    assert sets.evaluation.ids.shape == (1, 101)
    assert sets.evaluation.text_bytes == 100
    assert len(sets.train.document_sha256) == 120
    assert len(calibration_set(options, tiny_tokenizer, 64).ids) == len(sets.calibration.ids)
    assert training_set(options, tiny_tokenizer, 64).sha256 == sets.train.sha256


def test_train_tokens_bounds_the_reading(stories: Path, tiny_tokenizer: Any) -> None:
    found = training_set(DataOptions((str(stories),), train_tokens=640), tiny_tokenizer, 64)
    assert found.ids.shape == (10, 65)
    assert len(found.document_sha256) < 120


def test_the_default_context_is_bounded(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("word " * 2000)
    found = training_set(DataOptions((str(tmp_path / "a.txt"),)), tiny_tokenizer, context=131_072)
    assert found.ids.shape[1] == 2049


def test_evaluation_is_the_file_byte_for_byte(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "one\r\n\r\n<|endoftext|>\n  schön \n\n"
    (tmp_path / "a.txt").write_text(text, newline="", encoding="utf-8")
    found = evaluation_set(tmp_path / "a.txt", tiny_tokenizer)
    assert found.ids[0].tolist() == encode(tiny_tokenizer, text)
    assert found.text_bytes == len(text.encode())


def test_evaluation_of_rows_joins_them(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    found = evaluation_set(tmp_path / "a.csv", tiny_tokenizer)
    assert found.ids[0].tolist() == encode(tiny_tokenizer, "one\n\ntwo")


def test_one_place_in_two_roles_is_refused(tmp_path: Path, stories: Path, tiny_tokenizer: Any) -> None:
    inside = DataOptions((str(tmp_path),), calibration=str(stories), evaluation=str(stories))
    with pytest.raises(DataError, match=r"\(train\) and .*\(calibration\).*\(train\) and .*\(evaluation\)"):
        build_token_sets(inside, tiny_tokenizer, 64)


def test_shared_documents_are_refused(tmp_path: Path, stories: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "copy.txt").write_text(stories.read_text())
    with pytest.raises(DataError, match=r"\(evaluation\) share 92"):
        build_token_sets(DataOptions((str(stories),), evaluation=str(tmp_path / "copy.txt")), tiny_tokenizer, 64)


@pytest.mark.parametrize(("evaluation", "message"), [(None, "to hold some out"), ("e.txt", "to draw some for")])
def test_too_few_documents(tmp_path: Path, tiny_tokenizer: Any, evaluation: str | None, message: str) -> None:
    (tmp_path / "a.txt").write_text("only one document")
    (tmp_path / "e.txt").write_text("evaluation")
    place = str(tmp_path / evaluation) if evaluation else None
    with pytest.raises(DataError, match=message):
        build_token_sets(DataOptions((str(tmp_path / "a.txt"),), evaluation=place), tiny_tokenizer, 64)


def test_too_little_text(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"7 tokens for the role 'train', but one window needs 65"):
        training_set(DataOptions((str(tmp_path / "a.txt"),)), tiny_tokenizer, 64)
    with pytest.raises(DataError, match="longer than the model's context of 64"):
        training_set(DataOptions((str(tmp_path / "a.txt"),), context=65), tiny_tokenizer, 64)
    (tmp_path / "b.csv").write_text("text\n \n")
    with pytest.raises(DataError, match="no text in it"):
        training_set(DataOptions((str(tmp_path / "b.csv"),)), tiny_tokenizer, 64)
    tiny_tokenizer.bos_token = None
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match="1 tokens to evaluate on"):
        evaluation_set(tmp_path / "c.txt", tiny_tokenizer)


def test_bad_options_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        DataOptions((), context=1, calibration_windows=0, evaluation_share=1.0, evaluation_tokens=1, train_tokens=0)
    for name in ("train", "context", "calibration_windows", "evaluation_share", "evaluation_tokens", "train_tokens"):
        assert f"{name}=" in str(caught.value)
