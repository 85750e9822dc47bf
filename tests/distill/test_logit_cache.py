from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.distill import (
    CachedTeacher,
    CacheOptions,
    DistillOptions,
    LogitCache,
    remember_teacher,
    run,
    teacher_is_needed,
    write_cache,
)
from dwindle.distill.cache_shard import window_hashes
from dwindle.distill.cached_teacher import model_files_sha256
from dwindle.distill.sparse_targets import SparseTargets
from dwindle.errors import DataError, OutputError, RecipeError
from dwindle.measure import Meter
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256
from dwindle.vocabulary_map import VocabularyMap

T = 16
"""Positions per window."""


def windows(bundle: Any, count: int = 24, seed: int = 3, role: Any = "train", tokens: int = T + 1) -> TokenSet:
    ids = torch.randint(0, 200, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return TokenSet(ids, role, f"text {seed}", f"{seed}:{count}", 1, encoding_sha256(bundle.tokenizer))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}


@pytest.fixture
def teacher(tiny_bundle: Any) -> Any:
    return tiny_bundle(seed=1, initializer_range=0.4)


@pytest.fixture
def options(tmp_path: Path) -> CacheOptions:
    """Shards of 5 windows: 24 windows make 4 whole ones and a shorter one."""
    return CacheOptions(str(tmp_path / "cache"), shard_tokens=5 * T, batch_tokens=2 * T)


def same(a: SparseTargets, b: SparseTargets) -> bool:
    vocab = int(max(a.ids.max(), b.ids.max())) + 1
    return torch.equal(a.dense(vocab), b.dense(vocab)) and torch.equal(a.entropy, b.entropy)


def test_what_is_read_is_the_teachers_word(teacher: Any, options: CacheOptions) -> None:
    tokens = windows(teacher)
    heard: list[tuple[int, int]] = []
    always = replace(options, always=(257, 3))
    cache = write_cache(teacher, tokens, always, on_shard=lambda done, of: heard.append((done, of)))
    assert heard == [(i, 5) for i in range(1, 6)]
    with torch.no_grad():
        p = torch.softmax(teacher.model(tokens.ids[:, :-1]).logits.flatten(0, 1), -1)
    found = CachedTeacher(cache).targets(tokens.ids[:, :-1])
    assert found.logits is None
    assert found.sparse is not None
    assert torch.equal(found.top1, p.argmax(-1))
    weights = found.sparse.dense(p.shape[1])
    assert torch.allclose(weights.sum(1), torch.ones(24 * T), atol=1e-5)
    others = found.top1 != 257
    assert torch.allclose(weights[others, 257], p[others, 257], rtol=1e-3)
    certain = (p >= 1 / options.draws).scatter(1, found.top1[:, None], False)
    assert torch.allclose(weights[certain], p[certain], rtol=0.015)
    assert torch.allclose(found.sparse.entropy, torch.special.entr(p).sum(-1), atol=0.02)
    assert (weights - p).mean(0).abs().max() < 3e-3
    assert cache.manifest.data[0]["windows"] == 24
    assert cache.manifest.positions == 24 * T
    assert cache.manifest.bytes == sum(
        len(data) for name, data in shards(cache.folder).items() if name.endswith(".shard")
    )


def test_any_order_and_any_part_reads_the_same(teacher: Any, options: CacheOptions) -> None:
    tokens = windows(teacher)
    cache = write_cache(teacher, tokens, options)
    whole = cache.targets(tokens.ids[:, :-1])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = LogitCache.open(cache.folder).targets(tokens.ids[order, :-1])
    for place, index in enumerate(order.tolist()):
        one = shuffled.at(slice(place * T, place * T + T))
        assert same(one, whole.at(slice(index * T, index * T + T)))
        assert same(one, cache.targets(tokens.ids[index : index + 1, :-1]))


def test_one_process_several_and_a_killed_one_write_the_same_files(
    teacher: Any, options: CacheOptions, tmp_path: Path
) -> None:
    tokens = windows(teacher)
    write_cache(teacher, tokens, options)
    expected = shards(Path(options.folder))
    several = replace(options, folder=str(tmp_path / "several"))
    for part in ((2, 3), (0, 3), (1, 3)):
        write_cache(teacher, tokens, several, part=part)
    assert shards(Path(several.folder)) == expected

    def kill(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    killed = replace(options, folder=str(tmp_path / "killed"))
    with pytest.raises(KeyboardInterrupt):
        write_cache(teacher, tokens, killed, on_shard=kill)
    assert len(list(Path(killed.folder).glob("*.shard"))) == 3
    with pytest.raises(DataError, match="9 of the 24 windows"):
        LogitCache.open(killed.folder).require(tokens)
    write_cache(teacher, tokens, killed)
    assert shards(Path(killed.folder)) == expected


def test_a_shard_without_its_entry_in_the_manifest_is_written_again(
    teacher: Any, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill hits between the rename of a shard and the manifest."""
    tokens = windows(teacher)
    calls = 0
    with monkeypatch.context() as patch:

        def hash_file(path: Path) -> str:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return "0" * 64

        patch.setattr("dwindle.distill.cache_writer.hash_file", hash_file)
        with pytest.raises(KeyboardInterrupt):
            write_cache(teacher, tokens, options)
    assert len(list(Path(options.folder).glob("*.shard"))) == 2
    assert len(LogitCache.open(options.folder).manifest.shards) == 1
    write_cache(teacher, tokens, options).require(tokens)


def test_a_whole_cache_is_not_written_again_and_another_text_is_appended(
    teacher: Any, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = windows(teacher), windows(teacher, 7, seed=4)
    write_cache(teacher, first, options)
    before = shards(Path(options.folder))
    with monkeypatch.context() as patch:
        patch.setattr("dwindle.distill.cache_writer._Writer.write", None)
        assert shards(write_cache(teacher, first, options).folder) == before
    both = replace(second, ids=torch.cat([first.ids[5:9], second.ids, second.ids[:2]]), sha256="both")
    with pytest.raises(DataError, match=r"9 of the 13 windows of text 4 .* 24 windows of text 3, windows of 17 tokens"):
        LogitCache.open(options.folder).require(both)
    cache = write_cache(teacher, both, options)
    after = shards(cache.folder)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".shard"))
    assert len(cache.manifest.shards) == len(before) - 2 + 3
    assert cache.manifest.positions == (24 + 7) * T
    assert {one["sha256"] for one in cache.manifest.data} == {"3:24", "both"}
    cache.require(first)
    cache.require(both)
    shorter = write_cache(teacher, replace(windows(teacher, 6, seed=5), ids=second.ids[:, :10]), options)
    assert shorter.targets(second.ids[:2, :9]).ids.shape[0] == 18


def test_a_cache_of_something_else_is_refused_and_left_alone(
    teacher: Any, tiny_bundle: Any, options: CacheOptions
) -> None:
    tokens = windows(teacher)
    write_cache(teacher, tokens, options)
    before = shards(Path(options.folder))
    other = tiny_bundle(seed=9)
    with pytest.raises(RecipeError, match=r"predictions of something else: teacher: found \w{12}, needed \w{12}"):
        write_cache(other, tokens, options)
    with pytest.raises(RecipeError, match=r"draws: found 32, needed 50; temperature: found 1.0, needed 2.0"):
        write_cache(teacher, tokens, replace(options, draws=50, temperature=2.0))
    foreign = tiny_bundle(seed=1, initializer_range=0.4)
    foreign.tokenizer.add_tokens(["<new>"])
    with pytest.raises(RecipeError, match="the data was tokenised with"):
        write_cache(foreign, tokens, options)
    with pytest.raises(RecipeError, match="teacher: found"):
        run(other, DistillOptions(cache=options, steps=1), teacher=other, train=tokens)
    student = tiny_bundle(seed=2, vocab_size=280)
    with pytest.raises(RecipeError, match="vocabulary: found 272, needed 280"):
        run(student, DistillOptions(cache=options, steps=1), train=tokens)
    assert shards(Path(options.folder)) == before


def test_what_cannot_be_cached_is_named_at_once(teacher: Any, options: CacheOptions) -> None:
    long = windows(teacher, tokens=80)
    with pytest.raises(RecipeError) as caught:
        write_cache(teacher, long, replace(options, always=(500,)))
    assert "always=[500] (needed: ids below 272)" in str(caught.value)
    assert "windows predict 79 tokens, the teacher's context is 64" in str(caught.value)
    with pytest.raises(DataError, match="role 'calibration'"):
        write_cache(teacher, windows(teacher, role="calibration"), options)
    assert not Path(options.folder).exists()


def test_a_vocabulary_beyond_the_fields_is_refused(
    teacher: Any, options: CacheOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dwindle.distill.cache_writer.MAX_FIELD_BITS", 8)
    with pytest.raises(RecipeError, match="has 272 entries"):
        write_cache(teacher, windows(teacher), options)


def test_a_folder_of_other_things_is_refused(teacher: Any, options: CacheOptions, tmp_path: Path) -> None:
    Path(options.folder).mkdir()
    (Path(options.folder) / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"something else than a logit cache \(notes.txt\)"):
        write_cache(teacher, windows(teacher), options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_cache(teacher, windows(teacher), CacheOptions(str(tmp_path / "file")))
    with pytest.raises(DataError, match="holds no logit cache"):
        LogitCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 7}')
    with pytest.raises(DataError, match=r"manifest.json cannot be read \(its schema is not 1\)"):
        LogitCache.open(tmp_path)


def test_damaged_shards_are_named_and_only_they_are_written_again(teacher: Any, options: CacheOptions) -> None:
    tokens = windows(teacher)
    cache = write_cache(teacher, tokens, options)
    cache.verify()
    expected = shards(cache.folder)
    first, second = (cache.folder / name for name in sorted(cache.manifest.shards)[:2])
    data = bytearray(first.read_bytes())
    data[40] ^= 1
    first.write_bytes(data)
    with pytest.raises(DataError, match=rf"{first.name}: window 0 of this part of a logit cache is damaged"):
        LogitCache.open(cache.folder).targets(tokens.ids[:, :-1])
    second.unlink()
    with pytest.raises(DataError, match=f"damaged or gone: {first.name}, {second.name}"):
        LogitCache.open(cache.folder).verify()
    with pytest.raises(DataError, match=rf"5 of the 24 windows .* files {second.name} are gone"):
        LogitCache.open(cache.folder).require(tokens)
    first.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{first.name}: this part of a logit cache is damaged \([\d,]+ bytes found"):
        write_cache(teacher, tokens, options)
    first.unlink()
    write_cache(teacher, tokens, options).verify()
    assert shards(cache.folder) == expected


def test_a_window_the_cache_has_not_is_an_error(teacher: Any, options: CacheOptions) -> None:
    cache = write_cache(teacher, windows(teacher), options)
    with pytest.raises(DataError, match="2 of the 2 windows of the batch"):
        cache.targets(windows(teacher, 2, seed=8).ids[:, :-1])
    smaller = LogitCache(cache.folder, replace(cache.manifest, vocabulary=260))  # a field holds ids up to 511
    with pytest.raises(DataError, match=r"a window of this logit cache is none \(ids beyond the vocabulary\)"):
        smaller.targets(windows(teacher).ids[:, :-1])
    empty = LogitCache(cache.folder, replace(cache.manifest, shards={}))
    assert not empty.holds(window_hashes(windows(teacher).ids)).any()


def test_a_trimmed_vocabulary_has_a_cache_of_its_own(teacher: Any, options: CacheOptions) -> None:
    kept = tuple(range(0, 272, 2))
    mapped = VocabularyMap(272, kept, encoding_sha256(teacher.tokenizer), "pruned")
    ids = torch.randint(0, len(kept), (24, T + 1), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet(ids, "train", "text", "0", 1, "pruned")
    cache = write_cache(teacher, tokens, options, mapped=mapped)
    assert cache.manifest.vocabulary == len(kept)
    with torch.no_grad():
        p = torch.softmax(teacher.model(ids[:, :-1] * 2).logits[..., ::2].flatten(0, 1), -1)
    found = cache.targets(ids[:, :-1])
    assert torch.equal(found.top1, p.argmax(-1))
    assert torch.allclose(found.entropy, torch.special.entr(p).sum(-1), atol=0.02)
    with pytest.raises(RecipeError, match="the data was tokenised with pruned"):
        write_cache(teacher, tokens, options)


@pytest.mark.parametrize("losses", [("forward_kl",), ("top1_blend=0.9",), ("label_cross_entropy", "forward_kl=0.5")])
def test_a_student_learns_from_the_cache_alone(
    teacher: Any, tiny_bundle: Any, options: CacheOptions, losses: Any
) -> None:
    """Nearly as close to the teacher as from the live one, at equal steps."""
    student, tokens = tiny_bundle(seed=2), windows(teacher)
    text = TokenSet(tokens.ids.reshape(1, -1), "evaluation", "t", "0", 9, tokens.tokenizer_sha256)
    meter = Meter(text, teacher)
    chosen: dict[str, Any] = {"losses": losses, "steps": 40, "batch_size": 12, "learning_rate": 5e-3}
    write_cache(teacher, tokens, options)
    cached, record = run(student, DistillOptions(cache=options, **chosen), train=tokens)
    live, _ = run(student, DistillOptions(**chosen), teacher=teacher, train=tokens)
    before, from_cache, from_live = (meter.measure(one).kl_nats_per_token for one in (student, cached, live))
    assert before is not None
    assert from_cache is not None
    assert from_live is not None
    assert from_cache - from_live < 0.1 * abs(before - from_live)
    entry = cached.lineage.entries[-1]
    assert entry.inputs["teacher"] == teacher.content_sha256
    assert entry.options["cache"]["draws"] == 32
    assert options.folder not in json.dumps(cached.lineage.to_json())
    assert record.details["steps"] == 40


def test_a_run_writes_what_is_missing_and_a_stopped_one_goes_on(
    teacher: Any, tiny_bundle: Any, options: CacheOptions, tmp_path: Path
) -> None:
    student, tokens = tiny_bundle(seed=2), windows(teacher)
    chosen = DistillOptions(cache=options, steps=6, batch_size=4, checkpoint_every=2)
    assert teacher_is_needed(options, tokens, "teacher")
    with pytest.raises(DataError, match="no teacher is given"):
        teacher_is_needed(options, tokens, None)
    whole, _ = run(student, chosen, teacher=teacher, train=tokens)
    assert not teacher_is_needed(options, tokens, None)

    def stop(line: Any) -> None:
        if line.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(student, chosen, train=tokens, folder=tmp_path / "run", on_step=stop)
    resumed, _ = run(student, chosen, train=tokens, folder=tmp_path / "run")
    assert resumed.content_sha256 == whole.content_sha256
    with pytest.raises(RecipeError, match="cache"):
        run(student, replace(chosen, cache=None), teacher=teacher, train=tokens, folder=tmp_path / "run")
    with pytest.raises(DataError, match="4 of the 4 windows"):
        run(student, chosen, train=windows(teacher, 4, seed=8))
    with pytest.raises(RecipeError, match="there is no teacher"):
        run(student, replace(chosen, cache=None), train=tokens)


def test_a_teacher_is_known_by_its_files(teacher: Any, options: CacheOptions, tmp_path: Path) -> None:
    tokens, place = windows(teacher), tmp_path / "teacher"
    teacher.save(place)
    write_cache(teacher, tokens, options)
    assert teacher_is_needed(options, tokens, str(place))
    remember_teacher(options, str(place))
    assert not teacher_is_needed(options, tokens, str(place))
    config = place / "config.json"
    config.write_text(config.read_text() + "\n")
    assert teacher_is_needed(options, tokens, str(place))
    assert model_files_sha256(tmp_path) is None


def test_losses_that_a_sample_cannot_give_are_refused() -> None:
    with pytest.raises(RecipeError, match="forward_kl has temperature=2, the cache 1"):
        DistillOptions(losses=({"name": "forward_kl", "temperature": 2.0},), cache=CacheOptions("x"))  # type: ignore[arg-type]
    wrong = CacheOptions("x").wrong_losses([("reverse_kl", 1.0), ("top1_blend", 1.0)])
    assert wrong == ["reverse_kl needs more of the teacher than the samples of a cache (needed: forward_kl, "
                     "top1_blend, label_cross_entropy, or no cache)"]  # fmt: skip
    chosen = DistillOptions(
        losses=({"name": "forward_kl", "temperature": 2.0},), cache=CacheOptions("x", temperature=2.0)
    )  # type: ignore[arg-type]
    assert chosen.cache is not None
    assert DistillOptions(cache="folder").cache == CacheOptions("folder")  # type: ignore[arg-type]


def test_a_recipe_names_a_folder_or_says_how_to_sample() -> None:
    from dwindle.pipeline.option_values import fill

    problems: list[str] = []
    short = fill(DistillOptions, {"cache": "folder"}, "distill", problems)
    full = fill(DistillOptions, {"cache": {"folder": "folder", "draws": 50, "always": [2]}}, "distill", problems)
    assert not problems
    assert short is not None
    assert short.cache == CacheOptions("folder")
    assert full is not None
    assert full.cache == CacheOptions("folder", draws=50, always=(2,))
    assert fill(DistillOptions, {"cache": {"draw": 50}}, "distill", problems) is None
    assert "distill.cache.draw is unknown (did you mean 'draws'?)" in problems[0]


@pytest.mark.parametrize("name", ["stories260K", "pycode-6m"])
def test_a_real_teacher_takes_at_most_60_bytes_per_token(assets: Path, name: str, tmp_path: Path) -> None:
    from dwindle.bundle import ModelBundle
    from dwindle.data import DataOptions, training_set

    bundle = ModelBundle.load(assets / "models" / name)
    text = assets / "data" / "text" / "tinystories_train.txt"
    place = text if name == "stories260K" else Path(argparse.__file__)
    tokens = training_set(DataOptions(train=(str(place),), context=128, train_tokens=4096), bundle.tokenizer, 128)
    cache = write_cache(bundle, tokens, CacheOptions(str(tmp_path / "cache")))
    assert cache.manifest.bytes_per_token < 60
