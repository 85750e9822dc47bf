"""A decoder as a Core ML package for iOS 18: states for the KV cache, prefill and decode, carrying our codes.

`shapes: dynamic` is one function for any number of tokens, the interface of Apple's Llama and Mistral samples: the
length of the past is read off the mask's shape.

    input_ids    int32 [1, T]          the new tokens, T from 1 to the context
    causal_mask  fp16  [1, 1, T, S]    0 where a new token may look, -1e4 where not; S = past + T
    logits       fp16  [1, T, V]
    key_cache, value_cache             states, fp16 [L, 1, K, context, D], zero in a new state

`shapes: static` is two functions over one set of weights and the same states, without a single flexible shape, as the
Neural Engine wants them: `prefill` with T = prefill_tokens and `decode` with T = 1. S is the whole context, and the
length of the past is an input of its own:

    position     int32 [1]             tokens fed before; the mask also hides the slots after these

Where the weights pass `largest_file_bytes` the layers are cut into several packages (`coreml_chunks.py`), run one after
another: all but the first take `hidden` fp16 [1, T, width] instead of tokens, all but the last return `hidden_out`
instead of logits, and each has the states of its own layers.

An adapter is a function more, or with static shapes two (`coreml_adapters.py`).

The modules that are traced stand in `coreml_decoder.py`, the conversion in `coreml_convert.py`, packed weights in
`coreml_weights.py`; `mil_evaluator.py` executes what was saved. Computation is float16; cos and sin come from tables,
because a position times a frequency would lose the far positions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dwindle
from dwindle.anatomy import Anatomy
from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.export.coreml_adapters import ADAPTERS_KEY, adapt, function_name
from dwindle.export.coreml_chunks import planned_parts
from dwindle.export.coreml_convert import DECODE, FLEXIBLE, HIDDEN, HIDDEN_OUT, PREFILL, save_program
from dwindle.export.coreml_decoder import DecoderPart, Part, hollow_decoder
from dwindle.export.coreml_engine import engine_notes
from dwindle.export.coreml_files import PACKAGE, WEIGHTS_FILE, chunk_name, settle
from dwindle.export.coreml_merge import merge_functions
from dwindle.export.coreml_weights import CarriedWeight, coreml_problems
from dwindle.export.decoder import Decoder
from dwindle.export.options import ExportOptions
from dwindle.low_rank import Factors
from dwindle.quantized_model import packed_specs
from dwindle.storage import folder_bytes

__all__ = ["MINIMUM_OS", "CoreMLInfo", "export_coreml"]

MINIMUM_OS = "iOS 18 / macOS 15"
"""First systems with states, int4 blocks, grouped palettes and several functions in a package."""

_NONE: Mapping[str, Mapping[str, Factors]] = {}

_FEATURES = {
    "input_ids": "New tokens, int32 [1, T].",
    HIDDEN: "The hidden state that the package before this one returned, [1, T, width].",
    "causal_mask": "Added to the attention scores, [1, 1, T, S]: 0 visible, -1e4 hidden. S is past + T in a program of "
                   "flexible length, the whole context in one of static shapes.",
    "position": "How many tokens were fed before, int32 [1].",
    "logits": "One row of logits a new token, [1, T, V].",
    HIDDEN_OUT: "The hidden state, for the package after this one, [1, T, width].",
}  # fmt: skip


@dataclass(frozen=True)
class CoreMLInfo:
    """What was written."""

    packages: tuple[Path, ...]
    """One, or the parts of a model that was cut, in the order they are run."""
    parts: tuple[Part, ...]
    bytes: int
    """All files of the packages."""
    weights_bytes: tuple[int, ...]
    """Each weight.bin: codes, tables, norms, cos and sin."""
    counted_bytes: int
    """What the bundle counts for the same weights (`ModelBundle.size`)."""
    context_length: int
    functions: tuple[str, ...]
    """Of the base."""
    adapters: Mapping[str, tuple[str, ...]]
    """Functions of each adapter."""
    prefill_tokens: int | None
    """None: the program takes any number."""
    convert_seconds: float
    minimum_os: str = MINIMUM_OS
    notes: tuple[str, ...] = ()
    """What may keep the program from the Neural Engine; never a reason to fail."""

    @property
    def package(self) -> Path:
        """Return the package, or the first of them."""
        return self.packages[0]

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weight files."""
        return sum(self.weights_bytes)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of the files and how to run them."""
        rows = [{"package": path.name, "weight_bytes": size, "layers": [part.first, part.end],
                 "embedding": part.embedding, "head": part.head}
                for path, part, size in zip(self.packages, self.parts, self.weights_bytes, strict=True)]  # fmt: skip
        return {"packages": rows, "weight_bytes": self.weight_bytes, "functions": list(self.functions),
                "prefill_tokens": self.prefill_tokens, "compute": "float16", "notes": list(self.notes)}  # fmt: skip


def export_coreml(
    bundle: ModelBundle, folder: Path, options: ExportOptions, adapters: Mapping[str, Mapping[str, Factors]] = _NONE
) -> CoreMLInfo:
    """Write `model.mlpackage`, or the packages of a model that must be cut, into an existing folder.

    `adapters` are their changes by name; each is a function, or two, of every package (`coreml_adapters.py`).

    Raises RecipeError for what Core ML cannot store and MissingExtra without coremltools, both before any work, and
    ExportFailed if the converter gives up.
    """
    options = options.resolved(bundle.anatomy)
    problems = coreml_problems(bundle, options)
    if problems:
        raise RecipeError(" ".join(problems))
    context, started = options.context_length or 0, time.perf_counter()
    parts = planned_parts(bundle, context, options.largest_file_bytes)
    packages = tuple(folder / (PACKAGE if len(parts) == 1 else chunk_name(i + 1, len(parts)))
                     for i in range(len(parts)))  # fmt: skip
    for old in folder.glob("*.mlpackage"):
        shutil.rmtree(old)
    decoders: dict[str | None, tuple[Decoder, dict[str, CarriedWeight]]] = {None: hollow_decoder(bundle, context)}
    for name, changes in adapters.items():
        decoder, matrices = hollow_decoder(bundle, context)
        decoders[name] = decoder, adapt(decoder, matrices, changes)
    static = options.shapes == "static"
    functions = (PREFILL, DECODE) if static else (FLEXIBLE,) if adapters else ()
    named = {name: {function: function_name(name, function) for function in functions} for name in adapters}
    for index, (part, package) in enumerate(zip(parts, packages, strict=True)):
        models: dict[str | None, tuple[DecoderPart, Mapping[str, CarriedWeight]]]
        models = {name: (DecoderPart(decoder, part, static=static).eval(), _constants(matrices, part, bundle.anatomy))
                  for name, (decoder, matrices) in decoders.items()}  # fmt: skip
        _save(models, package, options)
        about = _about(bundle, options, f"{index + 1} of {len(parts)}")
        about["userDefined"][ADAPTERS_KEY] = json.dumps(named)
        settle(package, _FEATURES, about)
    return CoreMLInfo(
        packages=packages, parts=parts, bytes=sum(map(folder_bytes, packages)),
        weights_bytes=tuple((package / WEIGHTS_FILE).stat().st_size for package in packages),
        counted_bytes=bundle.size().bytes, context_length=context,
        functions=functions, adapters={name: tuple(found.values()) for name, found in named.items()},
        prefill_tokens=options.prefill_tokens if static else None,
        convert_seconds=time.perf_counter() - started, notes=engine_notes(bundle, options),
    )  # fmt: skip


def _save(
    models: Mapping[str | None, tuple[DecoderPart, Mapping[str, CarriedWeight]]], package: Path, options: ExportOptions
) -> None:
    """Write one package, its functions merged into it if there are several; `models` are the base's and adapters'."""
    lengths: dict[str, int | None] = {FLEXIBLE: None}
    if models[None][0].static:
        lengths = {PREFILL: options.prefill_tokens, DECODE: 1}
    if len(lengths) * len(models) == 1:
        save_program(*models[None], None, package)
        return
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".functions-") as scratch:
        single = {}
        for name, (model, weights) in models.items():
            for function, tokens in lengths.items():
                made = function if name is None else function_name(name, function)
                single[made] = Path(scratch) / f"{made}.mlpackage"
                save_program(model, weights, tokens, single[made])
        merge_functions(single, package, default=list(lengths)[-1])


def _constants(matrices: Mapping[str, CarriedWeight], part: Part, anatomy: Anatomy) -> dict[str, CarriedWeight]:
    """Return a part's matrices under the names their constants have in the program.

    A tied head is the embedding's constant, wherever it stands.
    """
    names = [f"model.layers.{row}." for row in range(part.first, part.end)]
    if part.embedding or (part.head and anatomy.tied):
        names.append(f"{anatomy.embedding}.")
    if part.head:
        names.append(f"{anatomy.head}.")
    return {f"decoder.{name}.weight": weight for name, weight in matrices.items()
            if f"{name}.".startswith(tuple(names))}  # fmt: skip


def _about(bundle: ModelBundle, options: ExportOptions, place: str) -> dict[str, Any]:
    """Return the package's metadata: what Xcode shows, and what a reader needs to feed it."""
    origin = bundle.lineage.entries[0].options if bundle.lineage.entries else {}
    kinds = sorted({"{kind} {bits}-bit group {group_size}".format(**spec)
                    for spec in packed_specs(bundle.model).values()})  # fmt: skip
    static = options.shapes == "static"
    lengths = (f"Functions prefill ({options.prefill_tokens} tokens) and decode (1 token) share weights and states."
               if static else "One function for any number of new tokens T.")  # fmt: skip
    slots = "the context" if static else "past + T"
    return {
        "author": "dwindle",
        "license": "as the source model",
        "versionString": dwindle.__version__,
        "shortDescription": (
            f"{bundle.anatomy.model_type} decoder with KV cache states, context {options.context_length:,}, part "
            f"{place}. {lengths} Feed new tokens as input_ids [1, T] and causal_mask [1, 1, T, {slots}] (0: visible, "
            f"-1e4: hidden){', position [1] (tokens before)' if static else ''}; the states keep the past."
        ),
        "userDefined": {
            "dwindle.version": dwindle.__version__,
            "dwindle.context_length": str(options.context_length),
            "dwindle.vocabulary": str(bundle.anatomy.vocab),
            "dwindle.parameters": str(bundle.size().parameters),
            "dwindle.shapes": options.shapes,
            "dwindle.prefill_tokens": str(options.prefill_tokens) if static else "",
            "dwindle.part": place,
            "dwindle.source": str(origin.get("model", "")),
            "dwindle.source_sha256": bundle.content_sha256,
            "dwindle.quantization": ", ".join(kinds) or "float16",
            "dwindle.minimum_os": MINIMUM_OS,
        },
    }
