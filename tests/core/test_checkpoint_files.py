"""Damaged and hostile checkpoint folders: each is refused with a reason and a remedy."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from dwindle.checkpoint_files import inspect_checkpoint, read_config, read_header
from dwindle.errors import UnsupportedModel


def _raw(path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def whole(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.float16)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_file_is_read(whole):
    files = inspect_checkpoint(whole)
    assert files.files == ("model.safetensors",)
    assert files.tensors["a"].shape == (3, 4)
    assert files.tensors["a"].bytes == 48
    assert files.float_dtype() == "F32"


def test_the_prevailing_float_type_is_by_bytes(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.ones(50, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).float_dtype() == "BF16"


@pytest.mark.parametrize("cut", [1, 10, 40, 10_000])
def test_a_truncated_file_is_refused(whole, cut):
    path = whole / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: max(len(content) - cut, 4)])
    with pytest.raises(UnsupportedModel, match=r"truncated.*Copy or download the checkpoint again"):
        inspect_checkpoint(whole)


def test_a_padded_file_is_refused(whole):
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UnsupportedModel, match="padded"):
        inspect_checkpoint(whole)


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        (b"{not json", b"", "the header cannot be read"),
        (b"[1]", b"", "no JSON object"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4, "names a twice"),
        ({"a": 3}, b"", "entry for a is malformed"),
        ({"a": _entry([1], 0, 4, "F99")}, b"\0" * 4, "no known tensor"),
        ({"a": _entry([-1], 0, 4)}, b"\0" * 4, "no known tensor"),
        ({"a": _entry([2], 0, 4)}, b"\0" * 4, "but has 4 bytes"),
        ({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, b"\0" * 4, "begins at byte 0 where 4 is needed"),
        ({"a": _entry([1], 4, 8)}, b"\0" * 8, "begins at byte 4 where 0 is needed"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, header, data, found):
    _raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UnsupportedModel, match=found):
        inspect_checkpoint(tmp_path)


def test_a_header_longer_than_the_file_is_not_allocated(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(UnsupportedModel, match="truncated or no safetensors file"):
        inspect_checkpoint(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UnsupportedModel, match="git lfs pull"):
        read_header(path)


def test_pickles_are_named_and_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"boom")
    (tmp_path / "other.pt").write_bytes(b"boom")
    with pytest.raises(
        UnsupportedModel, match=r"pickled weights only: other\.pt, pytorch_model\.bin.*safe_serialization"
    ):
        inspect_checkpoint(tmp_path)


def test_other_formats_and_empty_folders_are_explained(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"neither model\.safetensors nor"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModel, match=r"Found model\.gguf"):
        inspect_checkpoint(tmp_path)


def _index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_the_index(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    _index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert set(inspect_checkpoint(tmp_path).tensors) == {"a", "b"}
    _index(tmp_path, {"a": "model-2.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"})
    with pytest.raises(UnsupportedModel, match=r"2 problems.*places a in model-2.*places c in model-1"):
        inspect_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for n in (1, 2):
        save_file({"a": torch.zeros(2)}, tmp_path / f"model-{n}.safetensors")
    _index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(UnsupportedModel, match=r"tensor a is also in model-1\.safetensors"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".x.safetensors"])
def test_an_index_may_not_leave_the_folder(tmp_path, name):
    _index(tmp_path, {"a": name})
    with pytest.raises(UnsupportedModel, match="outside the folder"):
        inspect_checkpoint(tmp_path)


def test_missing_shards_and_an_empty_index_are_named(tmp_path):
    _index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(UnsupportedModel, match=r"2 of 2 shards are missing: model-1\.safetensors, model-2"):
        inspect_checkpoint(tmp_path)
    _index(tmp_path, {})
    with pytest.raises(UnsupportedModel, match="no weight_map"):
        inspect_checkpoint(tmp_path)


def test_config_is_read_or_explained(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"no model folder: it has no config\.json"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="holds an adapter"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="no valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedModel, match="no JSON object"):
        read_config(tmp_path)
