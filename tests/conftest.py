"""Fixtures for all rooms: tiny random models of every family, a byte-level tokenizer, and the real test assets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_LONG_FIRST = ("pipeline/test_demo_adapters.py", "export/", "pipeline/", "reliability/", "distill/", "test_readme.py")
"""Tests that begin first, so that no process waits for a long one at the end; the demo is done when README needs it."""

TINY_VOCAB = 272
_SHAPE = {
    "vocab_size": TINY_VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": None, "initializer_range": 0.15, "tie_word_embeddings": True,
}  # fmt: skip
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8, "tie_word_embeddings": False, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 64},
    "smollm3": {"no_rope_layers": [1, 0], "num_hidden_layers": 2},
    "olmo2": {"tie_word_embeddings": False},
}  # fmt: skip

_MIXTURE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 16},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
                  "head_dim": 16},
}  # fmt: skip
"""Router and experts: mixtral in all layers, normalized; qwen2_moe with a shared expert, and a dense layer 0."""

TINY_FAMILIES = tuple(_FAMILY)
TINY_MIXTURES = tuple(_MIXTURE)


def _make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _make_model(model_type: str, seed: int, overrides: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from dwindle.anatomy import anatomy_of

    config = CONFIG_MAPPING[model_type](**{**_SHAPE, **(_FAMILY | _MIXTURE)[model_type], **overrides})
    attention = "eager" if anatomy_of(config).traits.attention_softcap else "sdpa"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster on one thread, and several test runs may share a machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: ids 0-255 are bytes, 256 <s> (added in front), 257 </s>, 258 <pad>."""
    return _make_tokenizer()


@pytest.fixture(scope="session")
def tiny_bundle() -> Callable[..., Any]:
    """Factory of tiny random bundles (about 30k parameters): tiny_bundle("qwen3", num_hidden_layers=3, seed=1).

    Keywords are config values over the family's tiny defaults; `storage_dtype` names a torch dtype. Context 64.
    """

    def make(model_type: str = "llama", *, seed: int = 0, storage_dtype: Any = None, **overrides: Any) -> Any:
        import torch

        from dwindle.bundle import ModelBundle

        return ModelBundle.from_model(
            _make_model(model_type, seed, overrides), _make_tokenizer(), name=f"tiny-{model_type}",
            storage_dtype=storage_dtype or torch.float32,
        )  # fmt: skip

    return make


_WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "to", "town", "then", "a", "in", "of", "is", "was",
          "his", "her", "house", "tree", "bird", "sing", "song", "long", "way"]  # fmt: skip


@pytest.fixture(scope="session")
def worded_tokenizer() -> Callable[..., Any]:
    """Factory of a tokenizer with merges: 346 trained pieces and `<tool>`, 260 of them bytes and special tokens."""

    def make(chat_template: Any = None) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=346, show_progress=False, special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        backend.train_from_iterator([" ".join(_WORDS[i:] + _WORDS[:i]) * 3 for i in range(20)], trainer)
        backend.add_tokens(["<tool>"])
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
        )

    return make


@pytest.fixture(scope="session")
def worded(tiny_bundle: Callable[..., Any], worded_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """Factory of tiny bundles with that tokenizer: 352 rows, five of them without a token. Context 64."""

    def make(family: str = "llama", chat_template: str | None = None, **overrides: Any) -> Any:
        from dwindle.bundle import ModelBundle

        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        bundle = tiny_bundle(family, vocab_size=352, **{**ids, **overrides})
        return ModelBundle.from_model(bundle.model, worded_tokenizer(chat_template), name=f"worded-{family}")

    return make


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """Writer of random adapters of a bundle, as folders; large enough to change every logit."""
    pytest.importorskip("peft")

    def write(
        bundle: Any, folder: Path, *, rank: int = 4, kind: Any = "lora", targets: tuple[str, ...] = ("all",),
        seed: int = 1, size: float = 0.1, task: str = "copying", base_sha256: str | None = None,
    ) -> Path:  # fmt: skip
        import torch

        from dwindle.adapters import Adapter, AdapterCard, AdapterOptions
        from dwindle.adapters.attach import adapter_config, adapter_tensors, attach, target_names

        options = AdapterOptions(rank=rank, kind=kind, targets=targets)
        config = adapter_config(bundle, options, target_names(bundle, targets, rank))
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: tensor + size * torch.randn(tensor.shape, generator=generator)
                   for name, tensor in adapter_tensors(attach(bundle, config).model).items()}  # fmt: skip
        card = AdapterCard("tiny", base_sha256 or bundle.content_sha256, task, metrics={"accuracy": 0.5}, licence="MIT")
        Adapter(config, tensors, card).save(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and texts: $DWINDLE_ASSETS, or shared/assets beside the repository; else skip."""
    given = os.environ.get("DWINDLE_ASSETS")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "assets"
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models at {folder}; set DWINDLE_ASSETS to a folder with models/ and data/")
    return folder


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole `dwindle demo`, run once (a few minutes), also where several processes test."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo" / "demo-run"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "printed.txt").exists():
            _run_demo(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; the order is else as it was."""
    root = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else ""
        return next((i for i, begin in enumerate(_LONG_FIRST) if name.startswith(begin)), len(_LONG_FIRST))

    items.sort(key=place)


def _run_demo(folder: Path) -> None:
    import subprocess
    import sys

    beside = "PYTEST_XDIST_WORKER" in os.environ  # threads that wait for a core which other tests use only cost time
    environment = {k: v for k, v in os.environ.items() if beside or k != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-P", "-m", "dwindle.pipeline.cli", "demo", "-o", str(folder)],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (folder / "printed.txt").write_text(done.stdout)
