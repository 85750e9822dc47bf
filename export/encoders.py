"""Models that are no decoders, as ONNX: sentence encoders and classifiers, by optimum's exporter, then held to parity.

A decoder is authored here (`onnx_graph`), because its KV cache and its codes ask for it. An encoder is one pass over a
text, families are many, and optimum's exporter traces them well; what it lacks is proof and small weights:

    export_encoder("path/of/MiniLM", Path("OUT"), EncoderOptions(bits=8))   ->   OUT/onnx/

    1. look     task, pooling and longest text from the folder (`encoder_source`); every refusal, before any work
    2. trace    optimum.exporters.onnx, float32
    3. round    8 or 4 bits on request (`encoder_weights`)
    4. execute  plain ONNX Runtime against transformers on the same texts (`encoder_parity`)

The folder is that of a decoder's export: model, tokenizer, config.json, sentence-transformers' files where the source
has them, and manifest.json; `ORTModelForFeatureExtraction.from_pretrained(folder)` and its kind load it. A missed limit
is told by the artifact's `parity.passed`, as with decoders.

optimum-onnx runs with transformers 4.57 only; without it the extra `optimum` is named.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from dwindle.errors import ExportFailed, MissingExtra, RecipeError
from dwindle.export.artefact import manifest_of, require_artifact_place, versions_of, write_manifest
from dwindle.export.encoder_source import SENTENCE_FILES, EncoderSource, is_decoder
from dwindle.export.licence import files_of, lines_of
from dwindle.export.options import Activations, ExportOptions
from dwindle.export.package_readme import write_readme
from dwindle.lineage import Lineage
from dwindle.model_source import quiet_transformers
from dwindle.report import Artifact
from dwindle.storage import atomic_folder, folder_bytes, hash_file, hash_folder, hash_json, require_space, write_json
from dwindle.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dwindle.export.encoder_parity import Encoding

__all__ = ["EncoderOptions", "export_encoder", "is_decoder"]

_log = logging.getLogger("dwindle")

FORMAT = "onnx"
_LIBRARIES = ("onnx", "onnxruntime", "optimum", "optimum-onnx", "torch", "transformers")
_TEXTS = (
    "A man is playing a guitar on the street.",
    "Someone makes music outside, near the station.",
    "The bank raised its interest rates for the third time this year.",
    "Borrowing money has become more expensive again.",
    "How do I reset the password of my account?",
    "I cannot log in any more; please help me.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Plants make their own food from sunlight.",
    "The train to the coast was forty minutes late because of snow.",
    "Heavy weather delayed all the morning connections.",
    "Yes.",
    "In 1969 two people walked on the Moon while a third one stayed in orbit; all of them came back to Earth four days "
    "later, and the stones they brought along are studied to this day.",
)


@dataclass(frozen=True)
class EncoderOptions:
    """How an encoder is written and on what it is checked."""

    bits: int | None = None
    """Bits of the weights: 8, 4, or None for float32."""
    activations: Activations = "int8"
    """What 8- and 4-bit products compute in. On MiniLM int8 costs 0.001 of cosine in 8 bits, none in 4, and takes a
    third of the time of float32 in 8 bits."""
    texts: tuple[str, ...] = _TEXTS
    """Texts of the parity check; one more, all of them joined, fills the model's context."""
    opset: int = 18
    """Version of ONNX's operators; the exporter knows none beyond 20 or so."""
    external_data_above_bytes: int = ExportOptions.external_data_above_bytes
    """From this many bytes of quantized weights on, they go into a `model.onnx.data` beside the graph."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        problems = []
        if self.bits not in (None, 4, 8):
            problems.append(f"bits={self.bits!r}; known: 8, 4, or null for float32")
        if self.activations not in get_args(Activations):
            problems.append(f"activations={self.activations!r}; known: {', '.join(get_args(Activations))}")
        if len(self.texts) < 3 or not all(isinstance(text, str) and text.strip() for text in self.texts):
            problems.append(f"texts needs at least three that are not empty, found {len(self.texts)}")
        if not isinstance(self.opset, int) or not 14 <= self.opset <= 20:
            problems.append(f"opset={self.opset!r} must be a whole number from 14 to 20")
        if not isinstance(self.external_data_above_bytes, int) or self.external_data_above_bytes < 0:
            problems.append(f"external_data_above_bytes={self.external_data_above_bytes!r} must be a whole number")
        if problems:
            raise RecipeError(f"export: {'; '.join(problems)}.")


def export_encoder(model: str | Path, output: Path, options: EncoderOptions | None = None) -> Artifact:
    """Write output/onnx/ from a folder or Hugging Face id that holds an encoder; return its artifact.

    Raises MissingExtra without optimum, UnsupportedModel for a decoder, an unknown task or damaged files, OutputError
    for a place that holds something else; all before anything is written. Raises ExportFailed if optimum gives up.
    """
    options = options or EncoderOptions()
    _require_libraries()
    place, source = Path(output) / FORMAT, EncoderSource.find(model)
    require_artifact_place(place, FORMAT)
    loaded, weight_files = source.load()
    tokenizer = load_tokenizer(source.folder, trust_remote_code=False, vocab=int(loaded.config.vocab_size))
    context = _context(source, loaded, tokenizer)
    require_space(Path(output), 3 * sum((source.folder / name).stat().st_size for name in weight_files))
    return _Export(source, loaded, tokenizer, context, options).write(place, weight_files)


@dataclass(frozen=True)
class _Export:
    """Everything one export needs."""

    source: EncoderSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    options: EncoderOptions

    def write(self, place: Path, weight_files: tuple[str, ...]) -> Artifact:
        """Write, execute and account for the folder."""
        from dwindle.export.encoder_parity import LIMITS, EncoderSession, encoder_parity

        started = time.perf_counter()
        with atomic_folder(place) as partial:
            texts = self._companions(partial)
            layers = self._graph(partial)
            exported = time.perf_counter()
            parity = encoder_parity(
                self.model, EncoderSession(partial), texts, self.source.task, pooling=self.source.pooling,
                pad=self.tokenizer.pad_token_id or 0, limits=LIMITS[self.options.bits],
            )  # fmt: skip
            checked = time.perf_counter()
            facts, runtime, versions = self._facts(layers), self._runtime(), versions_of(_LIBRARIES)
            origin = _Origin.of(self.source, weight_files)
            manifest = manifest_of(FORMAT, cast(Any, origin), facts=facts, runtime=runtime, versions=versions,
                                   parity=parity.common)  # fmt: skip
            manifest["parity"] = parity.to_json()
            licence = lines_of(self.source.folder, origin.lineage, self.model.config.to_dict())
            write_readme(partial, manifest, licence_lines=licence)
            write_manifest(partial, manifest)
        if not parity.common.passed:
            _log.warning("export: %s misses its parity limits: %s", place, parity)
        return Artifact(
            format=FORMAT, path=str(place), bytes=folder_bytes(place), sha256=hash_folder(place),
            parity=parity.common, versions=versions,
            details={**facts, "runtime": runtime, "cosine_min": parity.cosine_min, "cosine_mean": parity.cosine_mean,
                     "export_seconds": exported - started, "parity_seconds": checked - exported},
        )  # fmt: skip

    def _companions(self, folder: Path) -> list[Encoding]:
        """Write tokenizer, config and sentence-transformers' files; return the encoded texts, the longest last."""
        with quiet_transformers():
            self.tokenizer.save_pretrained(folder)
        config = self.model.config.to_diff_dict()
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        write_json(folder / "config.json", {**config, "architectures": [type(self.model).__name__]})
        pooling = [path.relative_to(self.source.folder) for path in self.source.folder.glob("*_Pooling/config.json")]
        licences = [path.name for path in files_of(self.source.folder)]
        for name in (*SENTENCE_FILES, *licences, *map(str, pooling)):
            if (self.source.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.source.folder / name, folder / name)
        texts = self.options.texts
        joined = " ".join(texts)
        repeats = 1 + self.context // max(1, len(self._encoded(joined)["input_ids"]) - 2)
        return [self._encoded(text) for text in (*texts, " ".join([joined] * repeats))]

    def _encoded(self, text: str) -> Encoding:
        encoding = self.tokenizer(text, truncation=True, max_length=self.context, padding=False)
        taken = inspect.signature(self.model.forward).parameters  # some tokenizers make more than their model takes
        return {name: list(values) for name, values in encoding.items() if name in taken}

    def _graph(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write model.onnx; return the manifest's rows of its weights."""
        import onnx

        from dwindle.export.encoder_weights import layer_rows, quantize_graph

        _trace(self.source, self.model, folder, self.options.opset)
        path = folder / "model.onnx"
        if self.options.bits is None:
            return layer_rows(onnx.load(path, load_external_data=False), {})
        graph = onnx.load(path)
        codes = quantize_graph(graph, 8 if self.options.bits == 8 else 4, self.options.activations)
        for stale in folder.glob("model.onnx*"):
            stale.unlink()
        rows = layer_rows(graph, codes)
        large = sum(row["bytes"] for row in rows.values()) > self.options.external_data_above_bytes
        onnx.save_model(graph, path, save_as_external_data=large, location="model.onnx.data" if large else None)
        return rows

    def _facts(self, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "family": self.source.model_type,
            "task": self.source.task.name,
            "parameters": sum(row["parameters"] for row in layers.values()),
            "bytes": sum(row["bytes"] for row in layers.values()),
            "context_length": self.context,
            "vocabulary": int(self.model.config.vocab_size),
            "pooling": list(self.source.pooling) if self.source.pooling_named else None,
            "normalized": self.source.normalized,
            "labels": _labels(self.source, self.model),
            "layers": layers,
        }

    def _runtime(self) -> dict[str, Any]:
        opsets = {"ai.onnx": self.options.opset, **({} if self.options.bits is None else {"com.microsoft": 1})}
        activations = "float32" if self.options.bits is None else self.options.activations
        return {"opsets": opsets, "minimum_runtime": "onnxruntime 1.23", "activations": activations,
                "compute": "float32", "minimum_os": None}  # fmt: skip


@dataclass(frozen=True)
class _Origin:
    """What the manifest says of the source, as a bundle would."""

    content_sha256: str
    lineage: Lineage

    @classmethod
    def of(cls, source: EncoderSource, weight_files: tuple[str, ...]) -> _Origin:
        """Return the hashes of all files the model was made of."""
        names = {*(path.name for path in source.folder.glob("*.json")), *weight_files, "vocab.txt"}
        hashes = {name: hash_file(source.folder / name)
                  for name in sorted(names) if (source.folder / name).is_file()}  # fmt: skip
        revision = {} if source.revision is None else {"revision": source.revision}
        return cls(hash_json(hashes), Lineage.origin(source.folder.resolve().name, hashes, **revision))


def _require_libraries() -> None:
    wanted = ("onnx", "onnxruntime", "optimum.exporters.onnx")
    try:
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError:  # of a parent package
        missing = list(wanted)
    if missing:
        raise MissingExtra("Exporting an encoder to ONNX", "optimum")


def _context(source: EncoderSource, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest text in tokens: the least of what tokenizer, positions and folder allow."""
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    table = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa counts positions from the padding's on
        positions -= int(cast(Any, table).padding_idx) + 1
    limits = [limit for limit in (positions, source.longest, tokenizer.model_max_length) if limit]
    return min(limits)


def _labels(source: EncoderSource, model: PreTrainedModel) -> list[str] | None:
    if "classification" not in source.task.name:
        return None
    return [str(label) for _, label in sorted(model.config.id2label.items())]


def _trace(source: EncoderSource, model: PreTrainedModel, folder: Path, opset: int) -> None:
    """Write model.onnx by optimum's exporter; raises ExportFailed with what it failed on."""
    with quiet_transformers():
        from optimum.exporters.onnx import onnx_export_from_model
        from optimum.utils import logging as notices

        verbosity = notices.get_verbosity()
        notices.set_verbosity(notices.CRITICAL)
        scratch = folder / ".trace"
        try:
            onnx_export_from_model(model, scratch, task=source.task.name, opset=opset, monolith=True,
                                   do_validation=False)  # fmt: skip
        except Exception as error:  # optimum and torch raise what they like
            raise ExportFailed(_failure(source, error)) from error
        finally:
            notices.set_verbosity(verbosity)
        for path in scratch.glob("model.onnx*"):
            path.rename(folder / path.name)
        shutil.rmtree(scratch)


def _failure(source: EncoderSource, error: Exception) -> str:
    """Return optimum's complaint with the model, and the place in its code if it got as far."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    passed = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in passed if "models" in Path(frame.filename).parts]
    where = f", in {frames[-1].name} of {Path(frames[-1].filename).name}" if frames else ""
    return (f"{source.folder}: optimum's exporter failed on {source.model_type} ({source.architecture}, task "
            f"{source.task.name}{where}): {type(error).__name__}: {lines[0]}")  # fmt: skip
