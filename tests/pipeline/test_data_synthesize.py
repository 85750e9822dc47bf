"""`dwindle data synthesize`: one command, a folder, and exit code 2 with nothing written for what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwindle.pipeline.cli import main


@pytest.fixture
def command(
    tiny_bundle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    tiny_bundle("llama").save(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"Cat {i} sat on a mat." for i in range(30)))

    def run(*words: str, text: bool = True) -> tuple[int, str, str]:
        given = ["-d", str(tmp_path / "text.txt")] if text else []
        with pytest.raises(SystemExit) as end:
            main(["data", "synthesize", "-t", str(tmp_path / "teacher"), *given, "-o", str(tmp_path / "out"),
                  "--set", "piece_tokens=30", "--set", "least_tokens=2", *words])  # fmt: skip
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_a_model_writes_a_folder(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--kind", "continue", "--pieces", "6", "--most-share", "0.9", "--set", "temperature=0.9", "--verifier", str(tmp_path / "teacher"),
             "--set", "verifier.least=-100")  # fmt: skip
    code, out, _ = command(*words, "--json")
    assert code == 0
    card = json.loads(out)
    assert card["pieces"]["documents_in"] == 6
    assert card["options"]["temperature"] == 0.9
    first = (tmp_path / "out" / "synthetic.jsonl").read_bytes()
    assert json.loads(first.splitlines()[0])["how"]["verifier"]["asks"] == "log_probability"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "teacher", "text.txt"]
    code, out, _ = command(*words)
    assert (code, (tmp_path / "out" / "synthetic.jsonl").read_bytes()) == (0, first)
    assert "pieces" in out
    with pytest.raises(SystemExit) as end:
        main(["data", "show", str(tmp_path / "out")])
    assert not end.value.code
    assert out == f"{capsys.readouterr().out}Written: {tmp_path / 'out'}\n"


@pytest.mark.parametrize(("words", "said"), [
    (("--kind", "rephrase:esay"), "did you mean 'rephrase:easy'"),
    (("--kind", "free", "--most-share", "1.5"), "most_share=1.5"),
    (("--kind", "continue", "--check", "regex:^never$", "--pieces", "4"), "nothing is left of 4 pieces (check regex:^never$ 4)"),
    (("--kind", "continue", "--set", "verifier.asks=yes_no"), "synthesis.verifier.model is missing"),
    (("--kind", "continue", "--set", "verifier=yes_no"), "--set verifier: found 'yes_no', needed its keys"),
    (("--kind", "continue", "--set", "data.column=story"), "--set data.column: of data only data.text_column"),
    (("--kind", "rephrase:easy"), "do not fit into the model's context of 64"),
])  # fmt: skip
def test_what_cannot_be_ends_with_2_and_no_output(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, _, err = command(*words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "out").exists()


def test_no_text_needs_a_whole_share(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("--kind", "free", text=False)
    assert code == 2
    assert "set most_share=1" in err
    assert command("--kind", "free", "--pieces", "4", "--most-share", "1", text=False)[0] == 0
