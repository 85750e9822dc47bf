from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from dwindle.pipeline.markdown import escape_markdown
from dwindle.pipeline.model_card import render_model_card
from dwindle.report import Report

from .sample_report import sample_report


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_front_matter_is_what_the_hub_reads() -> None:
    fields = front_matter(render_model_card(sample_report()))
    assert fields["base_model"] == "org/teacher-4m"
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert fields["datasets"] == ["org/held-out"]
    assert fields["tags"] == ["dwindle", "on-device", "pruned", "distillation", "quantized", "onnx", "coreml"]
    assert "license" not in fields


def test_licence_is_stated_where_the_teacher_names_one() -> None:
    report = replace(sample_report(), inputs={"teacher": {"model": "org/x", "licence": "Apache-2.0"}})
    assert front_matter(render_model_card(report))["license"] == "apache-2.0"


def test_without_quantization_it_is_a_finetune() -> None:
    report = sample_report()
    assert front_matter(render_model_card(replace(report, steps=report.steps[:2])))["base_model_relation"] == "finetune"


def test_local_folders_leave_no_path() -> None:
    report = replace(
        sample_report(),
        inputs={
            "teacher": {"model": "/home/someone/models/tiny"},
            "data": {"train": {"source": "/home/someone/stories.txt"}},
        },
    )
    card = render_model_card(report)
    assert "someone" not in card
    assert "`tiny`" in card
    assert "stories.txt" in card
    assert "base_model" not in front_matter(card)


def test_results_artifacts_targets_and_limits() -> None:
    card = render_model_card(sample_report(), "A run")
    for said in ("# A run", "| teacher | 4,000,000 | 8,000,000 | 16.00 | 1.4 |", "after quantize (apple)",
                 "passed, 160 tokens", "not checked", "400 tokens/s (estimated)", "800 tokens/s (measured)",
                 'from_pretrained("steps/03-quantize-onnx/model")', "Not done: coreml on host: no runtime",
                 "11.0 % of cases (apple)"):  # fmt: skip
        assert said in card, said
    assert "of cases (onnx)" not in card


def test_a_failed_gate_is_the_first_thing_said() -> None:
    card = render_model_card(sample_report(passed=False))
    assert card.index("Do not ship this") < card.index("## Results")


def test_checkpoint_number_counts_repeated_steps() -> None:
    report = sample_report()
    prune, distill = report.steps[:2]
    assert "steps/03-distill/model" in render_model_card(replace(report, steps=(prune, distill, distill)))


def test_texts_from_outside_cannot_break_out() -> None:
    card = render_model_card(sample_report(name="a|b\n# x <script>"), "t`*\n---\n# other")
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# x" not in card
    assert "\n# other" not in card
    assert escape_markdown("[a](b)\n|") == r"\[a\](b) \|"


def test_an_empty_report_is_a_card() -> None:
    card = render_model_card(Report())
    assert "## Results" not in card
    assert "## Limits" in card


def test_the_checkpoint_to_load_is_the_model_that_adapters_were_trained_on() -> None:
    report = sample_report()
    onnx = report.steps[-1]
    adapters = tuple(replace(onnx, name=name, variant=variant, details={"task": name})
                     for name in ("recover", "adapt", "adapt") for variant in ("apple", "onnx"))  # fmt: skip
    assert '"steps/03-quantize-onnx/model"' in render_model_card(replace(report, steps=(*report.steps, *adapters)))
