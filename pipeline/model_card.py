"""README.md of a run folder: the model card, with the front matter that the Hugging Face hub reads.

It states what is known and nothing else: a licence only where the inputs name one, a hub id only where the teacher came
from the hub (a local folder's path says nothing to a stranger), every number from the report, and a list of what
was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dwindle.pipeline import figures
from dwindle.pipeline.html_report import METRIC_LABELS
from dwindle.pipeline.line_ends import line_ends, step_title
from dwindle.pipeline.markdown import code, escape_markdown, table
from dwindle.report import Metric, Report

__all__ = ["render_model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ADAPTERS = ("recover", "adapt")
_RELATION = {"quantize": "quantized"}
_TAGS = {"prune": "pruned", "distill": "distillation", "quantize": "quantized", "recover": "lora", "adapt": "lora"}


def render_model_card(report: Report, title: str = "dwindle run") -> str:
    """Return the model card of a run as Markdown with YAML front matter."""
    sections = [
        _front_matter(report),
        f"# {escape_markdown(title)}",
        _opening(report),
        _results(report),
        _artifacts(report),
        _targets(report),
        _usage(report),
        _data(report),
        _limits(report),
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _front_matter(report: Report) -> str:
    import yaml

    names = [s.name for s in report.steps]
    teacher = _mapping(report.inputs.get("teacher"))
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    hub_id = _hub_id(teacher.get("model"))
    if hub_id:
        fields["base_model"] = hub_id
        fields["base_model_relation"] = next((_RELATION[n] for n in reversed(names) if n in _RELATION), "finetune")
    if teacher.get("licence"):
        fields["license"] = str(teacher["licence"]).lower()
    formats = (a.format for a in report.artifacts)
    fields["tags"] = list(dict.fromkeys(["dwindle", "on-device", *(_TAGS[n] for n in names if n in _TAGS), *formats]))
    datasets = [i for source in _sources(report) for i in [_hub_id(source)] if i]
    if datasets:
        fields["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _hub_id(name: Any) -> str | None:
    """Return a name that is a hub id and no local path, or None."""
    known = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return name if known else None


def _name_of(source: Any) -> str:
    """Return a source without the folders of the machine it was read on."""
    text = str(source)
    return text if _hub_id(text) or not text.startswith(("/", "~", ".")) else Path(text).name


def _sources(report: Report) -> list[str]:
    return [str(d["source"]) for d in _mapping(report.inputs.get("data")).values() if _mapping(d).get("source")]


def _opening(report: Report) -> str:
    teacher = _mapping(report.inputs.get("teacher")).get("model", "its teacher")
    verb = {
        "prune": "pruned",
        "distill": "distilled",
        "quantize": "quantized",
        "recover": "recovered",
        "adapt": "adapted",
    }
    done = list(dict.fromkeys(verb.get(s.name, escape_markdown(s.name)) for s in report.steps))
    text = f"Made from {code(_name_of(teacher))} with [dwindle](https://github.com/dwindle/dwindle)"
    text += f": {_joined(done)}." if done else "."
    if report.failures:
        text += "\n\n> **A gate failed. Do not ship this.**\n" + "\n".join(
            f"> - {escape_markdown(f)}" for f in report.failures
        )
    return text


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]


def _results(report: Report) -> str:
    if not report.steps:
        return ""
    heads = (
        "Model",
        "Parameters",
        "Bytes",
        "Bits per weight",
        "Nats/token",
        "Bits/byte",
        "KL from teacher",
        "Top-1 agreement",
    )
    states = [("teacher", report.steps[0].before)]
    states += [(f"after {step_title(s)}", s.after) for s in report.steps]
    rows = [
        (
            escape_markdown(name),
            f"{m.parameters:,}",
            f"{m.bytes:,}",
            f"{m.bits_per_weight:.2f}",
            figures.number(m.nats_per_token),
            figures.number(m.bits_per_byte),
            figures.number(m.kl_nats_per_token),
            figures.share(m.top1_agreement),
        )
        for name, m in states
    ]
    return (
        "## Results\n\n"
        + table(heads, rows)
        + "\n\nEvery row was measured on the stored checkpoint with the same evaluation "
        "text. KL is KL(teacher || model), mean per token over the whole vocabulary."
    )


def _artifacts(report: Report) -> str:
    if not report.artifacts:
        return ""
    rows = []
    for a in report.artifacts:
        p = a.parity
        told = "not checked" if p is None else f"{'passed' if p.passed else 'FAILED'}, {p.tokens_checked} tokens"
        error = figures.UNKNOWN if p is None else figures.number(p.max_abs_logit_error, 3)
        by = figures.UNKNOWN if p is None else escape_markdown(p.executed_by)
        rows.append(
            (
                code(a.path),
                escape_markdown(a.format),
                f"{a.bytes:,}",
                escape_markdown(a.minimum_os or figures.UNKNOWN),
                told,
                error,
                by,
            )
        )
    heads = ("Artifact", "Format", "Bytes", "Needs", "Parity", "Largest logit error", "Executed by")
    return "## Artifacts\n\n" + table(heads, rows)


def _targets(report: Report) -> str:
    if not report.targets:
        return ""
    names = [n for n in METRIC_LABELS if any(m.name == n for t in report.targets for m in t.metrics)]
    rows = []
    for target in report.targets:
        found = {m.name: m for m in target.metrics}
        verdict = {True: "passed", False: "FAILED", None: "no budget"}[target.passed]
        cells = [_metric(found.get(name)) for name in names]
        rows.append(
            (
                escape_markdown(target.profile),
                code(target.artifact) if target.artifact else "none runs here",
                *cells,
                verdict,
            )
        )
    heads = ("Device", "Artifact", *(METRIC_LABELS[n] for n in names), "Budgets")
    return (
        "## On devices\n\n"
        + table(heads, rows)
        + "\n\nEstimates come from a roofline model of the device's profile and may be off by the range in report.html."
    )


def _metric(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return figures.UNKNOWN
    return f"{figures.metric_text(metric, metric.value)} ({metric.basis})"


def _usage(report: Report) -> str:
    folder = _checkpoint(report)
    if folder is None:
        return ""
    return f"""## How to use

In Python, from this folder:

```python
import dwindle  # lets transformers read packed weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

On a device, ship a folder of `export/`: its `manifest.json` names the files, their hashes and the
oldest system they run on."""


def _checkpoint(report: Report) -> str | None:
    """Return the folder of the last model: steps are numbered from 1 in the order of the recipe."""
    position = 0
    name: str | None = None
    seen: set[str | None] = set()
    models = [step for step in report.steps if step.name not in _ADAPTERS]  # those leave the model as it is
    for step in models:
        if step.name != name or step.variant in seen:
            position, seen, name = position + 1, set(), step.name
        seen.add(step.variant)
    if name is None:
        return None
    variant = models[-1].variant
    return f"steps/{position:02d}-{name}" + (f"-{variant}" if variant else "") + "/model"


def _data(report: Report) -> str:
    rows = []
    for role, raw in _mapping(report.inputs.get("data")).items():
        d = _mapping(raw)
        tokens = f"{d['tokens']:,}" if isinstance(d.get("tokens"), int) else figures.UNKNOWN
        rows.append(
            (
                escape_markdown(role),
                escape_markdown(_name_of(d.get("source") or figures.UNKNOWN)),
                tokens,
                escape_markdown(d.get("licence") or "not stated"),
            )
        )
    return "## Data\n\n" + table(("Role", "Source", "Tokens", "Licence"), rows) if rows else ""


def _limits(report: Report) -> str:
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in _limit_lines(report))


def _limit_lines(report: Report) -> Iterator[str]:
    yield (
        "Quality was measured as the likelihood of one evaluation text and agreement with the teacher, nothing else: "
        "no benchmark of knowledge, safety or bias was run."
    )
    yield "The model inherits what the teacher got wrong, and forgets more of what the training text does not contain."
    for step in line_ends(report):
        agreement = step.after.top1_agreement
        if agreement is not None and agreement < 0.9:
            variant = f" ({escape_markdown(step.variant)})" if step.variant else ""
            differs = figures.share(1 - agreement)
            yield f"The most likely next token differs from the teacher's in {differs} of cases{variant}."
    for line in report.skipped:
        yield f"Not done: {escape_markdown(line.what)}: {escape_markdown(line.why)}"
