"""From text to pieces that say how they were made; what fails is dropped with the reason; a kill costs one batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwindle.checkers import CHECKERS
from dwindle.data.curation.stage import run_chain
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.data.synthesis import SynthesisOptions, VerifierOptions
from dwindle.data.synthesis.drafts import drafted
from dwindle.data.synthesis.output import require_place, write_synthesis
from dwindle.data.synthesis.stage import Synthesize
from dwindle.data.synthesis.step import empty_error, synthesized
from dwindle.data.synthesis.writer import Draft, Writer
from dwindle.errors import DataError, OutputError, RecipeError

DOCUMENTS = [
    Document(f"The cat number {i} sat on a mat. It was a long way to the town.", "cats", licence="MIT", id=f"c{i}")
    for i in range(40)
]
OPTIONS = SynthesisOptions(
    ("continue", "free:seeded"),
    pieces=20,
    piece_tokens=40,
    prefix_tokens=8,
    batch_size=6,
    least_tokens=2,
    most_share=0.9,
)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Draft]], None]:
    """Put words into the model's mouth: the drafts come round in order, whatever is asked."""

    def put(drafts: list[Draft]) -> None:
        turn = iter(range(10**6))
        monkeypatch.setattr(
            Writer, "write", lambda self, prompts, seed: [drafts[next(turn) % len(drafts)] for _ in prompts]
        )

    return put


def run(
    bundle: Any, options: SynthesisOptions, folder: Path, documents: Any = DOCUMENTS, **more: Any
) -> tuple[list[Document], StageCount]:
    count = StageCount("synthesize")
    return list(synthesized(bundle, options, documents, folder=folder, count=count, **more)), count


def test_every_piece_says_how_it_was_made(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    pieces, count = run(bundle, OPTIONS, tmp_path / "w")
    assert count.documents_in == 20
    assert len(pieces) == count.documents_out == 20 - sum(count.reasons.values()) > 0
    for piece in pieces:
        how = piece.how
        assert how["model_sha256"] == bundle.content_sha256
        assert (how["temperature"], how["top_p"], how["checks"]) == (1.0, 1.0, [])
        assert re.fullmatch("[0-9a-f]{64}", how["template_sha256"])
        if how["kind"] == "continue":
            assert piece.licence == "MIT"
            assert how["from"]["source"] == "cats"
            assert piece.text.startswith(("The cat", "It was a"))
        else:
            assert "from" not in how
    assert len({p.id for p in pieces}) == len(pieces)


def test_a_killed_run_goes_on_to_the_same_text(
    tiny_bundle: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("llama")
    whole, _ = run(bundle, OPTIONS, tmp_path / "whole")
    write, written = Writer.write, []

    def killed(self: Writer, prompts: Any, seed: int) -> list[Draft]:
        written.append(seed)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(self, prompts, seed)

    monkeypatch.setattr(Writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, OPTIONS, tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("batch-*"))) == 2
    again, _ = run(bundle, OPTIONS, tmp_path / "killed")
    assert len(written) == 5
    assert again == whole
    run(bundle, replace(OPTIONS, least_tokens=3), tmp_path / "killed")
    assert len(written) == 9
    run(bundle, replace(OPTIONS, least_tokens=3, most_overlap=0.1), tmp_path / "killed")
    assert len(written) == 9


def test_what_fails_is_dropped_with_the_reason(tiny_bundle: Callable[..., Any], tmp_path: Path, says: Any) -> None:
    good = Draft("Question: What is 2 + 3?\nAnswer: 2 + 3 = 5", 20, True)
    says([
        good, Draft("Question: What is 2 + 3?\nAnswer: 2 + 3 = 6", 20, True), Draft("no", 1, True), Draft(" ", 9, True),
        Draft("Question: a\nAnswer: b", 20, False), Draft("An answer.", 20, True), good,
    ])  # fmt: skip
    options = SynthesisOptions(
        "questions", pieces=7, piece_tokens=30, checks=("arithmetic",), least_tokens=2, most_share=0.9
    )  # type: ignore[arg-type]
    pieces, count = run(tiny_bundle("llama", max_position_embeddings=512), options, tmp_path / "w")
    assert [p.text for p in pieces] == ["What is 2 + 3?\n\n2 + 3 = 5"]
    assert pieces[0].how["checks"] == [{"check": "arithmetic", "why": "1 step(s) right, result 5"}]
    assert pieces[0].how["answer"] == "2 + 3 = 5"
    assert count.reasons == {
        "check arithmetic": 1,
        "short": 2,
        "cut off": 1,
        "not of the form asked for": 1,
        "not new": 1,
    }


def test_code_is_run_and_the_corpus_is_no_novelty(tiny_bundle: Callable[..., Any], tmp_path: Path, says: Any) -> None:
    says([Draft("x = 1\nassert x == 1", 9, True), Draft("assert False", 9, True), Draft(DOCUMENTS[3].text, 9, True)])
    options = SynthesisOptions(("free",), pieces=3, piece_tokens=30, checks=("python",), least_tokens=2, most_share=0.9)
    pieces, count = run(tiny_bundle("llama"), replace(options, checks=()), tmp_path / "a")
    assert count.reasons == {"not new": 1}
    pieces, count = run(tiny_bundle("llama"), options, tmp_path / "b")
    assert [p.text for p in pieces] == ["x = 1\nassert x == 1"]
    assert count.reasons == {"check python": 2}


def test_a_verifier_decides(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    both, _ = run(
        bundle, replace(OPTIONS, verifier=VerifierOptions("v", least=-100.0)), tmp_path / "w", verifier=bundle
    )
    scores = sorted(piece.how["verifier"]["score"] for piece in both)
    middle = scores[len(scores) // 2]
    some, count = run(
        bundle, replace(OPTIONS, verifier=VerifierOptions("v", least=middle - 5e-4)), tmp_path / "w", verifier=bundle
    )
    assert [p.id for p in some] == [p.id for p in both if p.how["verifier"]["score"] >= middle]
    assert count.reasons["the verifier disagrees"] == len(both) - len(some) > 0
    with pytest.raises(RecipeError, match="both its options and its model"):
        run(bundle, OPTIONS, tmp_path / "w", verifier=bundle)


def test_the_share_of_synthetic_text_is_capped(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    few = DOCUMENTS[:6]
    options = replace(OPTIONS, most_share=0.25)
    pieces, count = run(tiny_bundle("llama"), options, tmp_path / "w", few)
    assert 0 < sum(p.bytes for p in pieces) <= sum(d.bytes for d in few) / 3
    assert count.reasons["above the share of synthetic text"] > 0


def test_what_cannot_be_is_refused_before_anything_is_written(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    bundle = tiny_bundle("llama")
    with pytest.raises(DataError, match="no passage of 2 to 40 tokens in the text, and continue needs one"):
        run(bundle, OPTIONS, tmp_path / "w", [])
    with pytest.raises(RecipeError, match="Give text with -d, or set most_share=1"):
        run(bundle, replace(OPTIONS, kinds=("free",)), tmp_path / "w", [])
    assert not (tmp_path / "w").exists()
    assert run(bundle, replace(OPTIONS, kinds=("free",), most_share=1), tmp_path / "w", [])[0]


def test_no_batch_is_written_if_a_later_passage_leaves_no_room(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "say.txt").write_text("Say this: {text}")
    options = replace(OPTIONS, kinds=(f"template:{tmp_path / 'say.txt'}",), piece_tokens=30, batch_size=1)
    documents = [Document(f"Cat {i} sat.", "cats") for i in range(19)] + [Document("The cat sat on a big mat.", "cats")]
    with pytest.raises(RecipeError, match="do not fit into the model's context of 64"):
        run(tiny_bundle("llama"), options, tmp_path / "w", documents)
    assert not (tmp_path / "w").exists()


def test_the_folder_is_whole_or_not_at_all(tiny_bundle: Callable[..., Any], tmp_path: Path, says: Any) -> None:
    bundle, out = tiny_bundle("llama"), tmp_path / "out"

    def write(options: SynthesisOptions, name: str) -> dict[str, Any]:
        count = StageCount("synthesize")
        pieces = synthesized(bundle, options, DOCUMENTS, folder=tmp_path / name, count=count)
        return write_synthesis(out, pieces, count, bundle, options)

    says([Draft("some text of its own", 9, True), Draft("x", 1, True)])
    card = write(OPTIONS, "a")
    lines = [json.loads(line) for line in (out / "synthetic.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["some text of its own"]
    assert json.loads((out / "card.json").read_text()) == json.loads(json.dumps(card))
    assert "| short | 10 |" in (out / "card.md").read_text()
    says([Draft("x", 1, True)])
    with pytest.raises(
        DataError, match=r"nothing is left of 20 pieces \(short 20\)\. For example: short: 1 tokens: 'x'"
    ):
        write(OPTIONS, "b")
    assert json.loads((out / "card.json").read_text()) == json.loads(json.dumps(card))
    (out / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match=r"something else than a synthesis \(mine.txt\)"):
        require_place(out)
    with pytest.raises(OutputError, match="is a file"):
        require_place(out / "mine.txt")


def test_a_stage_puts_its_pieces_behind_the_corpus(tiny_bundle: Callable[..., Any], tmp_path: Path, says: Any) -> None:
    tiny_bundle("llama").save(tmp_path / "teacher")
    stage = Synthesize(("continue",), pieces=4, piece_tokens=40, most_share=0.9, teacher=str(tmp_path / "teacher"), least_tokens=2,
                       verifier=VerifierOptions(str(tmp_path / "teacher"), least=-50.0))  # fmt: skip
    out, counts = run_chain([stage], iter(DOCUMENTS), folder=tmp_path / "s")
    texts = list(out)
    assert texts[:40] == DOCUMENTS
    assert counts[0].changes["pieces added"] == len(texts) - 40 > 0
    assert counts[0].details["pieces"]["documents_in"] == 4
    says([Draft("x", 1, True)])
    out, _ = run_chain([stage], iter(DOCUMENTS), folder=tmp_path / "t")
    with pytest.raises(DataError, match="nothing is left"):
        list(out)
    with pytest.raises(RecipeError, match="teacher is missing"):
        Synthesize(("free",))


def test_an_empty_count_still_speaks() -> None:
    assert "nothing is left of 0 pieces" in str(empty_error(StageCount("s")))
    assert CHECKERS


def test_drafts_come_lazily(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    writer = Writer(tiny_bundle("llama"), temperature=1, top_p=1, most_tokens=4)
    from dwindle.data.synthesis.kinds import KINDS

    pieces: Iterator[Any] = drafted(
        writer, [KINDS["free"]], [], pieces=9, batch_size=4, prefix_tokens=1, seed=0, folder=tmp_path / "d", plan={}
    )
    next(pieces)
    assert len(list((tmp_path / "d").glob("batch-*"))) == 1
