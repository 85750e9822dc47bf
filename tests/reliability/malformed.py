"""A named corpus of broken inputs: each is made from a small valid file, and each has a message to be answered with.

`cases()` returns name -> Case. A case changes a copy of what `valid_files` made and then reads it as dwindle does; the
answer must be a `DwindleError` whose text matches `expected` (None: it is read, or may be). Names are stable.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Case", "cases"]


@dataclass(frozen=True)
class Case:
    """One broken input."""

    run: Callable[[Path, Path], Any]
    """Called with the valid files and an empty folder to work in."""
    expected: str
    """A regular expression that the error's text must match."""


@dataclass(frozen=True)
class Other:
    """What a change returns to put another value in the place of the whole object."""

    value: Any


class Intruder:
    """A pickle that makes a file when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch intruded",))


def _load(folder: Path) -> None:
    from dwindle.bundle import ModelBundle

    ModelBundle.load(folder)


def _model(kind: str, change: Callable[[Path], Any], expected: str) -> Case:
    def run(files: Path, work: Path) -> None:
        shutil.copytree(files / kind, work / "model")
        change(work / "model")
        _load(work / "model")

    return Case(run, expected)


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return a change of a JSON file: `change` edits the object, or returns another."""

    def run(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        other = change(value)
        (folder / name).write_text(json.dumps(other.value if isinstance(other, Other) else value))

    return run


def _set(key: str, value: Any) -> Callable[[Path], None]:
    return _edit("config.json", lambda config: config.update({key: value}))


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


# -- config.json --------------------------------------------------------------------------------------------------


def _configs() -> Iterator[tuple[str, Case]]:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "max_position_embeddings", "head_dim")  # fmt: skip
    values = {"zero": 0, "negative": -4, "a word": "many", "a float": 2.5, "a list": [4], "true": True,
              "absurd": 10**12}  # fmt: skip
    for key in sizes:
        for what, value in values.items():
            yield (
                f"config: {key} is {what}",
                _model("teacher", _set(key, value), rf"config.json: .*{key}|{key}=|disagree"),
            )
    for what, change, expected in (
        ("is empty", _write("config.json", b""), "no valid JSON"),
        ("is a list", _write("config.json", b"[]"), "holds no JSON object"),
        ("is a number", _write("config.json", b"7"), "holds no JSON object"),
        ("is no JSON", _write("config.json", b"{hidden_size: 3}"), "no valid JSON"),
        ("is cut off", _bytes("config.json", lambda data: data[:-20]), "no valid JSON"),
        ("is UTF-16", _bytes("config.json", lambda data: data.decode().encode("utf-16")), "no valid JSON"),
        ("is nested a hundred thousand deep", _write("config.json", b"[" * 100_000), "no valid JSON.*nested"),
        ("has a number of 5,000 digits", _write("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"), "no valid JSON"),
        ("is missing", lambda folder: (folder / "config.json").unlink(), "no config.json"),
        ("is a folder", lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()), "no config.json"),
        ("is a link to itself", lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("config.json")), "no config.json"),
        ("is a link to /dev/zero", lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("/dev/zero")), "no config.json"),
        ("names no family", _set("model_type", None), "family None is not supported"),
        ("names an unknown family", _set("model_type", "lama"), "The nearest supported one is llama"),
        ("names a family with a path", _set("model_type", "../llama"), "not supported"),
        ("names a family that is a list", _set("model_type", ["llama"]), "not supported"),
        ("names a multimodal family", _edit("config.json", lambda c: c.update(text_config={"model_type": "llama"})), "multimodal"),
        ("is quantized by another tool", _set("quantization_config", {"quant_method": "gptq"}), "already quantized"),
        ("is quantized by a word", _set("quantization_config", "bits"), "already quantized"),
        ("has a negative norm epsilon", _set("rms_norm_eps", -1.0), "rms_norm_eps"),
        ("has a norm epsilon of NaN", _set("rms_norm_eps", float("nan")), "rms_norm_eps"),
        ("ties by a word", _set("tie_word_embeddings", "yes"), "tie_word_embeddings"),
        ("has an unknown activation", _set("hidden_act", "boom"), "boom"),
        ("has an activation that is a number", _set("hidden_act", 3), "hidden_act"),
        ("has five heads", _set("num_attention_heads", 5), "multiple"),
        ("has an unknown rope", _set("rope_scaling", {"rope_type": "magic", "factor": 2.0}), "magic|rope"),
        ("has a rope that is a list", _set("rope_scaling", [1]), "config.json|rope"),
        ("has layer types for other layers", _set("layer_types", ["full_attention"]), "layer_types|disagree|cannot be loaded"),
        ("has one layer more than the weights", _set("num_hidden_layers", 3), "disagree in .* tensors"),
        ("has a thousand layers", _set("num_hidden_layers", 1000), "1,000 layers|disagree|layers"),
        ("has a wider FFN than the weights", _set("intermediate_size", 256), r"is \[128, 32\] where \[256, 32\]"),
    ):  # fmt: skip
        yield f"config: {what}", _model("teacher", change, expected)
    for what, key, value, expected in (
        ("a version from the future", "version", 99, "version 99"),
        ("no version", "version", None, "version None"),
        ("modules that are a list", "modules", [], "quantization_config|config.json|disagree|cannot be loaded"),
        ("modules that do not exist", "modules", {"model.nowhere": {"role": "linear"}}, "model.nowhere|quantization_config"),
        ("tied heads that are a word", "tied", "lm_head", "quantization_config|config.json|tied|modules|cannot be loaded"),
    ):  # fmt: skip
        change = _edit("config.json", lambda c, k=key, v=value: c["quantization_config"].update({k: v}))
        yield f"packed config: {what}", _model("packed", change, expected)
    specs = {"bits": (0, 9, 64, "four", None), "kind": ("magic", None, 3), "shape": ([], [1], [0, 0], [10**9, 10**9], "x"),
             "group_size": (0, -1, 7, "x"), "role": ("head", None)}  # fmt: skip
    for key, wrong in specs.items():
        for value in wrong:
            change = _edit("config.json", lambda c, k=key, v=value: next(
                iter(c["quantization_config"]["modules"].values())).update({k: v}))  # fmt: skip
            yield (
                f"packed config: {key} is {value!r}",
                _model("packed", change, "model|quantization_config|config.json|cannot be loaded|is stored as kind"),
            )


# -- weights ------------------------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any]], Any], rest: Callable[[bytes], bytes] = bytes) -> Callable[[Path], None]:
    """Return a change of the header of model.safetensors, whose length is then announced rightly."""

    def run(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        other = change(header)
        text = json.dumps(other.value if isinstance(other, Other) else header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rest(data[8 + length :]))

    return run


_NORM = "model.norm.weight"


def _tensor(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def _nan(value: float) -> Callable[[Path], None]:
    import torch

    return lambda folder: _tensor(folder, _NORM, lambda t: torch.full_like(t, value))


def _weights() -> Iterator[tuple[str, Case]]:
    entry = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}
    st = "model.safetensors"
    listed: tuple[tuple[str, Callable[[Path], Any], str], ...] = (
        ("is empty", _write(st, b""), "truncated or no safetensors"),
        ("is eight zeros", _write(st, b"\0" * 8), "header|holds no|is missing|disagree"),
        ("is text", _write(st, b"hello, these are weights, really\n"), "truncated or no safetensors"),
        ("is a Git LFS pointer", _write(st, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS pointer"),
        ("announces a header of 2^63 bytes", _bytes(st, lambda d: (2**63).to_bytes(8, "little") + d[8:]), "truncated"),
        ("announces a header one byte too long", _bytes(st, lambda d: (int.from_bytes(d[:8], "little") + 1).to_bytes(8, "little") + d[8:]), "header cannot be read|begins at|padded|truncated|bytes"),
        ("is cut by a byte", _bytes(st, lambda d: d[:-1]), "truncated"),
        ("is cut in half", _bytes(st, lambda d: d[: len(d) // 2]), "truncated"),
        ("is a byte too long", _bytes(st, lambda d: d + b"\0"), "padded"),
        ("is a pickle with its name", _write(st, pickle.dumps(Intruder())), "truncated or no safetensors"),
        ("is a zip with its name", _write(st, b"PK\x03\x04" + b"\0" * 60), "truncated or no safetensors|header"),
        ("has a header that is a list", _write(st, (2).to_bytes(8, "little") + b"[]"), "no JSON object"),
        ("has a header nested deeply", _write(st, (50_000).to_bytes(8, "little") + b"[" * 50_000), "header cannot be read"),
        ("has a header in Latin-1", _write(st, (8).to_bytes(8, "little") + b'{"\xe4": 1}'), "header cannot be read|malformed"),
        ("names a tensor twice", _bytes(st, lambda d: _doubled(d)), "twice"),
        ("lacks a tensor", _header(lambda h: h.pop(_NORM)), "begins at byte|truncated|padded|is missing"),
        ("has an entry that is a word", _header(lambda h: h.update({_NORM: "x"})), "malformed"),
        ("has an entry that is null", _header(lambda h: h.update({_NORM: None})), "malformed"),
        ("has an entry without a dtype", _header(lambda h: h[_NORM].pop("dtype")), "malformed"),
        ("has an entry without a shape", _header(lambda h: h[_NORM].pop("shape")), "malformed"),
        ("has an entry without offsets", _header(lambda h: h[_NORM].pop("data_offsets")), "malformed"),
        ("has an unknown dtype", _header(lambda h: h[_NORM].update(dtype="F31")), "no known tensor"),
        ("has a dtype that is a list", _header(lambda h: h[_NORM].update(dtype=[])), "no known tensor"),
        ("has a dtype that is an object", _header(lambda h: h[_NORM].update(dtype={"a": 1})), "no known tensor"),
        ("has a negative size", _header(lambda h: h[_NORM].update(shape=[-32])), "no known tensor"),
        ("has a size that is a word", _header(lambda h: h[_NORM].update(shape=["32"])), "no known tensor"),
        ("has a size of true", _header(lambda h: h[_NORM].update(shape=[True])), "no known tensor"),
        ("has a size of 10^400", _header(lambda h: h[_NORM].update(shape=[10**400])), "no known tensor"),
        ("has a hundred thousand axes", _header(lambda h: h[_NORM].update(shape=[1] * 100_000)), "no known tensor"),
        ("has a shape that is a number", _header(lambda h: h[_NORM].update(shape=32)), "malformed"),
        ("has another shape than its bytes", _header(lambda h: h[_NORM].update(shape=[31])), "but has 128 bytes"),
        ("has offsets the wrong way round", _header(lambda h: h[_NORM].update(data_offsets=h[_NORM]["data_offsets"][::-1])), "bytes"),
        ("has three offsets", _header(lambda h: h[_NORM].update(data_offsets=[0, 64, 128])), "malformed"),
        ("has offsets beyond the file", _header(lambda h: h[_NORM].update(data_offsets=[10**9, 10**9 + 128])), "begins at byte"),
        ("has two tensors on the same bytes", _header(lambda h: h.update({"second": h[_NORM]})), "begins at byte"),
        ("has a tensor of no model", _header(lambda h: h.update(extra={**entry, "data_offsets": [_end(h), _end(h) + 128]}), lambda rest: rest + b"\0" * 128), "extra has no place"),
        ("has a norm of another length", lambda f: _tensor(f, _NORM, lambda t: t[:31].clone()), r"is \[31\] where \[32\]"),
        ("holds NaN", _nan(float("nan")), "NaN or infinity"),
        ("holds infinity", _nan(float("inf")), "NaN or infinity"),
        ("is missing", lambda f: (f / st).unlink(), "neither model.safetensors"),
        ("is a folder", lambda f: ((f / st).unlink(), (f / st).mkdir()), "neither model.safetensors"),
        ("is a link that leads nowhere", lambda f: ((f / st).unlink(), (f / st).symlink_to("gone")), "neither model.safetensors"),
        ("is a link to /dev/zero", lambda f: ((f / st).unlink(), (f / st).symlink_to("/dev/zero")), "neither model.safetensors"),
        ("is a link to a text elsewhere", lambda f: ((f / st).unlink(), (f / st).symlink_to("/etc/passwd")), "truncated or no safetensors"),
        ("is replaced by a pickle", lambda f: ((f / st).unlink(), (f / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder()))), "pickled weights only"),
        ("is replaced by .pt", lambda f: ((f / st).unlink(), (f / "model.pt").write_bytes(pickle.dumps(Intruder()))), "pickled weights only"),
        ("is replaced by .ckpt", lambda f: ((f / st).unlink(), (f / "model.ckpt").write_bytes(b"x")), "pickled weights only"),
        ("is replaced by GGUF", lambda f: ((f / st).unlink(), (f / "model.gguf").write_bytes(b"GGUF")), "no Hugging Face checkpoint"),
    )  # fmt: skip
    for what, change, expected in listed:
        yield f"weights: {what}", _model("teacher", change, expected)
    for dtype in ("I64", "F8_E4M3", "BOOL", "F64", "U8"):
        yield (f"weights: say they are {dtype}",
               _model("teacher", _header(lambda h, d=dtype: h[_NORM].update(dtype=d)), "bytes|NaN|cannot be loaded|dtype"))  # fmt: skip


def _end(header: dict[str, Any]) -> int:
    return max(int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__" and "data_offsets" in e)


def _doubled(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    text = header[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _sharded(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a change of a checkpoint that has been cut into two shards with an index."""

    def run(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, held in parts.items():
            save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, held in parts.items() for n in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change(folder)

    return run


def _shards() -> Iterator[tuple[str, Case]]:
    index = "model.safetensors.index.json"

    def place(name: Any) -> Callable[[Path], None]:
        return _edit(index, lambda i: i["weight_map"].update({_NORM: name}))

    outside = ("../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors", "a.bin", ".hidden.safetensors",
               "a\0.safetensors", "", None, 7, ["a.safetensors"], "~/a.safetensors", "x" * 300 + ".safetensors",
               "file:///a.safetensors", "..", "/dev/stdin")  # fmt: skip
    for name in outside:
        shown = repr(name) if len(repr(name)) < 30 else "a name of 300 letters"
        yield (
            f"index: places a tensor in {shown}",
            _model("teacher", _sharded(place(name)), "names files outside the folder"),
        )
    for what, change, expected in (
        ("is no JSON", _write(index, b"{"), "no valid JSON"),
        ("is a list", _write(index, b"[]"), "no weight_map"),
        ("has no map", _edit(index, lambda i: i.pop("weight_map")), "no weight_map"),
        ("has a map that is a list", _edit(index, lambda i: i.update(weight_map=["a.safetensors"])), "no weight_map"),
        ("has an empty map", _edit(index, lambda i: i.update(weight_map={})), "no weight_map"),
        ("names a shard that is gone", lambda f: (f / "b.safetensors").unlink(), "1 of 2 shards are missing"),
        ("places a tensor in the other shard", _edit(index, lambda i: i["weight_map"].update({sorted(i["weight_map"])[0]: "b.safetensors"})), "does not hold it"),
        ("names a tensor that nobody holds", _edit(index, lambda i: i["weight_map"].update(ghost="a.safetensors")), "ghost"),
        ("has a shard twice under two names", lambda f: (shutil.copy(f / "a.safetensors", f / "c.safetensors"), _edit(index, lambda i: i["weight_map"].update(x="c.safetensors"))(f)), "is also in"),
        ("has a damaged shard", _bytes("b.safetensors", lambda d: d[:-4]), "b.safetensors is truncated"),
        ("has two damaged shards", lambda f: [_bytes(n, lambda d: d[:-4])(f) for n in ("a.safetensors", "b.safetensors")], "2 problems"),
    ):  # fmt: skip
        yield f"index: {what}", _model("teacher", _sharded(change), expected)


# -- tokenizers ---------------------------------------------------------------------------------------------------


def _tokenizers() -> Iterator[tuple[str, Case]]:
    tj, tc = "tokenizer.json", "tokenizer_config.json"

    def more_tokens(value: dict[str, Any]) -> None:
        vocab = value["model"]["vocab"]
        vocab.update({f"bomb{i}": len(vocab) + i for i in range(400)})

    for what, change, expected in (
        ("is missing", lambda f: [(f / n).unlink() for n in (tj,)], "no tokenizer"),
        ("is empty", _write(tj, b""), "tokenizer cannot be read"),
        ("is a list", _write(tj, b"[]"), "tokenizer cannot be read"),
        ("is cut off", _bytes(tj, lambda d: d[: len(d) // 2]), "tokenizer cannot be read"),
        ("is nested a hundred thousand deep", _write(tj, b"[" * 100_000), "tokenizer cannot be read"),
        ("is a pickle", _write(tj, pickle.dumps(Intruder())), "tokenizer cannot be read"),
        ("has no model", _edit(tj, lambda t: t.pop("model")), "tokenizer cannot be read"),
        ("has an unknown model", _edit(tj, lambda t: t["model"].update(type="Magic")), "tokenizer cannot be read"),
        ("has a vocabulary that is a list", _edit(tj, lambda t: t["model"].update(vocab=[1])), "tokenizer cannot be read"),
        ("has negative ids", _edit(tj, lambda t: t["model"]["vocab"].update({"a": -5})), "tokenizer cannot be read"),
        ("has more ids than the model embeds", _edit(tj, more_tokens), "has ids up to"),
        ("merges what is no token", _edit(tj, lambda t: t["model"].update(merges=[["nowhere", "nothing"]])), "tokenizer cannot be read"),
        ("has merges that are numbers", _edit(tj, lambda t: t["model"].update(merges=[1, 2])), "tokenizer cannot be read"),
        ("has an unknown pre-tokenizer", _edit(tj, lambda t: t.update(pre_tokenizer={"type": "Magic"})), "tokenizer cannot be read"),
        ("has a pattern that is no regular expression", _edit(tj, lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False})), "tokenizer cannot be read"),
        ("has an added token without an id", _edit(tj, lambda t: t.update(added_tokens=[{"content": "x"}])), "tokenizer cannot be read"),
        ("has a template that is a number", _edit(tj, lambda t: t["post_processor"].update(single=3)), "tokenizer cannot be read"),
        ("has an unknown decoder", _edit(tj, lambda t: t.update(decoder={"type": "Magic"})), "tokenizer cannot be read"),
    ):  # fmt: skip
        yield f"tokenizer.json: {what}", _model("teacher", change, expected)
    for what, change, expected in (
        ("is no JSON", _write(tc, b"{"), "tokenizer cannot be read"),
        ("is a list", _write(tc, b"[1]"), "tokenizer cannot be read"),
        ("names a class that is none", _edit(tc, lambda c: c.update(tokenizer_class="os.system")), "tokenizer cannot be read"),
        ("names a class that is a list", _edit(tc, lambda c: c.update(tokenizer_class=["x"])), "tokenizer cannot be read"),
        ("wants code of its own", _edit(tc, lambda c: c.update(auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")), "tokenizer cannot be read"),
        ("has a BOS that is a number", _edit(tc, lambda c: c.update(bos_token=3)), "tokenizer cannot be read"),
        ("has an EOS that is a list", _edit(tc, lambda c: c.update(eos_token=["a"])), "tokenizer cannot be read"),
    ):  # fmt: skip
        yield f"tokenizer_config.json: {what}", _model("teacher", change, expected)


# -- what lies beside the weights ---------------------------------------------------------------------------------


def _companions() -> Iterator[tuple[str, Case]]:
    for what, content in (("is empty", b""), ("is a list", b"[]"), ("is null", b"null"), ("has no schema", b"{}"),
                          ("has another schema", b'{"schema": 2, "entries": []}'), ("has no entries", b'{"schema": 1}'),
                          ("has entries that are a number", b'{"schema": 1, "entries": 5}'),
                          ("has an entry of an unknown field", b'{"schema": 1, "entries": [{"step": "a", "x": 1}]}'),
                          ("has a step that is a number", b'{"schema": 1, "entries": [{"step": 5}]}'),
                          ("is nested deeply", b'{"schema": 1, "entries": ' + b"[" * 90_000),
                          ("is no UTF-8", b'{"schema": 1, "entries": ["\xff"]}')):  # fmt: skip
        yield f"lineage.json: {what}", _model("teacher", _write("lineage.json", content), "lineage.json cannot be read")
    whole = {"schema": 1, "kind": "vocabulary_map", "vocabulary": 9, "kept": [0, 3, 8], "full_sha256": "a",
             "pruned_sha256": "b"}  # fmt: skip
    for what, changed in (("is another kind", {"kind": "x"}), ("has another schema", {"schema": 9}), ("keeps nothing", {"kept": []}),
                          ("is not ascending", {"kept": [3, 0]}), ("keeps an id twice", {"kept": [3, 3]}),
                          ("keeps ids beyond the vocabulary", {"kept": [0, 9]}), ("keeps negative ids", {"kept": [-1, 2]}),
                          ("keeps words", {"kept": ["a"]}), ("keeps fractions", {"kept": [0.5, 1.5]}),
                          ("keeps truths", {"kept": [False, True]}), ("has a vocabulary of 10^12", {"vocabulary": 10**12}),
                          ("has a vocabulary that is a word", {"vocabulary": "many"}), ("has a key too many", {"x": 1})):  # fmt: skip
        yield (f"vocabulary_map.json: {what}",
               _model("teacher", _write("vocabulary_map.json", json.dumps({**whole, **changed}).encode()),
                      "vocabulary_map.json cannot be read"))  # fmt: skip
    generation = "generation_config.json"
    for what, content in (("is a list", b"[1]"), ("is a word", b'"greedy"')):
        yield f"{generation}: {what}", _model("teacher", _write(generation, content), "cannot be loaded")


# -- recipes ------------------------------------------------------------------------------------------------------

_GOOD = "version: 1\nteacher: {model: a}\ndata: {train: [a.txt]}\nsteps:\n"


def _recipes() -> Iterator[tuple[str, Case]]:
    def of(text: str) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.pipeline.recipe import Recipe

            (work / "recipe.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
            Recipe.load(work / "recipe.yaml")

        return run

    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    for what, text, expected in (
        ("runs a command by a tag", "!!python/object/apply:os.system ['touch intruded']", "no valid YAML.*python/object/apply"),
        ("makes an object by a tag", "version: !!python/object:dwindle.errors.DwindleError {}", "no valid YAML"),
        ("reads a module by a tag", "version: !!python/module:os", "no valid YAML"),
        ("has an unknown tag", "version: !magic 1", "no valid YAML"),
        ("is a bomb of aliases", bomb, "aliases"),
        ("has one alias", "a: &x 1\nb: *x", "aliases"),
        ("refers to itself", "a: &x [*x]", "aliases"),
        ("merges keys", "a: &x {b: 1}\nc: {<<: *x}", "aliases"),
        ("is nested ten thousand deep", "[" * 10_000, "nested|no valid YAML"),
        ("is nested a hundred deep", _GOOD + "  - prune: " + "[" * 100 + "]" * 100, "nested"),
        ("is a megabyte", "# " + "x" * 1_000_000, "1,000,002 characters"),
        ("has a million steps", _GOOD + "  - prune\n" * 1_000_000, "characters where"),
        ("has ten thousand steps", _GOOD + "  - prune\n" * 10_000, "10,000 steps, at most"),
        ("has a billion rounds", _GOOD + "  - prune_and_distill: {rounds: 1000000000, prune: {}, distill: {}}", "rounds"),
        ("has minus one rounds", _GOOD + "  - prune_and_distill: {rounds: -1, prune: {}, distill: {}}", "rounds"),
        ("has a key twice", "version: 1\nversion: 1", "stands twice"),
        ("has a list for a key", "? [a]\n: 1", "a key must be a plain word"),
        ("has a map for a key", "? {a: 1}\n: 1", "a key must be a plain word"),
        ("is no UTF-8", "version: \udcff", "cannot be read as a recipe"),
        ("holds a NUL", "version: \0", "no valid YAML"),
        ("holds an escape sequence", "version: \x1b[2J", "no valid YAML"),
        ("has two documents", "version: 1\n---\nversion: 1", "no valid YAML"),
        ("is empty", "", "found NoneType"),
        ("is a list", "- prune", "found list"),
        ("is a word", "prune", "found str"),
        ("has a number of 5,000 digits", "version: " + "9" * 5000, "no valid YAML|version"),
        ("has an impossible date", "version: 2026-99-99", "no valid YAML"),
        ("has binary that is none", "version: !!binary '$$$'", "version: found b"),
        ("has no version", "teacher: {model: a}\ndata: {train: [a]}\nsteps: [prune]", "version: found None"),
        ("is version 2", "version: 2\nteacher: {model: a}\nsteps: [prune]", "version: found 2, needed 1"),
        ("has no teacher", "version: 1\ndata: {train: [a]}\nsteps: [prune]", "teacher.model is missing"),
        ("has a teacher that is a list", "version: 1\nteacher: [a]\nsteps: [prune]", "teacher.model is missing"),
        ("has a teacher that is a number", "version: 1\nteacher: {model: 5}\nsteps: [prune]", "teacher.model is missing"),
        ("misspells a key", _GOOD.replace("steps", "stepps") + "  - prune", "did you mean 'steps'"),
        ("misspells a step", _GOOD + "  - prunne", "did you mean 'prune'"),
        ("misspells an option", _GOOD + "  - prune: {ffn_kep: 0.5}", "did you mean 'ffn_keep'"),
        ("has a step that is a number", _GOOD + "  - 5", "needed one step name"),
        ("has a step with two names", _GOOD + "  - {prune: {}, distill: {}}", "needed one step name"),
        ("has a step of an empty map", _GOOD + "  - {}", "needed one step name"),
        ("has options that are a list", _GOOD + "  - prune: [1]", "needed keys and values"),
        ("has options that are a word", _GOOD + "  - prune: much", "needed keys and values"),
        ("has steps that are a word", _GOOD.replace("steps:\n", "steps: prune"), "needed a list of steps"),
        ("has no steps", _GOOD.replace("steps:\n", "steps: []"), "needed a list of steps"),
        ("prunes after it quantizes", _GOOD + "  - quantize\n  - prune", "makes no sense"),
        ("quantizes twice", _GOOD + "  - quantize\n  - quantize", "more than once"),
        ("validates what it does not export", _GOOD + "  - validate: {targets: [host]}", "needs an export"),
        ("keeps minus one half", _GOOD + "  - prune: {ffn_keep: -0.5}", "ffn_keep=-0.5"),
        ("keeps twice as much", _GOOD + "  - prune: {ffn_keep: 2}", "ffn_keep=2"),
        ("keeps NaN", _GOOD + "  - prune: {ffn_keep: .nan}", "ffn_keep=nan"),
        ("keeps infinity", _GOOD + "  - prune: {ffn_keep: .inf}", "ffn_keep"),
        ("keeps a word", _GOOD + "  - prune: {ffn_keep: much}", "is no number"),
        ("keeps true", _GOOD + "  - prune: {ffn_keep: true}", "is no number"),
        ("keeps a list", _GOOD + "  - prune: {ffn_keep: [0.5]}", "is no number"),
        ("trains on 1e999 tokens", _GOOD + "  - distill: {tokens: 1e999}", "tokens"),
        ("trains on infinitely many tokens", _GOOD + "  - distill: {tokens: .inf}", "tokens"),
        ("trains on NaN tokens", _GOOD + "  - distill: {tokens: .nan}", "tokens"),
        ("trains on half a token", _GOOD + "  - distill: {tokens: 0.5}", "no whole number"),
        ("trains on minus one token", _GOOD + "  - distill: {tokens: -1}", "tokens=-1"),
        ("has an unknown loss", _GOOD + "  - distill: {losses: [forwrd_kl]}", "forward_kl"),
        ("has losses that are a number", _GOOD + "  - distill: {losses: 7}", "losses"),
        ("has a learning rate below 0", _GOOD + "  - distill: {learning_rate: -1}", "learning_rate"),
        ("has a batch of 0", _GOOD + "  - distill: {batch_size: 0}", "batch_size=0"),
        ("has an unknown scheme", _GOOD + "  - quantize: {scheme: magic}", "magic"),
        ("has 99 bits", _GOOD + "  - quantize: {scheme: integer, bits: 99}", "bits"),
        ("has a variant with a path for a name", _GOOD + "  - quantize: {../x: {scheme: integer}}", "variant names"),
        ("has an unknown format", _GOOD + "  - export: {formats: [onyx]}", "onnx"),
        ("has a budget that is none", _GOOD + "  - export\n  - validate: {targets: [host], budgets: [fast]}", "fast"),
        ("has a seed that is a word", _GOOD + "  - prune\nseed: lucky", "seed: 'lucky' is no whole number"),
        ("has a seed of true", _GOOD + "  - prune\nseed: true", "seed: True is no whole number"),
        ("has data that is a list", "version: 1\nteacher: {model: a}\ndata: [a]\nsteps: [prune]", "data"),
        ("has a context of minus one", _GOOD.replace("[a.txt]", "[a.txt], context: -1") + "  - prune", "context"),
    ):  # fmt: skip
        yield f"recipe: {what}", Case(of(text), expected)


# -- device profiles, corpora, plans, caches, adapters, runs, artifacts -------------------------------------------


def _profiles() -> Iterator[tuple[str, Case]]:
    def of(change: Callable[[Any], Any] | str) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            import yaml

            from dwindle.devices.device_profile import load_profile, profile_files

            text = change
            if not isinstance(change, str):
                value = yaml.safe_load(next(iter(profile_files().values())).read_text())
                change(value)
                text = yaml.safe_dump(value)
            (work / "p.yaml").write_text(text)
            load_profile(work / "p.yaml")

        return run

    for what, change, expected in (
        ("runs a command by a tag", "!!python/object/apply:os.system ['touch intruded']", "is not YAML"),
        ("is a bomb of aliases", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("has a key twice", "name: a\nname: b", "stands twice"),
        ("is a list", "- a", "is not a mapping"),
        ("is empty", "", "is not a mapping"),
        ("is nested deeply", "[" * 5000, "is not YAML"),
        ("has no memory", lambda p: p.pop("memory"), "memory: missing"),
        ("has memory that is a number", lambda p: p.update(memory=8), "memory"),
        ("has a bandwidth of 10^400", lambda p: p["bandwidth"].update(value=10**400), "bandwidth.value"),
        ("has a negative bandwidth", lambda p: p["bandwidth"].update(value=-1), "bandwidth.value"),
        ("has a bandwidth of NaN", lambda p: p["bandwidth"].update(value=float("nan")), "bandwidth.value"),
        ("has a bandwidth of 0", lambda p: p["bandwidth"].update(value=0), "bandwidth.value"),
        ("has a bandwidth in bananas", lambda p: p["bandwidth"].update(unit="bananas"), "no unit of bandwidth"),
        ("has a unit that is a list", lambda p: p["bandwidth"].update(unit=["GB/s"]), "bandwidth"),
        ("has a bandwidth without a source", lambda p: p["bandwidth"].pop("source"), "bandwidth.source: missing"),
        ("has a trust of its own", lambda p: p["bandwidth"].update(trust="mine"), "bandwidth.trust"),
        ("has a trust that is a map", lambda p: p["bandwidth"].update(trust={}), "bandwidth.trust"),
        ("has a date in words", lambda p: p["bandwidth"].update(date="yesterday"), "bandwidth.date"),
        ("has a name with a path", lambda p: p.update(name="../../x"), "name"),
        ("has a name that is a number", lambda p: p.update(name=5), "name"),
        ("has a title that is a list", lambda p: p.update(title=[]), "title"),
        ("has no compute units", lambda p: p.update(compute_units={}), "compute_units"),
        ("has runtimes that are a list", lambda p: p.update(runtimes=[1]), "runtimes"),
        ("has an unknown key", lambda p: p.update(bandwith=1), "did you mean 'bandwidth'"),
    ):  # fmt: skip
        yield f"device profile: {what}", Case(of(change), expected)


def _corpora() -> Iterator[tuple[str, Case]]:
    def of(name: str, content: bytes) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.data.sources import check_sources, read_documents

            (work / name).write_bytes(content)
            check_sources([str(work / name)], "text")
            list(read_documents(str(work / name), "text"))

        return run

    squeezed = gzip.compress(b"one two three\n" * 50)
    for name, what, content, expected in (
        ("a.txt", "is empty", b"", "is empty"), ("a.txt", "is white space", b" \n\n", "white space only"),
        ("a.txt", "is binary", b"ab\0cd", "NUL"), ("a.txt", "is Latin-1", b"gr\xfc\xdfe", "no UTF-8"),
        ("a.txt", "is UTF-16", "hello".encode("utf-16"), "no UTF-8|NUL"),
        ("a.jsonl", "is no JSON", b"hello\n", "no JSON"), ("a.jsonl", "has a bad third line", b'{"text":"a"}\n{"text":"b"}\n{"te\n', ":3: no JSON"),
        ("a.jsonl", "has a list for a row", b"[1]\n", "an object with a text column"), ("a.jsonl", "has no text column", b'{"body": "a"}\n', "no column 'text'"),
        ("a.jsonl", "has a number for a text", b'{"text": 5}\n', "text is needed"), ("a.jsonl", "is nested deeply", b"[" * 100_000, "no JSON"),
        ("a.jsonl", "has a number of 5,000 digits", b'{"text": ' + b"9" * 5000 + b"}", "no JSON"),
        ("a.json", "is an object", b'{"text": "a"}', "a list of objects"), ("a.json", "is cut off", b'[{"text": "a"}, {"te', "no JSON|damaged"),
        ("a.json", "is nested deeply", b"[" * 100_000, "no JSON|damaged|object"), ("a.csv", "has no text column", b"body\na\n", "no column 'text'"),
        ("a.csv", "holds NUL", b"text\na\0b\n", "NUL"), ("a.parquet", "is text", b"hello", "no readable parquet|damaged"),
        ("a.parquet", "is empty but for its marks", b"PAR1" + b"\0" * 8 + b"PAR1", "no readable parquet|damaged"),
        ("a.txt.gz", "is no gzip", b"hello", "cannot be read"), ("a.txt.gz", "is cut off", squeezed[:-12], "cannot be read|damaged"),
        ("a.txt.gz", "has a wrong checksum", squeezed[:-8] + b"\0" * 8, "cannot be read|damaged"),
        ("a.txt.gz", "has a damaged middle", squeezed[:15] + b"\xff" * 10 + squeezed[25:], "cannot be read|damaged"),
    ):  # fmt: skip
        yield f"corpus {name}: {what}", Case(of(name, content), expected)


def _plans() -> Iterator[tuple[str, Case]]:
    def keep(change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.prune.keep_plan import KeepPlan

            value = json.loads((files / "keep.json").read_text())
            other = change(value)
            KeepPlan.from_json(other.value if isinstance(other, Other) else value)

        return run

    for what, change, expected in (
        ("is a list", lambda p: Other([1]), "no keep plan"), ("is of another schema", lambda p: p.update(schema=99), "no keep plan"),
        ("has an unknown key", lambda p: p.update(x=1), "no keep plan"), ("has no shape", lambda p: p.pop("shape"), "incomplete or damaged"),
        ("has no layers", lambda p: p.update(layers=[]), "layers"), ("has layers that are a word", lambda p: p.update(layers="all"), "damaged"),
        ("keeps a layer twice", lambda p: p["layers"].append(p["layers"][-1]), "not ascending"),
        ("keeps a layer that is not there", lambda p: p["layers"][-1].update(layer=99), "index 99"),
        ("keeps unit -1", lambda p: p["layers"][0]["ffn_units"].__setitem__(0, -1), "index -1"),
        ("keeps a unit that is a word", lambda p: p["layers"][0]["ffn_units"].__setitem__(0, "a"), "damaged|whole numbers"),
        ("keeps other counts in each layer", lambda p: p["layers"][0]["ffn_units"].pop(), "different numbers"),
        ("has 10^30 layers", lambda p: p["shape"].update(layers=10**30), "damaged"),
        ("has 10^9 layers", lambda p: p["shape"].update(layers=10**9), "damaged"),
        ("has a width of 0", lambda p: p["shape"].update(width=0), "damaged|width"),
        ("has a width that is a word", lambda p: p["shape"].update(width="wide"), "damaged"),
        ("has an unknown norm", lambda p: p["shape"].update(qk_norm="magic"), "damaged"),
        ("has a score that is NaN", lambda p: p["layers"][0].update(ffn_score=float("nan")), "damaged"),
    ):  # fmt: skip
        yield f"keep plan: {what}", Case(keep(change), expected)

    def bits(change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.bundle import ModelBundle
            from dwindle.quantize.bit_plan import BitPlan
            from dwindle.quantize.layer_plan import ModelShapes, plan_layers
            from dwindle.quantize.options import QuantizeOptions

            value = json.loads((files / "bits.json").read_text())
            other = change(value)
            (work / "bits.json").write_text(json.dumps(other.value if isinstance(other, Other) else value))
            bundle = ModelBundle.load(files / "teacher")
            known = ModelShapes.of(bundle)
            base = plan_layers(known, QuantizeOptions(scheme="palettize", bits=4, group_size=16))
            BitPlan.read(work / "bits.json", base, known.shapes, set(bundle.anatomy.linear_names()))

        return run

    for what, change, expected in (
        ("is a list", lambda p: Other([1]), "no JSON object"), ("is of another schema", lambda p: p.update(schema=9), "schema is 9"),
        ("is of another scheme", lambda p: p.update(scheme="integer"), "scheme is 'integer'"),
        ("has layers that are a word", lambda p: p.update(layers="all"), "layers is not a list"),
        ("has a layer without a name", lambda p: p["layers"][0].pop("name"), "has no name"),
        ("has a layer whose name is a list", lambda p: p["layers"][0].update(name=[1]), "has no name"),
        ("misspells a layer", lambda p: p["layers"][0].update(name=p["layers"][0]["name"] + "x"), "did you mean"),
        ("has a layer twice", lambda p: p["layers"].append(p["layers"][0]), "2 times"), ("lacks a layer", lambda p: p["layers"].pop(), "missing"),
        ("has 99 bits", lambda p: p["layers"][0].update(bits=99), "bits is 99"), ("has bits that are a list", lambda p: p["layers"][0].update(bits=[4]), "bits is"),
        ("has a group size of 0", lambda p: p["layers"][0].update(group_size=0), "group_size is 0"),
        ("has a group size that does not divide", lambda p: p["layers"][0].update(group_size=7), "group_size is 7"),
        ("has notes that are a number", lambda p: p.update(notes=5), "damaged"), ("has a target that is a list", lambda p: p.update(target=[1]), "damaged"),
        ("has a predicted KL that is a word", lambda p: p.update(predicted_kl="small"), "damaged"),
        ("has alternatives that are words", lambda p: p["layers"][0].update(alternatives=["x"]), "damaged"),
    ):  # fmt: skip
        yield f"bit plan: {what}", Case(bits(change), expected)


def _caches() -> Iterator[tuple[str, Case]]:
    def of(change: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            import torch

            from dwindle.distill.logit_cache import LogitCache

            shutil.copytree(files / "cache", work / "cache")
            change(work / "cache")
            LogitCache.open(work / "cache").targets(torch.load(files / "cache_ids.pt", weights_only=True))

        return run

    manifest = "manifest.json"

    def entry(**values: Any) -> Callable[[Path], None]:
        return _edit(manifest, lambda m: next(iter(m["shards"].values())).update(values))

    def renamed(name: str) -> Callable[[Path], None]:
        return _edit(manifest, lambda m: m["shards"].update({name: m["shards"].pop(next(iter(m["shards"])))}))

    for what, change, expected in (
        ("has no manifest", lambda f: (f / manifest).unlink(), "holds no logit cache"),
        ("has a manifest that is a list", _write(manifest, b"[]"), "cannot be read"),
        ("is of another schema", _edit(manifest, lambda m: m.update(schema=9)), "schema"),
        ("has shards that are a list", _edit(manifest, lambda m: m.update(shards=[])), "cannot be read"),
        ("has a shard with a path for a name", renamed("../../etc/passwd"), "impossible shards"),
        ("has a shard with an absolute name", renamed("/etc/passwd"), "impossible shards"),
        ("has a shard of minus one windows", entry(windows=-1), "impossible shards"),
        ("has a shard of 10^12 windows", entry(windows=10**12), "impossible shards"),
        ("has a shard of no positions", entry(positions=0), "impossible shards"),
        ("has a shard of words", entry(windows="many"), "cannot be read"),
        ("has a shard of another size", entry(bytes=10**9), "damaged"),
        ("has a vocabulary of 10^12", _edit(manifest, lambda m: m.update(vocabulary=10**12)), "cannot be read"),
        ("has no draws", _edit(manifest, lambda m: m["sampling"].pop("draws")), "cannot be read"),
        ("draws a word", _edit(manifest, lambda m: m["sampling"].update(draws="x")), "cannot be read"),
        ("has a temperature of 0", _edit(manifest, lambda m: m["sampling"].update(temperature=0)), "temperature"),
        ("always keeps a word", _edit(manifest, lambda m: m["sampling"].update(always=["x"])), "always"),
        ("has a shard cut short", lambda f: _bytes(next(f.glob("*.shard")).name, lambda d: d[:-1])(f), "damaged"),
        ("has shards with flipped bits", lambda f: [_bytes(s.name, lambda d: bytes(b ^ 1 for b in d[:-200]) + d[-200:])(f) for s in f.glob("*.shard")], "damaged|not in this logit cache|none"),
        ("has no shards", lambda f: [s.unlink() for s in f.glob("*.shard")], "are gone"),
    ):  # fmt: skip
        yield f"logit cache: {what}", Case(of(change), expected)


def _adapters() -> Iterator[tuple[str, Case]]:
    def of(change: Callable[[Path], Any], read: str = "weights") -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            import torch
            from safetensors.torch import save_file

            from dwindle.adapter_card import AdapterCard
            from dwindle.peft_folder import read_adapter

            stem = "base_model.model.model.layers.0.mlp.up_proj.lora_"
            save_file({f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(64, 2)},
                      work / "adapter_model.safetensors")  # fmt: skip
            (work / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"})
            )
            card = {"schema": 1, "base_name": "b", "base_sha256": "c", "task": "recovery"}
            if read == "card":
                (work / "adapter_card.json").write_text(json.dumps(card))
            change(work)
            AdapterCard.read(work) if read == "card" else read_adapter(work)

        return run

    config, weights, card = "adapter_config.json", "adapter_model.safetensors", "adapter_card.json"

    def setting(**values: Any) -> Callable[[Path], None]:
        return _edit(config, lambda c: c.update(values))

    for what, change, expected in (
        ("has no config", lambda f: (f / config).unlink(), "adapter_config.json cannot be read"), ("has a config that is a list", _write(config, b"[1]"), "cannot be read"),
        ("has a config nested deeply", _write(config, b"[" * 90_000), "cannot be read"), ("is a prefix", setting(peft_type="PREFIX_TUNING"), "peft_type"),
        ("changes biases", setting(bias="all"), "bias='all'"), ("saves modules", setting(modules_to_save=["lm_head"]), "modules_to_save"),
        ("has an alpha that is a word", setting(lora_alpha="big"), "alpha"), ("has an alpha of infinity", setting(lora_alpha=float("inf")), "alpha"),
        ("has a pattern that never ends", setting(alpha_pattern={"(([a-z._0-9])+)+X": 1}), "alpha_pattern"),
        ("has a pattern that is none", setting(alpha_pattern={"([": 1}), "alpha_pattern"), ("has patterns that are a list", setting(alpha_pattern=[1]), "alpha_pattern"),
        ("has a pattern for a word", setting(alpha_pattern={"up_proj": "x"}), "alpha"),
        ("has no weights", lambda f: (f / weights).unlink(), "cannot be read as safetensors"), ("has a pickle for weights", _write(weights, pickle.dumps(Intruder())), "cannot be read as safetensors"),
        ("has a .bin beside no weights", lambda f: ((f / weights).unlink(), (f / "adapter_model.bin").write_bytes(pickle.dumps(Intruder()))), "pickle .* is never loaded"),
        ("has weights cut short", _bytes(weights, lambda d: d[:-1]), "cannot be read as safetensors"),
        ("has a tensor of something else", lambda f: _only(f / weights, "base_model.model.x.weight"), "no low-rank change"),
        ("has one half", lambda f: _only(f / weights, "base_model.model.x.lora_A.weight"), "lora_B is missing"),
    ):  # fmt: skip
        yield f"adapter: {what}", Case(of(change), expected)
    for what, change in (("is missing", lambda f: (f / card).unlink()), ("is a list", _write(card, b"[]")), ("is of another schema", _edit(card, lambda c: c.update(schema=2))),
                         ("has no base", _edit(card, lambda c: c.pop("base_sha256"))), ("has an unknown key", _edit(card, lambda c: c.update(x=1))),
                         ("has a task that is a number", _edit(card, lambda c: c.update(task=3))), ("has metrics that are words", _edit(card, lambda c: c.update(metrics={"kl": "x"}))),
                         ("is nested deeply", _write(card, b"[" * 90_000))):  # fmt: skip
        yield f"adapter card: {what}", Case(of(change, "card"), "adapter_card.json")


def _only(path: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.ones(2, 32)}, path)


def _runs() -> Iterator[tuple[str, Case]]:
    def report(change: Callable[[Any], Any] | bytes) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.pipeline.write_reports import read_report

            if isinstance(change, bytes):
                (work / "report.json").write_bytes(change)
            else:
                value = json.loads((files / "report.json").read_text())
                change(value)
                (work / "report.json").write_text(json.dumps(value))
            read_report(work)

        return run

    for what, change, expected in (
        ("is empty", b"", "cannot be read as a report"), ("is a list", b"[]", "cannot be read as a report|schema"), ("is of another schema", lambda r: r.update(schema=7), "found schema 7"),
        ("has no steps", lambda r: r.pop("steps"), "cannot be read as a report"), ("has steps that are words", lambda r: r.update(steps=["x"]), "cannot be read as a report"),
        ("has a step of an unknown field", lambda r: r["steps"][0].update(x=1), "cannot be read as a report"),
        ("has seconds that are a word", lambda r: r["steps"][0].update(seconds="long"), "StepRecord|cannot be read as a report"),
        ("has sizes that are lists", lambda r: r["steps"][0]["after"].update(bytes=[1]), "cannot be read as a report"),
        ("has a number of NaN", lambda r: r["steps"][0]["after"].update(bits_per_weight=float("nan")), "cannot be read as a report"),
        ("has targets of numbers", lambda r: r.update(targets=[5]), "cannot be read as a report"), ("is nested deeply", b"[" * 90_000, "cannot be read as a report"),
        ("is missing", lambda r: r.clear(), "schema None"),
    ):  # fmt: skip
        yield f"report.json: {what}", Case(report(change), expected)

    def evaluated(change: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.pipeline.evaluate import evaluate

            shutil.copytree(files / "onnx", work / "onnx")
            change(work / "onnx")
            evaluate(str(work / "onnx"), files / "valid.txt", max_tokens=64)

        return run

    def external(location: str) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            import onnx

            model = onnx.load(folder / "model.onnx", load_external_data=True)
            tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
            (folder.parent / "secret.bin").write_bytes(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location.format(work=folder.parent))
            (folder / "model.onnx").write_bytes(model.SerializeToString())

        return run

    for what, change, expected in (
        ("has no manifest that can be read", _write("manifest.json", b"{"), "manifest.json"), ("has a manifest that is a list", _write("manifest.json", b"[]"), "manifest.json"),
        ("has a manifest nested deeply", _write("manifest.json", b"[" * 90_000), "manifest.json"),
        ("has no parameters", _edit("manifest.json", lambda m: m.pop("parameters")), "manifest.json"), ("has a context that is a word", _edit("manifest.json", lambda m: m.update(context_length="x")), "manifest.json"),
        ("has 0 parameters", _edit("manifest.json", lambda m: m.update(parameters=0)), "manifest.json"), ("has bytes that are a list", _edit("manifest.json", lambda m: m.update(bytes=[1])), "manifest.json"),
        ("is of an unknown format", _edit("manifest.json", lambda m: m.update(format="magic")), "magic"), ("has a format with a path", _edit("manifest.json", lambda m: m.update(format="../x")), "cannot be executed"),
        ("has no model", lambda f: [p.unlink() for p in f.glob("model.onnx*")], "model.onnx"), ("has an empty model", _write("model.onnx", b""), "refuses|model.onnx"),
        ("has a model of text", _write("model.onnx", b"hello"), "refuses|model.onnx"), ("has a model cut in half", _bytes("model.onnx", lambda d: d[: len(d) // 2]), "refuses|model.onnx"),
        ("reads weights from the folder above", external("../secret.bin"), "refuses|outside"), ("reads weights from an absolute path", external("{work}/secret.bin"), "refuses|outside"),
        ("reads weights from a file that is gone", external("gone.bin"), "refuses|gone.bin"),
        ("has no tokenizer", lambda f: [p.unlink() for p in f.glob("token*")], "tokenizer"), ("has a damaged tokenizer", _write("tokenizer.json", b"{"), "tokenizer"),
    ):  # fmt: skip
        yield f"ONNX artifact: {what}", Case(evaluated(change), expected)


def _names() -> Iterator[tuple[str, Case]]:
    def model(name: str) -> Callable[[Path, Path], None]:
        return lambda files, work: _load(name)  # type: ignore[arg-type,return-value]

    for name in ("", " ", "../..", "a/b/c", "https://example.org/x", "org/name; rm -rf x", "$(id)", "a\0b", "~nobody-here/x",
                 "-o", "org/..", "x" * 5000, "\x1b[2J"):  # fmt: skip
        yield (
            f"model name: {name[:24]!r}",
            Case(
                model(name),
                r"does not exist|no config\.json|is no model folder|could not be had|no folder here|is a file|cannot be",
            ),
        )


def _curation() -> Iterator[tuple[str, Case]]:
    file = {"path": "train/a.jsonl", "source": "a", "bytes": 9, "licences_bytes": {"MIT": 9}}
    split = {"documents": 1, "files": [file]}
    whole = {"schema": 1, "splits": {"train": split, "calibration": {**split, "files": []},
                                     "evaluation": {**split, "files": []}}, "weights": {"a": 1}}  # fmt: skip

    def manifest(data: bytes) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.data import DataOptions
            from dwindle.data.corpus_folder import of_corpus

            (work / "corpus.json").write_bytes(data)
            of_corpus(DataOptions(train=(str(work),)))

        return run

    def changed(**changes: Any) -> bytes:
        return json.dumps(
            {**whole, "splits": {**whole["splits"], "train": {**split, "files": [{**file, **changes}]}}}
        ).encode()

    for what, data in (
        ("is cut in half", json.dumps(whole).encode()[:40]), ("is nested 100,000 deep", b"[" * 100_000),
        ("has splits that are a list", json.dumps({**whole, "splits": []}).encode()),
        ("lacks a split", json.dumps({**whole, "splits": {"train": split}}).encode()),
        ("has weights of words", json.dumps({**whole, "weights": {"a": "much"}}).encode()),
        ("has a file without path", changed(path=None)), ("has a file elsewhere", changed(path="../../etc/passwd")),
        ("has a file at an absolute path", changed(path="/etc/passwd")), ("has a file of another split", changed(path="evaluation/a.jsonl")),
        ("has bytes of words", changed(bytes="nine")), ("has a source that is a list", changed(source=["a"])),
        ("has licences that are a list", changed(licences_bytes=["MIT"])),
    ):  # fmt: skip
        yield f"corpus manifest: {what}", Case(manifest(data), r"corpus\.json: a damaged manifest")

    def task(name: str, data: bytes) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.adapters import TaskOptions, read_task

            (work / name).write_bytes(data)
            read_task(TaskOptions(name="t", data=(str(work / name),)), 0)

        return run

    good = b'{"prompt": "a", "completion": "b"}\n'
    for what, name, data, expected in (
        ("half of a surrogate pair", "a.jsonl", good + b'{"prompt": "\\ud800", "completion": "b"}', "no Unicode"),
        ("a line nested 100,000 deep", "a.jsonl", good + b"[" * 100_000, "nested too deeply"),
        ("a number of 5,000 digits", "a.jsonl", good + b'{"prompt": ' + b"9" * 5000 + b"}", "thousands of digits"),
        ("a list nested 100,000 deep", "a.json", b"[" * 100_000, "nested too deeply"),
        ("a list with a number of 5,000 digits", "a.json", b"[" + b"9" * 5000 + b"]", "thousands of digits"),
    ):
        yield f"task records: {what}", Case(task(name, data), expected)

    def corpus(place: str) -> Callable[[Path, Path], None]:
        def run(files: Path, work: Path) -> None:
            from dwindle.pipeline.corpus_recipe import load_corpus_recipe

            made = {"version": 1, "name": "c", "sources": [{"name": "a", "place": place}, {"name": "b", "place": "b"}]}
            (work / "corpus.yaml").write_text(json.dumps(made))
            load_corpus_recipe(work / "corpus.yaml")

        return run

    yield "corpus recipe: a place with a zero byte", Case(corpus("a\0b"), "places that no file can have")
    yield "corpus recipe: a place of 5,000 letters", Case(corpus("a" * 5000), "places that no file can have")


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    made = [*_configs(), *_weights(), *_shards(), *_tokenizers(), *_companions(), *_recipes(), *_profiles(), *_corpora(),
            *_plans(), *_caches(), *_adapters(), *_runs(), *_names(), *_curation()]  # fmt: skip
    found = dict(made)
    assert len(found) == len(made), "two cases have one name"
    for case in found.values():
        re.compile(case.expected)
    return found
