"""What is fuzzed: every reader of foreign bytes, as a function from the bytes of one file to nothing.

A target may return or raise `DwindleError`. Anything else that it raises, a write outside its folder, a pickle that is
opened or a process that is started is a finding (`Watch`). Seeds are small valid files, made here.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Finding", "Target", "Watch", "classify", "targets"]


@dataclass(frozen=True)
class Target:
    """A reader, and the files it reads when all is well."""

    name: str
    form: str
    """The format of `mutations`: json, jsonl, yaml, safetensors or bytes."""
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], Any] = field(repr=False)
    cost: int = 1
    """Roughly, in tenths of a millisecond a case: costly targets get fewer cases."""


class Finding(Exception):
    """What must not happen: its text says what did."""


class TooSlow(BaseException):
    """A case that takes longer than it may."""


class Watch:
    """An audit hook over the whole process: notes writes outside `folder`, unpickling, processes and connections."""

    _EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.noted: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "pickle.find_class" and _is_index_type(*arguments):
            return
        if event in self._EVENTS:
            self.noted.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if (
                writes
                and isinstance(path, str)
                and path != os.devnull
                and not os.path.realpath(path).startswith(self.folder)
            ):
                self.noted.append(f"writes {path!r}")
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            path = str(arguments[0])
            if not os.path.realpath(path).startswith(self.folder):
                self.noted.append(f"{event} {path!r}")


def _is_index_type(module: str, name: str) -> bool:
    """The types that the index of a training checkpoint is made of: found by name, they run nothing."""
    import torch

    from dwindle.checkpoint_reader import _KNOWN

    return (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))


def _late(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def classify(target: Target, data: bytes, watch: Watch, seconds: float = 10.0) -> str:
    """Run one case; return "success" or the name of the DwindleError, raise Finding for anything else.

    `seconds` is of processor time; waiting may take 30 times as long, since a busy machine makes everything wait.
    """
    from dwindle.errors import DwindleError

    watch.noted.clear()
    timers = ((signal.SIGALRM, signal.ITIMER_REAL, 30 * seconds), (signal.SIGPROF, signal.ITIMER_PROF, seconds))
    previous = [signal.signal(told, _late) for told, _, _ in timers]
    for _, timer, most in timers:
        signal.setitimer(timer, most)
    watch.on = True
    try:
        target.run(data)
        outcome = "success"
    except DwindleError as error:
        outcome = type(error).__name__
        if not str(error).strip():
            raise Finding(f"an empty {outcome}") from error
    except TooSlow:
        raise Finding(f"takes longer than {seconds:g} s") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Finding(f"{type(error).__name__}: {error!s:.300}") from error
    finally:
        for (told, timer, _), before in zip(timers, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(told, before)
        watch.on = False
    if watch.noted:
        raise Finding(f"{outcome}, but: {'; '.join(watch.noted[:3])}")
    return outcome


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


RECIPE = {
    "version": 1, "name": "a", "seed": 3, "teacher": {"model": "somewhere", "trust_remote_code": False},
    "data": {"train": ["a.txt", "b.jsonl::text"], "evaluation": "c.txt", "context": 64, "calibration_windows": 8},
    "steps": [
        {"prune": {"ffn_keep": 0.5, "layers_keep": 0.75, "method": "activation", "multiple": 8}},
        {"distill": {"losses": [{"name": "forward_kl", "weight": 0.9}, "label_cross_entropy=0.1"], "tokens": "20M",
                     "batch_size": 4, "learning_rate": 1e-3, "betas": [0.9, 0.95]}},
        {"quantize": {"apple": {"scheme": "palettize", "bits": 4, "group_size": 16},
                      "onnx": {"scheme": "integer", "bits": 4}}},
        {"export": {"formats": ["onnx", "coreml"], "prompts": 2}},
        {"validate": {"targets": ["iphone-15-pro"], "budgets": {"tokens_per_second": ">= 30"}, "repeats": 1}},
    ],
}  # fmt: skip
ROUNDS = {"version": 1, "teacher": {"model": "a"}, "data": {"train": ["a.txt"]}, "steps": [
    {"prune_and_distill": {"rounds": 3, "prune": {"ffn_keep": 0.5}, "distill": {"tokens": 1000}}}]}  # fmt: skip


CURRICULUM = {"version": 1, "teacher": {"model": "a"}, "data": {"train": ["a.txt"]}, "steps": [
    {"distill": {"tokens": 1000, "data": {"train": ["a.txt"], "context": 32, "weights": [1.0]}}},
    {"distill": {"tokens": 1000, "data": {"train": ["b.txt", "c.txt"], "weights": [3, "1.5"], "seed": 2}}}]}  # fmt: skip
CORPUS = {
    "version": 1, "name": "stories", "seed": 0, "folders": {"here": "/nowhere"},
    "sources": [
        {"name": "tales", "place": "{here}/tales.jsonl", "licence": "MIT", "text": "{a}: {b}", "weight": 2},
        {"name": "code", "place": "{stdlib}", "licence": "CC-BY-4.0", "kind": "code", "exclude": ["test/*"],
         "most_bytes": "2MB", "weight": 1},
    ],
    "licences": {"allowed": ["MIT", "CC-BY-*"], "forbidden": ["GPL-*"]},
    "steps": ["normalization", {"language": {"keep": ["en"], "score": 0.5}}, {"quality": {"least_words": 10}},
              {"near_duplicates": {"edited": 0.8}}, {"decontamination": {"shortest": 8, "common": 10, "sets": [
                  {"name": "x", "place": "{here}/x.jsonl", "text": "q"}]}}, "personal_data"],
    "splits": {"calibration": 0.01, "evaluation": 0.02}, "format": "jsonl.zst",
}  # fmt: skip


def _recipes() -> Iterator[Target]:
    import yaml

    from dwindle.devices.budgets import parse_budgets, read_budgets
    from dwindle.distill.loss_spec import LossSpec
    from dwindle.pipeline.corpus_recipe import load_corpus_recipe
    from dwindle.pipeline.option_values import parse_count
    from dwindle.pipeline.recipe import Recipe, parse_overrides

    folder = _folder()

    def recipe(data: bytes) -> None:
        (folder / "recipe.yaml").write_bytes(data)
        Recipe.load(folder / "recipe.yaml")

    def overrides(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        parse_overrides([text])
        Recipe.parse(RECIPE, [text])

    def budgets(data: bytes) -> None:
        parse_budgets([data.decode("utf-8", "replace")])

    def count(data: bytes) -> None:
        with contextlib.suppress(ValueError):  # its contract
            parse_count(data.decode("utf-8", "replace"))

    def budgets_file(data: bytes) -> None:
        (folder / "budgets.yaml").write_bytes(data)
        parse_budgets(read_budgets(folder / "budgets.yaml"))

    def corpus(data: bytes) -> None:
        (folder / "corpus.yaml").write_bytes(data)
        load_corpus_recipe(folder / "corpus.yaml")

    def loss(data: bytes) -> None:
        LossSpec.of(data.decode("utf-8", "replace"))

    seeds = tuple(yaml.safe_dump(one, sort_keys=False).encode() for one in (RECIPE, ROUNDS, CURRICULUM))
    yield Target("recipe", "yaml", seeds, recipe, 400)
    yield Target("override", "bytes", (b"distill.tokens=20M", b"data.train=[a.txt]", b"teacher.model=x",
                                       b"prune.ffn_keep=0.5", b"quantize.apple.bits=4"), overrides, 200)  # fmt: skip
    yield Target("budget", "bytes", (b"tokens_per_second >= 30", b"peak_memory_bytes <= 1.5GB @ 512"), budgets)
    lines, named = ["tokens_per_second >= 30", "peak_memory_bytes <= 1.5GB @ 512"], {"memory": "1.5GB"}
    files = tuple(yaml.safe_dump(one).encode() for one in (lines, named, {"budgets": lines}))
    yield Target("budgets file", "yaml", files, budgets_file, 15)
    yield Target("corpus recipe", "yaml", (yaml.safe_dump(CORPUS, sort_keys=False).encode(),), corpus, 200)
    yield Target("number", "bytes", (b"20M", b"1.5GB", b"3e-4", b"1_000"), count)
    yield Target("loss", "bytes", (b"top1_blend=0.9", b"forward_kl", b"label_cross_entropy=0.1"), loss)


def _devices() -> Iterator[Target]:
    from dwindle.devices.bench_options import BenchOptions
    from dwindle.devices.device_profile import check_profile, load_profile, profile_files
    from dwindle.devices.ssh_board import ssh_command
    from dwindle.devices.targets import parse_target
    from dwindle.errors import RecipeError

    folder = _folder()

    def profile(data: bytes) -> None:
        (folder / "p.yaml").write_bytes(data)
        problems = check_profile(folder / "p.yaml")
        with contextlib.suppress(RecipeError):
            loaded = load_profile(folder / "p.yaml")
            assert not problems, problems
            assert loaded.bandwidth.at() > 0

    def named(data: bytes) -> None:
        found = parse_target(data.decode("utf-8", "surrogateescape"))
        if found.board is not None:
            words = ssh_command(found.board, BenchOptions())
            assert words[-3] == "--", words
            assert not (found.board.user or "x").startswith("-"), words
            assert not any(c in f"{found.board.user}{found.board.host}" for c in " \n\0;$`'\"|&<>"), words

    yield Target(
        "name of a target",
        "bytes",
        (b"ssh://pi@board.local:2222", b"adb:R58M123ABC", b"host", b"ssh://[::1]:22"),
        named,
    )
    files = list(profile_files().values())[:2]
    yield Target("device profile", "yaml", tuple(file.read_bytes() for file in files), profile, 1500)


def _checkpoints(workshop: Path) -> Iterator[Target]:
    import shutil

    from dwindle.checkpoint_files import inspect_checkpoint, read_header
    from dwindle.lineage import Lineage
    from dwindle.model_source import load_config
    from dwindle.tokenizer_files import load_tokenizer
    from dwindle.vocabulary_map import VocabularyMap

    model, folder = workshop / "teacher", _folder()
    shutil.copytree(model, folder / "model")
    inside = folder / "model"

    def header(data: bytes) -> None:
        (folder / "x.safetensors").write_bytes(data)
        read_header(folder / "x.safetensors")

    def index(data: bytes) -> None:
        place = folder / "sharded"
        if not place.exists():
            place.mkdir()
            (place / "a.safetensors").write_bytes(small)
        (place / "model.safetensors.index.json").write_bytes(data)
        inspect_checkpoint(place)

    def of_file(name: str, read: Callable[[Path], Any], place: Path) -> Callable[[bytes], None]:
        place.mkdir(exist_ok=True)

        def run(data: bytes) -> None:
            (place / name).write_bytes(data)
            read(place)

        return run

    def tokenizer(data: bytes) -> None:
        place = folder / "tokenizer"
        if not place.exists():
            place.mkdir()
            shutil.copy(model / "tokenizer_config.json", place)
        (place / "tokenizer.json").write_bytes(data)
        load_tokenizer(place, trust_remote_code=False, vocab=272)

    def tokenizer_config(data: bytes) -> None:
        (inside / "tokenizer_config.json").write_bytes(data)
        load_tokenizer(inside, trust_remote_code=False, vocab=272)

    small = _tensors({"a.weight": (2, 3), "b.weight": (4,)})
    names = json.loads(small[8 : 8 + int.from_bytes(small[:8], "little")])
    indexed = {"metadata": {"total_size": 40}, "weight_map": {n: "a.safetensors" for n in names if n != "__metadata__"}}
    yield Target("safetensors header", "safetensors", (small,), header)
    yield Target("shard index", "json", (_json(indexed),), index, 2)
    config = (model / "config.json").read_bytes()
    yield Target("config.json", "json", (config,), of_file("config.json", load_config, folder / "config"), 20)
    yield Target("lineage.json", "json", ((model / "lineage.json").read_bytes(),),
                 of_file("lineage.json", Lineage.read, folder / "lineage"), 2)  # fmt: skip
    mapped = {"schema": 1, "kind": "vocabulary_map", "vocabulary": 9, "kept": [0, 3, 8], "full_sha256": "a" * 64,
              "pruned_sha256": "b" * 64}  # fmt: skip

    def vocabulary(place: Path) -> None:
        found = VocabularyMap.read(place)
        if found is not None:
            assert found.new_ids().shape == (found.vocabulary,)

    yield Target("vocabulary_map.json", "json", (_json(mapped),),
                 of_file("vocabulary_map.json", vocabulary, folder / "vocabulary"), 2)  # fmt: skip
    yield Target("tokenizer.json", "json", ((model / "tokenizer.json").read_bytes(),), tokenizer, 60)
    yield Target("tokenizer_config.json", "json", ((model / "tokenizer_config.json").read_bytes(),),
                 tokenizer_config, 60)  # fmt: skip


def _whole_models(workshop: Path) -> Iterator[Target]:
    import shutil

    from dwindle.bundle import ModelBundle

    folder = _folder()
    shutil.copytree(workshop / "teacher", folder / "model")
    shutil.copytree(workshop / "packed", folder / "packed")

    def of(name: str, kind: str) -> Callable[[bytes], None]:
        place = folder / kind

        def run(data: bytes) -> None:
            whole = (place / name).read_bytes()
            (place / name).write_bytes(data)
            try:
                ModelBundle.load(place)
            finally:
                (place / name).write_bytes(whole)

        return run

    for kind in ("model", "packed"):
        for name, form in (("config.json", "json"), ("model.safetensors", "safetensors")):
            yield Target(
                f"{kind} with a broken {name}", form, ((folder / kind / name).read_bytes(),), of(name, kind), 400
            )
    yield Target("generation_config.json", "json", ((folder / "model" / "generation_config.json").read_bytes(),),
                 of("generation_config.json", "model"), 400)  # fmt: skip


def _plans(workshop: Path) -> Iterator[Target]:
    from dwindle.bundle import ModelBundle
    from dwindle.prune.keep_plan import KeepPlan
    from dwindle.prune.planning import plan as planned  # noqa: F401  (imported with its room)

    folder = _folder()
    keep = json.loads((workshop / "keep.json").read_text())
    bits = (workshop / "bits.json").read_bytes()

    def keep_plan(data: bytes) -> None:
        from dwindle.pipeline.commands.models import _read_json

        (folder / "keep.json").write_bytes(data)
        made = KeepPlan.from_json(_read_json(str(folder / "keep.json")))
        assert made.parameters_after >= 0

    from dwindle.quantize.bit_plan import BitPlan

    bundle = ModelBundle.load(workshop / "teacher")
    base, shapes, linears = _bit_plan_base(bundle)

    def bit_plan(data: bytes) -> None:
        (folder / "bits.json").write_bytes(data)
        made = BitPlan.read(folder / "bits.json", base, shapes, linears)
        made.table()
        made.model_bits_per_weight  # noqa: B018

    yield Target("keep plan", "json", (_json(keep),), keep_plan, 4)
    yield Target("bit plan", "json", (bits,), bit_plan, 10)


def _bit_plan_base(bundle: Any) -> tuple[Any, Any, Any]:
    from dwindle.quantize.layer_plan import plan_layers
    from dwindle.quantize.options import QuantizeOptions

    base = plan_layers(bundle, QuantizeOptions(scheme="palettize", bits=4, group_size=16))
    shapes = {name: tuple(bundle.model.get_submodule(name).weight.shape) for name in base.formats}
    return base, shapes, set(bundle.anatomy.linear_names())


def _runs(workshop: Path) -> Iterator[Target]:
    from dwindle.checkpoint import Checkpoints
    from dwindle.checkpoint_reader import TensorReader
    from dwindle.pipeline.html_report import render_html
    from dwindle.pipeline.model_card import render_model_card
    from dwindle.pipeline.run_folder import RunFolder
    from dwindle.pipeline.summary import summary
    from dwindle.pipeline.write_reports import read_report
    from dwindle.sharding import Processes

    folder = _folder()

    def report(data: bytes) -> None:
        (folder / "report.json").write_bytes(data)
        found = read_report(folder)
        summary(found)
        render_html(found, title="t", recipe_text="a: b")
        render_model_card(found, title="t")

    def record(data: bytes) -> None:
        (folder / "record.json").write_bytes(data)
        RunFolder(folder).cached(folder, "k")

    def identity(data: bytes) -> None:
        place = folder / "run"
        place.mkdir(exist_ok=True)
        (place / ".run.json").write_bytes(data)
        with RunFolder(place).locked({"teacher": "a"}):
            pass

    def checkpoint(data: bytes) -> None:
        place = folder / "checkpoints" / "step-00000001"
        place.mkdir(parents=True, exist_ok=True)
        (place / "checkpoint.json").write_bytes(data)
        Checkpoints(folder, {"a": 1}, 1, Processes()).newest()

    def metadata(data: bytes) -> None:
        place = folder / "dcp"
        place.mkdir(exist_ok=True)
        (place / ".metadata").write_bytes(data)
        TensorReader(place).read_metadata()

    from dwindle.storage import hash_json

    index = {"step": 1, "fingerprint": {"a": 1}, "progress": {}, "files": {}}
    yield Target("report.json", "json", ((workshop / "report.json").read_bytes(),), report, 1500)
    yield Target("record.json", "json", (_json({"key": "k", "files": "a", "entry_sha256": "b"}),), record, 2)
    yield Target(".run.json", "json", (_json({"teacher": "a"}),), identity, 4)
    yield Target("checkpoint.json", "json", (_json({**index, "sha256": hash_json(index)}),), checkpoint, 3)
    yield Target("checkpoint index (pickle)", "bytes", ((workshop / "dcp.metadata").read_bytes(),), metadata, 2)


def _adapters(workshop: Path) -> Iterator[Target]:
    from dwindle import adapter_card
    from dwindle.adapters.catalogue import described
    from dwindle.peft_folder import read_adapter

    folder = _folder()
    tensors = _tensors({f"base_model.model.model.layers.0.mlp.up_proj.lora_{p}.weight": s
                        for p, s in (("A", (2, 32)), ("B", (64, 2)))})  # fmt: skip
    config = _json({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"],
                    "alpha_pattern": {"up_proj": 3}, "rank_pattern": {}, "modules_to_save": None, "use_dora": False,
                    "use_rslora": True, "fan_in_fan_out": False, "task_type": "CAUSAL_LM",
                    "base_model_name_or_path": "base"})  # fmt: skip
    card = _json({"schema": 1, "base_name": "b", "base_sha256": "a" * 64, "task": "recovery", "started_from": None,
                  "metrics": {"kl": 0.1}, "licence": None, "options": {}, "data": {}, "dwindle": "0.1.0",
                  "sha256": "c" * 64})  # fmt: skip

    def of(name: str) -> Callable[[bytes], None]:
        place = folder / name
        place.mkdir()
        for file, whole in (("adapter_model.safetensors", tensors), ("adapter_config.json", config)):
            (place / file).write_bytes(whole)

        def run(data: bytes) -> None:
            (place / name).write_bytes(data)
            if name == adapter_card.CARD_FILE:
                described(place)
            else:
                read_adapter(place)

        return run

    yield Target("adapter weights", "safetensors", (tensors,), of("adapter_model.safetensors"), 4)
    yield Target("adapter_config.json", "json", (config,), of("adapter_config.json"), 4)
    yield Target("adapter_card.json", "json", (card,), of(adapter_card.CARD_FILE), 3)


def _corpora() -> Iterator[Target]:
    from dwindle.data.sources import check_sources, read_documents

    folder = _folder()
    rows = b'{"text": "one two", "n": 1}\n{"text": "three", "n": null}\n'
    table = io.StringIO()
    csv.writer(table).writerows([["text", "n"], ["one", "1"], ['with "quotes"', "2"]])

    def of(name: str) -> Callable[[bytes], None]:
        def run(data: bytes) -> None:
            (folder / name).write_bytes(data)
            check_sources([str(folder / name)], "text")
            for _ in read_documents(str(folder / name), "text"):
                pass

        return run

    yield Target("corpus .jsonl", "jsonl", (rows,), of("a.jsonl"), 2)
    yield Target("corpus .json", "json", (b"[" + rows.strip().replace(b"\n", b",") + b"]",), of("b.json"), 2)
    yield Target("corpus .csv", "bytes", (table.getvalue().encode(),), of("c.csv"), 2)
    yield Target("corpus .txt", "bytes", (b"one\n\ntwo\n<|endoftext|>\nthree \xc3\xa4\n" * 3,), of("d.txt"), 2)
    yield Target("corpus .txt.gz", "bytes", (gzip.compress(b"one\n\ntwo\n" * 40),), of("e.txt.gz"), 2)
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", None], "n": [1, 2, 3]}), sink)
    yield Target("corpus .parquet", "bytes", (sink.getvalue(),), of("f.parquet"), 10)


def _tasks() -> Iterator[Target]:
    from dwindle.adapters import TaskOptions, read_task

    folder = _folder()

    def of(name: str, **parts: Any) -> Callable[[bytes], None]:
        options = TaskOptions(name="t", data=(str(folder / name),), **parts)

        def run(data: bytes) -> None:
            (folder / name).write_bytes(data)
            read_task(options, 0)

        return run

    rows = [{"prompt": f"say {i}", "completion": f"word {i}", "n": i, "label": ("a", "b")[i % 2]} for i in range(12)]
    pairs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    lines, preferences = (b"".join(_json(row) + b"\n" for row in some) for some in (rows, pairs))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion", "n", "label"])
    writer.writeheader()
    writer.writerows(rows)
    yield Target("task .jsonl", "jsonl", (lines,), of("a.jsonl", prompt="{prompt} {n}"), 6)
    yield Target("task .json", "json", (_json(rows),), of("b.json"), 6)
    yield Target("task .csv", "bytes", (table.getvalue().encode(),), of("c.csv", label="label"), 6)
    yield Target("task of preferences", "jsonl", (preferences,), of("d.jsonl", chosen="chosen", rejected="rejected"), 6)


def _corpus_folders() -> Iterator[Target]:
    from dwindle.data.corpus_folder import licence_of, of_corpus, split_folder
    from dwindle.data.options import DataOptions

    folder = _folder()
    entry = {"path": "train/a.jsonl", "source": "a", "bytes": 9, "documents": 1, "sha256": "c" * 64,
             "licences_bytes": {"MIT": 9}}  # fmt: skip
    splits = {name: {"documents": 1, "bytes": 9, "files": [{**entry, "path": f"{name}/a.jsonl"}]}
              for name in ("train", "calibration", "evaluation")}  # fmt: skip
    (folder / "train").mkdir()
    (folder / "train" / "a.jsonl").write_text('{"text": "one"}\n')

    def manifest(data: bytes) -> None:
        (folder / "corpus.json").write_bytes(data)
        split_folder(folder, "train")
        licence_of(folder / "train" / "a.jsonl")
        of_corpus(DataOptions(train=(str(folder),)))

    whole = {"schema": 1, "name": "c", "seed": 0, "splits": splits, "weights": {"a": 1.0}}
    yield Target("corpus manifest", "json", (_json(whole),), manifest, 4)


def _caches(workshop: Path) -> Iterator[Target]:
    import shutil

    import torch

    from dwindle.distill.logit_cache import LogitCache

    folder = _folder()
    shutil.copytree(workshop / "cache", folder / "cache")
    place = folder / "cache"
    shard = next(place.glob("*.shard"))
    ids = torch.load(workshop / "cache_ids.pt", weights_only=True)

    def of(file: Path) -> Callable[[bytes], None]:
        whole = file.read_bytes()

        def run(data: bytes) -> None:
            file.write_bytes(data)
            try:
                LogitCache.open(place).targets(ids)
            finally:
                file.write_bytes(whole)

        return run

    yield Target(
        "logit cache manifest", "json", ((place / "manifest.json").read_bytes(),), of(place / "manifest.json"), 15
    )
    yield Target("logit cache shard", "bytes", (shard.read_bytes(),), of(shard), 15)


def _artifacts(workshop: Path) -> Iterator[Target]:
    import shutil

    from dwindle.devices.exported import read_artifact
    from dwindle.export.adapter_package import PACKAGE_FILE, described
    from dwindle.export.artefact import read_manifest
    from dwindle.export.mil_reader import read_functions

    folder = _folder()
    package = workshop / "package.mlpackage"
    place = folder / "package.mlpackage"
    shutil.copytree(package, place)
    specification = place / "Data" / "com.apple.CoreML" / "model.mlmodel"

    def manifest(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        read_manifest(folder)

    def mil(data: bytes) -> None:
        specification.write_bytes(data)
        read_functions(place)

    def exported(data: bytes) -> None:
        place = folder / "exported"
        if not place.exists():
            shutil.copytree(workshop / "onnx", place)
        (place / "manifest.json").write_bytes(data)
        read_artifact(place)

    def packaged(data: bytes) -> None:
        (folder / PACKAGE_FILE).write_bytes(data)
        described(folder)

    package = {"schema": 1, "name": "a", "task": "t", "sha256": "c" * 64, "runtimes": {"onnx": {"file": "a"}}}
    facts = (workshop / "onnx" / "manifest.json").read_bytes()
    yield Target("exported folder", "json", (facts,), exported, 60)
    yield Target("adapter package", "json", (_json(package),), packaged, 2)
    yield Target("artifact manifest", "json", ((workshop / "onnx" / "manifest.json").read_bytes(),), manifest, 2)
    yield Target("Core ML program", "bytes", (specification.read_bytes(),), mil, 50)


def _tensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    import torch
    from safetensors.torch import save

    return bytes(
        save({name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in shapes.items()})
    )


_ROOT: list[Path] = []


def _folder() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp(dir=_ROOT[0]))


def targets(workshop: Path, scratch: Path) -> dict[str, Target]:
    """Return all targets by name; `workshop` is what `valid_files` made, cases are written below `scratch`."""
    _ROOT[:] = [scratch]
    made = [*_recipes(), *_devices(), *_checkpoints(workshop), *_plans(workshop), *_runs(workshop),
            *_adapters(workshop), *_corpora(), *_tasks(), *_corpus_folders(), *_caches(workshop), *_artifacts(workshop), *_whole_models(workshop)]  # fmt: skip
    return {target.name: target for target in made}
