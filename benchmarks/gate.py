"""The parity gate on real models: every model, every precision, every format that carries it, one line each.

    python benchmarks/gate.py --results gate.json            # what is there already is not done again
    python benchmarks/gate.py --results gate.json --print    # the table, in markdown

The models are those of `protocol.MODELS` and the embedded teacher; prompts are the first tokens of their evaluation
texts. Precisions: float; 4-bit integers in blocks of 32; 4-bit palettes of 16 rows; palettes of 2 to 8 bits mixed to
3.5 (without the 3 bits that Core AI does not take). Weights are quantized without calibration, since parity is between
the quantized model and its artifact.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from protocol import MODELS, RealModel, model_folder

from dwindle import export, quantize
from dwindle.bundle import ModelBundle
from dwindle.data import evaluation_set
from dwindle.errors import DwindleError, RecipeError
from dwindle.starter import TEACHER as TEACHER_FOLDER
from dwindle.storage import write_json
from dwindle.token_set import TokenSet

TEACHER = "starter teacher"
PRECISIONS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int4": {"scheme": "integer", "bits": 4, "method": "rtn"},
    "palettes 4": {"scheme": "palettize", "bits": 4, "method": "kmeans"},
    "palettes 3.5": {"scheme": "palettize", "target_bits_per_weight": 3.5, "method": "kmeans",
                     "allowed_bits": (2, 4, 6, 8)},
}  # fmt: skip
FORMATS = ("onnx", "coreml", "coreai")
EVALUATION_TOKENS = 8192


def loaded(name: str) -> tuple[ModelBundle, TokenSet | None]:
    """Return a model and the text its prompts come from; the teacher's is the gate's built-in one."""
    if name == TEACHER:
        return ModelBundle.load(TEACHER_FOLDER), None
    real = RealModel(name)
    text = real.text.place(real.text.evaluation)
    return real.bundle, evaluation_set(text, real.bundle.tokenizer, max_tokens=EVALUATION_TOKENS)


def gated(bundle: ModelBundle, evaluation: TokenSet | None, kind: str, shapes: str) -> dict[str, Any]:
    """Return one line: the verdict, or why the format cannot carry the precision."""
    options = export.ExportOptions(formats=(kind,), shapes=shapes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            (artifact,) = export.run(bundle, options, Path(folder), evaluation=evaluation)
        except RecipeError as error:
            return {"refused": str(error)[:300]}
        except DwindleError as error:
            return {"failed": f"{type(error).__name__}: {error}"[:300]}
    parity = artifact.parity
    assert parity is not None
    return {
        "passed": parity.passed, "max_abs_logit_error": parity.max_abs_logit_error, "kl": parity.kl_nats_per_token,
        "agreement": parity.top1_agreement, "tokens": parity.tokens_checked, "longest": parity.longest_tokens,
        "bytes": artifact.bytes, "model_bytes": artifact.details["bytes"], "executed_by": parity.executed_by,
        "export_seconds": artifact.details["export_seconds"], "parity_seconds": artifact.details["parity_seconds"],
    }  # fmt: skip


def main() -> None:
    """Do what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=[TEACHER, *MODELS])
    parser.add_argument("--format", action="append", choices=FORMATS)
    parser.add_argument("--shapes", default="dynamic", choices=["dynamic", "static"])
    parser.add_argument("--print", action="store_true", dest="only_print")
    asked = parser.parse_args()
    lines: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    for name in [] if asked.only_print else asked.model or [TEACHER, *MODELS]:
        if name != TEACHER and not model_folder(name).is_dir():
            print(f"{name}: skipped, there is no {model_folder(name)}; set DWINDLE_ASSETS to a folder with models/.")
            continue
        for precision, options in PRECISIONS.items():
            wanted = {f"{name} | {precision} | {kind}" + (", static" if asked.shapes == "static" else ""): kind
                      for kind in asked.format or FORMATS}  # fmt: skip
            wanted = {key: kind for key, kind in wanted.items() if key not in lines}
            if not wanted:
                continue
            bundle, evaluation = loaded(name)
            if options is not None:
                bundle, _ = quantize.run(bundle, quantize.QuantizeOptions(**options))
            for key, kind in wanted.items():
                lines[key] = gated(bundle, evaluation, kind, asked.shapes)
                write_json(asked.results, lines)
                print(f"{key}: {told(lines[key])}", flush=True)
    print("| model | precision | format | gate |\n|---|---|---|---|")
    for key, line in lines.items():
        print(f"| {key} | {told(line)} |")


def told(line: dict[str, Any]) -> str:
    """Return a line's outcome in words."""
    if "passed" not in line:
        return next(f"{word}: {line[word]}" for word in ("refused", "failed") if word in line)
    verdict = "passed" if line["passed"] else "FAILED"
    return (f"{verdict}, logits within {line['max_abs_logit_error']:.1e}, KL {line['kl']:.1e}, agreement "
            f"{line['agreement']:.3f} over {line['tokens']:,} tokens, longest {line['longest']:,}; "
            f"{line['bytes']:,} bytes")  # fmt: skip


if __name__ == "__main__":
    main()
