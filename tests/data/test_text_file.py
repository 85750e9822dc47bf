from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dwindle.data import text_file
from dwindle.data.packing import joined_text
from dwindle.data.text_file import text_documents


def written(path: Path, seed: int, marker: bool) -> str:
    dice = random.Random(seed)
    parts = [
        "word " * dice.randint(0, 300),
        "\n",
        "\r\n",
        " \n",
        "\n\n",
        "\t",
        "x<|endoftext|>y\n",
        "é" * dice.randint(1, 99),
    ]
    if marker:
        parts += ["\n<|endoftext|>\n", "\n  <|endoftext|> \r\n", "\n<|endoftext|>"]
    text = "".join(dice.choice(parts) for _ in range(dice.randint(1, 400)))
    path.write_text(text, newline="")
    return text


@pytest.mark.parametrize("marker", [False, True])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_size_of_a_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, marker: bool
) -> None:
    for seed in range(12):
        text = written(tmp_path / "a.txt", seed, marker)
        monkeypatch.setattr(text_file, "_CHUNK", 1 << 20)
        expected = list(text_documents(tmp_path / "a.txt"))
        monkeypatch.setattr(text_file, "_CHUNK", chunk)
        assert list(text_documents(tmp_path / "a.txt")) == expected
        if not marker:
            assert joined_text(expected) == text


def test_what_has_no_cut_is_cut_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_LONGEST", 10_000)
    monkeypatch.setattr(text_file, "_CHUNK", 3_000)
    for text in ("a" * 95_000, "word " * 20_000, "line of text\n" * 5_000):
        (tmp_path / "a.txt").write_text(text)
        for whole in (False, True):
            found = list(text_documents(tmp_path / "a.txt", whole=whole))
            assert joined_text(found) == text
            assert len(found) >= len(text) // 10_000
            assert max(len(d.text) for d in found) <= 10_000 + 4_000
            assert [d.continues for d in found] == [False] + [True] * (len(found) - 1)


def test_a_whole_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n\n\n" * 3000)
    assert [d.text for d in text_documents(tmp_path / "a.py", whole=True)] == ["x = 1\n\n\n" * 3000]


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    """64 MB in one line; the reader's own need is 16 Mi characters and a few copies of a chunk."""
    with (tmp_path / "a.txt").open("w") as handle:
        for _ in range(64):
            handle.write("some words " * 90_909)
    code = (
        "import resource, sys\nfrom dwindle.data.text_file import text_documents\nfrom pathlib import Path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "size = sum(len(d.text) for d in text_documents(Path(sys.argv[1])))\n"
        "print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "a.txt")], check=True, capture_output=True, text=True
    )
    size, grown = map(int, done.stdout.split())
    assert size == 64 * 11 * 90_909
    assert grown / (1024 if resource.getpagesize() else 1) < 64, "MiB"


def test_markers_that_fill_a_line_cost_no_minutes(tmp_path: Path) -> None:
    text = "<|endoftext|>" * 100_000
    (tmp_path / "a.txt").write_text(text)
    began = time.process_time()
    assert "".join(document.text for document in text_documents(tmp_path / "a.txt")) == text  # they are no lines
    assert time.process_time() - began < 2
