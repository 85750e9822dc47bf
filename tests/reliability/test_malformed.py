"""Every broken input of the named corpus is answered with its message: no traceback, no hang, nothing written or run."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest

from dwindle.errors import DwindleError

sys.path.insert(0, str(Path(__file__).parent))
import valid_files
from malformed import cases

CASES = cases()
SECONDS = 20.0


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("DWINDLE_VALID_FILES")
    return valid_files.make(Path(kept) if kept else tmp_path_factory.mktemp("valid") / "files")


def test_the_corpus_is_as_large_as_the_docs_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    said = re.search(r"the named corpus: ([\d,]+) broken inputs", page)
    assert said is not None
    assert int(said[1].replace(",", "")) == len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
def test_it_is_answered(name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    before = {str(p) for p in files.parent.rglob("*")}
    began = time.perf_counter()
    with pytest.raises(DwindleError) as caught:
        CASES[name].run(files, tmp_path / "work")
    assert time.perf_counter() - began < SECONDS
    assert re.search(CASES[name].expected, str(caught.value), re.DOTALL), str(caught.value)[:500]
    assert len(str(caught.value)) < 20_000
    assert os.listdir(tmp_path) == ["work"], "something was written outside"
    assert {str(p) for p in files.parent.rglob("*")} == before
