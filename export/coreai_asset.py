"""A decoder as a Core AI asset (iOS 27, macOS 27): two functions, `prefill` and `decode`, over one set of weights.

Two layouts, as Apple's documents have them:

    dynamic   CPU and GPU, mostly a Mac. Computes in float32.
              input_ids     int32 [1, T]   the new tokens; T from 2 to the context in `prefill`, 1 in `decode`
              position_ids  int32 [1, S]   0 .. S - 1 with S = past + T: its length says how long the past is
    static    the Neural Engine, mostly an iPhone. Every shape is fixed; computes in float16, norms in float32.
              input_ids     int32 [1, N]   N = `prefill_tokens` in `prefill`, 1 in `decode`
              position_ids  int32 [1, N]   their positions, consecutive; the first is the slot that is written
    both      adapter inputs               where asked for, see `coreai_adapters.py`
              key_cache, value_cache       states [L, 1, K, context, D] of the computing type, zero for a new text
              logits        [1, T, V]

The decoder of `decoder.py` is exported once for each function with `torch.export` and converted with coreai-torch;
equal constants are kept once, so two functions weigh what one does. In the static layout a prompt's last piece is
padded at its end: padding takes slots behind the text that no token sees and that the next tokens write over, so no
mask has to be fed.

Each state is written once, at the end: slice writes layer by layer convert and then fail at run time where T is
dynamic. Conversion success proves nothing; `coreai_runner.py` executes the asset with Apple's runtime.

Parity. The dynamic layout is exact up to the order of sums. The static one stores its floats, cos and sin in float16,
which costs what it costs in Core ML; it is executed in float32, see `coreai_float32.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dwindle
from dwindle.bundle import ModelBundle
from dwindle.errors import ExportFailed, RecipeError
from dwindle.export.coreai_decoder import PlacedDecoder, StatefulProgram, StaticProgram
from dwindle.export.coreai_weights import (
    EXAMPLE_PAST,
    EXAMPLE_TOKENS,
    WEIGHT_OPERATOR,
    coreai_notes,
    coreai_problems,
    weight_lowering,
)
from dwindle.export.options import ExportOptions
from dwindle.quantized_model import packed_specs
from dwindle.storage import folder_bytes, write_text

__all__ = [
    "ASSET", "MINIMUM_OS", "PROGRAM", "PROGRAM_HASH", "STATES", "CoreAIInfo", "export_coreai", "quiet_coreai", "settle",
]  # fmt: skip

ASSET = "model.aimodel"
"""Name of the asset inside an artifact folder."""
PROGRAM, PROGRAM_HASH = "main.mlirb", "main.hash"
"""Files of an asset that hold its functions and constants, and their SHA-256."""
MINIMUM_OS = "iOS 27 / macOS 27"
"""First systems with Core AI."""
STATES = ("key_cache", "value_cache")


@dataclass(frozen=True)
class CoreAIInfo:
    """What was written."""

    asset: Path
    bytes: int
    """All files of the asset."""
    counted_bytes: int
    """What the bundle counts for the same weights (`ModelBundle.size`)."""
    context_length: int
    convert_seconds: float
    adapters: dict[str, Any]
    """The inputs for adapters (`AdapterInputs.facts`); empty without any."""
    minimum_os: str = MINIMUM_OS
    notes: tuple[str, ...] = ()
    """What may disappoint on a device; never a reason to fail."""


def export_coreai(bundle: ModelBundle, folder: Path, options: ExportOptions) -> CoreAIInfo:
    """Write `model.aimodel` into an existing folder.

    Raises RecipeError for what Core AI cannot store and MissingExtra without its packages, both before any work;
    ExportFailed where the converter gives up.
    """
    problems = coreai_problems(bundle, options)
    if problems:
        raise RecipeError(" ".join(problems))
    options = options.resolved(bundle.anatomy)
    context = options.context_length
    assert context is not None
    started = time.perf_counter()
    dtype = torch.float16 if options.shapes == "static" else torch.float32
    rank = options.adapter_rank if options.shapes == "static" else None
    decoder = PlacedDecoder.from_codes(bundle, context, dtype, options.adapter_inputs, rank)
    program = StaticProgram(decoder) if options.shapes == "static" else StatefulProgram(decoder)
    tokens = {"prefill": options.prefill_tokens if options.shapes == "static" else None, "decode": 1}
    asset = folder / ASSET
    shutil.rmtree(asset, ignore_errors=True)
    with quiet_coreai():
        _convert(program, bundle, tokens, asset, _metadata(bundle, options, decoder))
    settle(asset)
    return CoreAIInfo(
        asset=asset, bytes=folder_bytes(asset), counted_bytes=bundle.size().bytes, context_length=context,
        convert_seconds=time.perf_counter() - started,
        adapters=decoder.adapters.facts() if decoder.adapters.names else {},
        notes=coreai_notes(bundle.anatomy, context, options),
    )  # fmt: skip


def _convert(
    program: StatefulProgram, bundle: ModelBundle, tokens: dict[str, int | None], asset: Path,
    metadata: dict[str, str],
) -> None:  # fmt: skip
    """Trace each function, convert both, save."""
    import coreai_torch
    from coreai.runtime import AIModelAssetMetadata

    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    converter.register_torch_lowering(f"{WEIGHT_OPERATOR}.default")(weight_lowering(bundle.model))
    with _failures_named(program):
        for name, length in tokens.items():
            converter.add_exported_program(
                _exported(program, length), entrypoint_name=name,
                input_names=["input_ids", "position_ids", *program.decoder.adapters.names],
                state_names=list(STATES), output_names=["logits"],
            )  # fmt: skip
        described = AIModelAssetMetadata()
        described.author, described.license = "dwindle", "as the source model"
        described.model_description = metadata.pop("description")
        for key, value in metadata.items():
            described.set_custom(key, value)
        converter.to_coreai().save_asset(asset, described)


def _exported(program: StatefulProgram, tokens: int | None) -> Any:
    """Return torch's exported program for so many tokens, or for any number of two or more."""
    import coreai_torch

    decoder = program.decoder
    context, anatomy, static = decoder.context, decoder.anatomy, isinstance(program, StaticProgram)
    length = tokens or EXAMPLE_TOKENS
    total = length if static else length + EXAMPLE_PAST
    cache = (anatomy.layers, 1, anatomy.kv_heads, context, anatomy.head_dim)
    with torch.no_grad():
        # The caches are never touched: the tracer wants their shape, and takes no memory for a long context.
        example = {
            "input_ids": torch.zeros((1, length), dtype=torch.int32),
            "position_ids": torch.arange(total, dtype=torch.int32)[None],
            "adapters": decoder.adapters.examples(),
            **{name: torch.empty(cache, dtype=decoder.dtype) for name in STATES},
        }
        dynamic: dict[str, Any] = {name: {} for name in example} | {"adapters": decoder.adapters.dynamic_shapes()}
        if not static:
            dynamic["position_ids"] = {1: torch.export.Dim("total", min=2, max=context)}
            if tokens is None:
                dynamic["input_ids"] = {1: torch.export.Dim("tokens", min=2, max=context)}
        traced = torch.export.export(
            program, args=(), kwargs=example, dynamic_shapes=dynamic,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
        return traced.run_decompositions(coreai_torch.get_decomp_table())


@contextlib.contextmanager
def _failures_named(program: nn.Module) -> Iterator[None]:
    """Turn whatever torch or the converter raises into ExportFailed with the operator and the module at fault."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ExportFailed(f"export: Core AI's converter failed{_place(error, program)}: {reason}") from error


def _place(error: BaseException, program: nn.Module) -> str:
    """Return " on OPERATOR in MODULE" as far as the traceback tells.

    While the converter works, its frames hold the graph node; while torch traces, ours hold the module.
    """
    node, module, names = None, "", {part: name for name, part in program.named_modules()}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found, owner = frame.f_locals.get("node"), frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(owner):
            module = names[owner]
        if frame.f_code.co_name == "validate_exported_program":
            node = _refused(frame.f_locals)
        elif isinstance(found, torch.fx.Node) and frame.f_globals.get("__name__", "").startswith("coreai_torch"):
            node = found
    if node is not None:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        module = stack[-1][0] if stack else ""
    return (f" on {node.target}" if node is not None else "") + (f" in {module}" if module else "")


def _refused(found: dict[str, Any]) -> torch.fx.Node | None:
    """Return the first node that the converter's validation listed, from its local variables."""
    listed = {*found.get("unsupported", ()), *found.get("non_decomposed", ())}
    nodes = found["ep"].graph.nodes if "ep" in found else ()
    return next((node for node in nodes if str(node.target) in listed), None)


def _metadata(bundle: ModelBundle, options: ExportOptions, decoder: PlacedDecoder) -> dict[str, str]:
    """Return what the asset says of itself: what Xcode shows, and what a reader needs to feed it."""
    context, static, dtype = options.context_length or 0, options.shapes == "static", decoder.dtype
    origin = bundle.lineage.entries[0].options if bundle.lineage.entries else {}
    specs = packed_specs(bundle.model).values()
    kinds = sorted({"{kind} {bits}-bit group {group_size}".format(**spec) for spec in specs})
    lengths = f"[1, {options.prefill_tokens}]" if static else "[1, T], T from 2 on,"
    positions = "their positions" if static else "0 .. past + T - 1"
    return {
        "description": (
            f"{bundle.anatomy.model_type} decoder with KV cache states, context {context:,}. `prefill` takes "
            f"input_ids {lengths} and `decode` one token; position_ids are {positions}; the states keep the past."
        ),
        "dwindle.version": dwindle.__version__,
        "dwindle.context_length": str(context),
        "dwindle.vocabulary": str(bundle.anatomy.vocab),
        "dwindle.source": str(origin.get("model", "")),
        "dwindle.source_sha256": bundle.content_sha256,
        "dwindle.quantization": ", ".join(kinds) or str(dtype).removeprefix("torch."),
        "dwindle.shapes": options.shapes,
        "dwindle.prefill_tokens": str(options.prefill_tokens if static else 0),
        "dwindle.compute": str(dtype).removeprefix("torch."),
        "dwindle.state_shape": json.dumps(
            [bundle.anatomy.layers, 1, bundle.anatomy.kv_heads, context, bundle.anatomy.head_dim]
        ),
        "dwindle.minimum_os": MINIMUM_OS,
        "dwindle.base_inputs": json.dumps(decoder.adapters.of_base()),
        "dwindle.adapters": json.dumps(decoder.adapters.facts() if decoder.adapters.names else {}),
    }


def settle(asset: Path) -> None:
    """Make the files a function of the model alone: the date of creation is left out."""
    path = asset / "metadata.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described.pop("creationDate", None)
    write_text(path, json.dumps(described, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def quiet_coreai() -> Iterator[None]:
    """Keep the converter's progress, and its warnings and torch's, off the screen; errors raise."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
