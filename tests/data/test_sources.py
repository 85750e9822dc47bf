from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dwindle.data.packing import joined_text
from dwindle.data.sources import check_sources, read_documents
from dwindle.errors import DataError


def texts(place: Any, column: str = "text") -> list[str]:
    return [d.text for d in read_documents(str(place), column)]


def test_marker_lines_separate_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n<|endoftext|>\r\n\r\nthree <|endoftext|> inline\n<|endoftext|>\n \n")
    assert texts(path) == ["one\r\ntwo\r\n", "\r\nthree <|endoftext|> inline\n"]


@pytest.mark.parametrize("blank", ["\n", " \n", "\t\r\n", "\n\n\n"])
def test_stretches_of_paragraphs_give_the_file_back(tmp_path: Path, blank: str) -> None:
    text = "\n" + "".join(f"paragraph {i} " * 40 + "\n" + blank for i in range(60)) + "end"
    path = tmp_path / "a.txt"
    path.write_text(text, newline="")
    documents = list(read_documents(str(path), "text"))
    assert len(documents) > 3
    assert [d.continues for d in documents] == [False] + [True] * (len(documents) - 1)
    assert all(len(d.text) >= 4000 for d in documents)
    assert joined_text(documents) == text


def test_rows_of_every_format(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a, b\nc", "n": 1}, {"text": "d", "n": 2}, {"text": "  ", "n": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text('text,n\n"a, b\nc",1\nd,2\n  ,3\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as handle:
        handle.write("\n".join(map(json.dumps, rows)))
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e.jsonl.gz"):
        assert texts(tmp_path / name) == ["a, b\nc", "d"], name
    for name in ("a.jsonl", "b.json", "c.csv"):
        with pyarrow.output_stream(str(tmp_path / f"{name}.zst"), compression="zstd") as stream:
            stream.write((tmp_path / name).read_bytes())
        assert texts(tmp_path / f"{name}.zst") == ["a, b\nc", "d"], name
    assert len(texts(tmp_path)) == 16


def test_a_pattern_joins_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "1 + 1?", "a": "2", "n": 1}, {"q": "2 + 2?", "a": None, "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert texts(f"{tmp_path / name}::{{q}} {{a}}") == ["1 + 1? 2", "2 + 2? "]
        with pytest.raises(DataError, match="no column 'answer'; the columns are q, a, n"):
            texts(f"{tmp_path / name}::{{q}} {{answer}}")


def test_mixed_schemas_are_counted_with_examples(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"body": "y"}, {"text": "z"}, *([{"title": "t"}] * 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"a.jsonl:2: no column 'text'; the columns are body.*9 more of 12 rows: 4, 5, 6"
    ):
        texts(tmp_path / "a.jsonl")


def test_a_list_is_read_entry_by_entry(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "\\ué " * (i * 997 % 20_000)} for i in range(120)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert (tmp_path / "a.json").stat().st_size > 1 << 22
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "b.json").write_text(json.dumps(rows)[:-1])
    with pytest.raises(DataError, match=r"b\.json:1: no JSON"):
        texts(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(" [ ] ")
    assert texts(tmp_path / "c.json") == []


def test_a_record_that_is_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.data.byte_stream.LONGEST_RECORD_BYTES", 1000)
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_text("text\n" * (name == "a.csv") + json.dumps({"text": "x" * 2000}) + "\n")
        with pytest.raises(DataError, match=r"a\.\w+:\d: a line of more than 1,000 bytes"):
            texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", 'text,label\n"\ufeffcat",x\n'), ("a.json", '[{"text": "\ufeffcat"}]'),
     ("a.jsonl", '{"text": "\ufeffcat"}\n')],
)  # fmt: skip
def test_a_byte_order_mark_in_front_of_rows_is_no_part_of_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(f"\ufeff{content}", encoding="utf-8")
    assert texts(tmp_path / name) == ["\ufeffcat"]


def test_the_column_can_stand_in_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
    assert texts(f"{tmp_path / 'a.csv'}::answer") == ["a"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_missing_column_names_those_found(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"title": ["x"], "body": ["y"]}), path)
    else:
        path.write_text({"a.jsonl": '{"title": "x", "body": "y"}', "a.json": '[{"title": "x", "body": "y"}]',
                         "a.csv": "title,body\nx,y\n"}[name])  # fmt: skip
    with pytest.raises(DataError, match=r"no column 'text'; the columns are title, body.*PLACE::COLUMN"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a.jsonl:2: no JSON"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: a list, but an object"),
        ("a.jsonl", b'{"text": 5}\n', r"column 'text' holds a int"),
        ("a.jsonl", b'{"text": "half \\ud83d"}\n', r"a.jsonl:1: column 'text' holds text that is no Unicode"),
        ("a.json", b'{"text": "x"}', r"a JSON dict, but a list of objects"),
        ("a.json", b"[{]", r"no JSON .*name it .jsonl"),
        ("a.parquet", b"PAR1 no", r"no readable parquet"),
        ("a.csv", b"text\n\xff\xfe\xfd\n", r"no UTF-8"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:40], r"damaged"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd nothing that was ever compressed", r"damaged"),
    ],
)
def test_damaged_files_are_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_all_unusable_sources_are_named_at_once(tmp_path: Path) -> None:
    contents = {"empty.txt": b"", "nul.txt": b"a\0b", "latin.txt": b"caf\xe9 au lait", "blank.txt": b" \n\n",
                "zip.txt.gz": b"not gzip", "good.txt": "schön".encode()}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").write_bytes(b"x")
    places = [*(str(tmp_path / name) for name in contents), str(tmp_path / "folder"), "missing/dir/a.txt", "gone.txt"]
    with pytest.raises(DataError) as caught:
        check_sources(places, "text")
    message = str(caught.value)
    for wanted in ("empty.txt: the file is empty", "nul.txt: a binary file", "latin.txt: no UTF-8 text (byte 3)",
                   "blank.txt: the file holds white space only", "zip.txt.gz: cannot be read",
                   "folder: the folder holds", "missing/dir/a.txt: no such", "gone.txt: no such file"):  # fmt: skip
        assert wanted in message
    assert "good.txt" not in message


def test_a_character_across_the_sample_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.data.sources._SAMPLE_BYTES", 6)
    (tmp_path / "a.txt").write_text("abcde好xyz", encoding="utf-8")
    check_sources([str(tmp_path / "a.txt")], "text")


def test_a_folder_leaves_out_what_is_no_text_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in {"b.py": b"x = 1\n", "a.md": b"# A\n", "bad.py": b"\xff\xfe", "__init__.py": b"",
                          ".hidden.py": b"y", "__pycache__/c.py": b"z", "data.bin": b"w"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert texts(tmp_path) == ["# A\n", "x = 1\n"]
    assert "1 file(s) left out" in caplog.text
    assert "bad.py: no UTF-8 text" in caplog.text


def test_a_folder_of_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no file in the folder holds text"):
        texts(tmp_path)


def test_a_place_that_is_no_path_and_no_name() -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        texts("a/b/c.txt")


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        calls.append((name, config, options))
        return [{"text": "one"}, {"text": " "}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("owner/set[small]:validation") == ["one", "two"]
    assert calls == [("owner/set", "small", {"split": "validation", "streaming": True})]
    check_sources(["owner/set"], "text")
    with pytest.raises(DataError, match=r"row 1: no column 'story'; the columns are text"):
        texts("owner/set", "story")


def test_a_hub_failure_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"split 'train'.*ConnectionError: no route. Correct the path"):
        texts("owner/set")
