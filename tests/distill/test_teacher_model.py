"""Any causal language model teaches, in memory or from its folder: the loss is the one of its whole logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dwindle.distill import (
    CacheOptions,
    DistillObjective,
    DistillOptions,
    LiveTeacher,
    LossSpec,
    OnPolicyOptions,
    Teacher,
    TeacherSpec,
    run,
    write_cache,
)
from dwindle.distill.head import tail_of
from dwindle.errors import RecipeError, UnsupportedModel
from dwindle.quantize import QuantizeOptions
from dwindle.quantize import run as quantized
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

VOCAB, WINDOW = 272, 13
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 256,
         "eos_token_id": 257}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "phi": {},
    "stablelm": {"num_key_value_heads": 2},
    "granite": {"logits_scaling": 3.0, "num_key_value_heads": 2},
    "cohere": {"logit_scale": 0.25, "num_key_value_heads": 2},
}
"""Learned positions, a head of its own, a projection before the head, no positions, a head with a bias, scaled logits."""


def other_model(kind: str, seed: int = 1, **values: Any) -> Any:
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**SIZES, **FAMILIES[kind], **values})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def stored(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    def store(kind: str, **values: Any) -> Path:
        folder = tmp_path / kind
        other_model(kind, **values).save_pretrained(folder, max_shard_size="20KB")
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return store


def windows(tokenizer: Any, rows: int = 8) -> TokenSet:
    ids = torch.randint(0, 256, (rows, WINDOW), generator=torch.Generator().manual_seed(3))
    return TokenSet(ids, "train", "bytes", "0" * 64, 1000, encoding_sha256(tokenizer))


def naive_kl(teacher: Any, student: Any, batch: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (model(batch[:, :-1]).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_fused_loss_is_that_of_whole_logits(
    kind: str, offload: bool, stored: Callable[..., Path], tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("dwindle.distill.fused_loss", fromlist=["_"]).CHUNK_BYTES, "cpu", 7 * 4 * VOCAB)
    teacher = Teacher.load(stored(kind), offload=offload)
    student, batch = tiny_bundle(seed=5), windows(teacher.tokenizer).ids
    loss, parts = DistillObjective((LossSpec("forward_kl"),), LiveTeacher(teacher)).loss(student.model, batch)
    expected = naive_kl(other_model(kind), student.model, batch)
    assert expected > 0.1
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    assert parts == {"forward_kl": pytest.approx(expected, rel=2e-5)}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_an_offloaded_teacher_is_the_resident_one_bit_for_bit(
    kind: str, stored_as: torch.dtype, tiny_bundle: Any, tmp_path: Path
) -> None:
    tiny_bundle(kind, storage_dtype=stored_as, tie_word_embeddings=kind in ("llama", "gemma2")).save(tmp_path / "it")
    resident, offloaded = (Teacher.load(tmp_path / "it", offload=offload) for offload in (False, True))
    ids = windows(resident.tokenizer).ids[:, :-1]
    whole, streamed = (LiveTeacher(one, layers=[1, 2]).targets(ids) for one in (resident, offloaded))
    assert torch.equal(whole.states[0].hidden, streamed.states[0].hidden)
    assert torch.equal(whole.states[0].logits(), streamed.states[0].logits())
    assert all(torch.equal(whole.layers[layer], streamed.layers[layer]) for layer in (1, 2))
    assert (offloaded.name, offloaded.content_sha256) == (resident.name, resident.content_sha256)
    held = {
        name.split(".")[2] for name, p in offloaded.model.named_parameters() if ".layers." in name and not p.is_meta
    }
    assert not held  # no layer's weights stay


def test_an_offloaded_teacher_trains_a_student_as_the_resident_one(
    stored: Callable[..., Path], tiny_bundle: Any
) -> None:
    folder, student = stored("gpt_neox"), tiny_bundle(seed=5)
    losses = []
    for offload in (False, True):
        teacher = Teacher.load(folder, offload=offload)
        options = DistillOptions(losses=("jsd", "hidden_states=0.1"), steps=3, batch_size=4)
        distilled, record = run(student, options, teacher=teacher, train=windows(student.tokenizer))
        losses.append([record.details["history"], distilled.content_sha256])
    assert losses[0] == losses[1]


def test_one_cache_of_a_teacher_resident_or_offloaded(
    stored: Callable[..., Path], tiny_bundle: Any, tmp_path: Path
) -> None:
    """The offloaded teacher goes on with the cache of the resident one, and the student needs neither."""
    folder, student = stored("gpt2"), tiny_bundle(seed=5)
    tokens = windows(student.tokenizer)
    part = TokenSet(tokens.ids[:4], "train", "half", "1" * 64, 500, tokens.tokenizer_sha256)
    options = CacheOptions(str(tmp_path / "cache"))
    write_cache(Teacher.load(folder), part, options)
    cache = write_cache(Teacher.load(folder, offload=True), tokens, options)
    assert cache.manifest.teacher == Teacher.load(folder).content_sha256
    alone = write_cache(Teacher.load(folder), tokens, CacheOptions(str(tmp_path / "other")))
    found, expected = (vars(one.targets(tokens.ids[:, :-1])) for one in (cache, alone))
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 3
    assert all(torch.equal(found[name], expected[name]) for name in tensors)
    _, record = run(student, DistillOptions(steps=2, batch_size=4, cache=options), train=tokens)
    assert record.details["steps"] == 2
    with pytest.raises(RecipeError, match="teacher"):
        write_cache(Teacher.load(stored("phi")), tokens, options)


def test_a_further_teacher_may_be_offloaded_and_of_another_family(
    stored: Callable[..., Path], tiny_bundle: Any
) -> None:
    student, folder = tiny_bundle(seed=5), stored("gpt2")
    spec = TeacherSpec(str(folder), 0.25, offload=True)
    options = DistillOptions(steps=1, batch_size=8, other_teachers=(spec,))
    first = tiny_bundle(seed=6)
    tokens = windows(student.tokenizer)
    _, record = run(student, options, teacher=first, train=tokens)
    with torch.no_grad():
        p = 0.75 * first.model(tokens.ids[:, :-1]).logits.double().softmax(-1)
        p += 0.25 * other_model("gpt2")(tokens.ids[:, :-1]).logits.double().softmax(-1)
        q = student.model(tokens.ids[:, :-1]).logits.double().log_softmax(-1)
    assert record.details["first_loss"] == pytest.approx(float((p * (p.log() - q)).sum(-1).mean()), rel=2e-5)


def test_rows_that_pad_a_teacher_are_left_out(stored: Callable[..., Path], tiny_bundle: Any) -> None:
    """One tokenizer, embeddings padded to 300 and 272 rows: p is the teacher's given one of the student's rows."""
    student, teacher = tiny_bundle(seed=5), Teacher.load(stored("gpt2", vocab_size=300))
    tokens = windows(student.tokenizer)
    _, record = run(student, DistillOptions(steps=1, batch_size=8), teacher=teacher, train=tokens)
    with torch.no_grad():
        p = other_model("gpt2", vocab_size=300)(tokens.ids[:, :-1]).logits.double()[..., :VOCAB].softmax(-1)
        q = student.model(tokens.ids[:, :-1]).logits.double().log_softmax(-1)
    assert record.details["first_loss"] == pytest.approx(float((p * (p.log() - q)).sum(-1).mean()), rel=2e-5)


def test_what_does_not_go_together_is_said(stored: Callable[..., Path], tiny_bundle: Any, tmp_path: Path) -> None:
    student, folder = tiny_bundle(seed=5), stored("gpt2")
    tokens = windows(student.tokenizer)
    with pytest.raises(RecipeError, match="the teacher's vocabulary has 264 entries, the student's 272"):
        run(student, DistillOptions(steps=1), teacher=Teacher.load(stored("phi", vocab_size=264)), train=tokens)
    parted = replace(Teacher.load(folder), sharded=True)
    with pytest.raises(RecipeError, match="sharded, and processes write at their own pace"):
        write_cache(parted, tokens, CacheOptions(str(tmp_path / "cache")))
    writes = DistillOptions(steps=1, on_policy=OnPolicyOptions(share=0.5, writer="teacher"))
    with pytest.raises(RecipeError, match="read all of its weights for every token"):
        run(student, writes, teacher=Teacher.load(folder, offload=True), train=tokens)
    short = Teacher.load(stored("gpt_neox", max_position_embeddings=8))
    with pytest.raises(RecipeError, match="the teacher's context is 8"):
        run(student, DistillOptions(steps=1), teacher=short, train=tokens)


def change(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("offload", [False, True])
def test_damaged_checkpoints_are_refused(stored: Callable[..., Path], offload: bool) -> None:
    with pytest.raises(UnsupportedModel, match=r"missing|not in the files"):
        Teacher.load(change(stored("gpt2"), n_layer=3), offload=offload)
    with pytest.raises(UnsupportedModel, match="no place"):
        Teacher.load(change(stored("phi"), num_hidden_layers=1), offload=offload)
    with pytest.raises(UnsupportedModel, match=r"shape|not in the files|cannot be loaded"):
        Teacher.load(change(stored("gpt_neox"), intermediate_size=40), offload=offload)
    with pytest.raises(UnsupportedModel, match="'gpt2x' is no causal language model"):
        Teacher.load(change(stored("opt"), model_type="gpt2x"), offload=offload)
    with pytest.raises(UnsupportedModel, match="quantized"):
        Teacher.load(change(stored("granite"), quantization_config={"quant_method": "gptq"}), offload=offload)
    folder = stored("stablelm")
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"NaN|no finite numbers"):
        Teacher.load(folder, offload=offload)
    with pytest.raises(UnsupportedModel, match=r"cannot be (loaded|built)"):
        Teacher.load(change(stored("falcon"), num_attention_heads=5), offload=offload)


def test_codes_are_not_read_layer_by_layer(tiny_bundle: Any, tmp_path: Path) -> None:
    quantized(tiny_bundle("llama"), QuantizeOptions(scheme="palettize", bits=4))[0].save(tmp_path / "packed")
    assert Teacher.load(tmp_path / "packed").anatomy is not None
    with pytest.raises(UnsupportedModel, match="codes are not read layer by layer"):
        Teacher.load(tmp_path / "packed", offload=True)


def test_a_model_that_reads_ahead_is_no_teacher() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bert"](**SIZES), dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModel, match="reads the tokens that it should predict"):
        tail_of(model, torch.device("cpu"))
