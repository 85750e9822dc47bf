"""The command line: every command from its help, exit codes, nonsense, nothing half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwindle.bundle import ModelBundle
from dwindle.pipeline.cli import COMMANDS, cli, main
from dwindle.storage import hash_folder


def invoke(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(end.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = invoke(capsys, command, "--help")
    assert code == 0
    assert "Usage: dwindle" in out


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke(capsys, "quantise")
    assert code == 2
    assert "did you mean 'quantize'?" in err


def test_each_step_by_hand(capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path) -> None:
    """prune, distill, quantize, export, evaluate: what a recipe does, one command at a time."""
    train, teacher = workshop / "train.txt", workshop / "teacher"
    code, out, _ = invoke(
        capsys, "prune", "-m", teacher, "-o", tmp_path / "p", "--keep", "ffn=0.5", "-d", train, "--json"
    )
    assert code == 0
    assert json.loads(out)["after"]["parameters"] < json.loads(out)["before"]["parameters"]
    code, out, _ = invoke(capsys, "distill", "-t", teacher, "-m", tmp_path / "p", "-d", train, "-o", tmp_path / "d",
                          "--loss", "top1_blend=0.9", "--tokens", "2k", "--batch-size", "4")  # fmt: skip
    assert code == 0
    assert "Written" in out
    code, out, _ = invoke(
        capsys, "quantize", "-m", tmp_path / "d", "-o", tmp_path / "q", "--scheme", "integer", "--bits", "4"
    )
    assert code == 0
    code, out, _ = invoke(capsys, "export", "-m", tmp_path / "q", "-o", tmp_path / "x", "--format", "onnx", "--json")
    assert code == 0
    assert json.loads(out)["artifacts"][0]["parity"]["passed"]
    numbers = []
    for model in (tmp_path / "q", tmp_path / "x" / "onnx"):
        code, out, _ = invoke(
            capsys, "evaluate", "-m", model, "--text", workshop / "valid.txt", "--reference", teacher, "--json"
        )
        assert code == 0
        numbers.append(json.loads(out)["kl_nats_per_token"])
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    code, out, _ = invoke(capsys, "bench", tmp_path / "x" / "onnx", "--repeats", "1", "--decode-tokens", "4", "--json")
    assert code == 0
    assert {m["basis"] for m in json.loads(out)["metrics"]} == {"measured"}


def test_prune_plans_before_it_cuts(capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path) -> None:
    words = [
        "prune",
        "-m",
        workshop / "teacher",
        "-o",
        tmp_path / "a",
        "--keep",
        "ffn=0.5",
        "-d",
        workshop / "train.txt",
    ]
    code, plan, _ = invoke(capsys, *words, "--dry-run")
    assert code == 0
    assert not (tmp_path / "a").exists()
    (tmp_path / "plan.json").write_text(plan)
    invoke(capsys, *words)
    applied = ["prune", "-m", workshop / "teacher", "--plan", tmp_path / "plan.json"]
    invoke(capsys, *applied, "-o", tmp_path / "b", "-d", workshop / "train.txt")
    _, out, _ = invoke(capsys, *applied, "-o", tmp_path / "c")
    assert "Not done: compensation" in out
    invoke(capsys, *words[:3], "-o", tmp_path / "d", *words[5:], "--no-compensate")
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "abcd"]
    assert weights[0] == weights[1] != weights[2] == weights[3]


def test_prune_works_on_large_checkpoints_layer_by_layer(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(output: str, *more: object) -> list[object]:
        return ["prune", "-m", workshop / "teacher", "-o", tmp_path / output, "-d", workshop / "train.txt", *more]

    cuts = ["--keep", "ffn=0.5", "--keep", "layers=0.5", "--method", "activation", "--json"]
    code, whole, _ = invoke(capsys, *words("whole", *cuts))
    assert code == 0
    monkeypatch.setattr("dwindle.weight_source.STREAMED_PARAMETERS", 0)
    code, streamed, err = invoke(capsys, *words("streamed", *cuts))
    assert code == 0, err
    assert "working layer by layer" in err
    found = [json.loads(out) for out in (whole, streamed)]
    assert found[0]["details"] == found[1]["details"]
    found = [ModelBundle.load(tmp_path / name).content_sha256 for name in ("whole", "streamed")]
    assert found[0] == found[1]
    code, out, err = invoke(capsys, *words("none", "--keep", "ffn=0.5", "--method", "taylor", "--dry-run"))
    assert code == 0, err
    assert "all of them in memory: method=taylor needs the whole model" in err
    assert json.loads(out)["method"] == "taylor"


def test_prune_cuts_several_axes(capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path) -> None:
    words = ["prune", "-m", workshop / "teacher", "-d", workshop / "train.txt", "--dry-run", "-o", tmp_path / "a"]
    keep = ["--keep", "ffn=0.5", "--keep", "heads=0.5", "--keep", "layers=0.5", "--method", "fisher",
            "--depth-method", "leave_one_out"]  # fmt: skip
    code, out, err = invoke(capsys, *words, *keep)
    assert code == 0
    plan = json.loads(out)
    assert len(plan["layers"]) < plan["shape"]["layers"]
    assert len(plan["layers"][0]["kv_groups"]) < plan["shape"]["kv_heads"]
    assert "dropped" in err
    limit = plan["parameters_before"] - 1
    code, out, _ = invoke(capsys, *words, "--parameters", limit)
    assert code == 0
    assert json.loads(out)["parameters_after"] <= limit


def test_prune_trains_masks_on_the_text(capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path) -> None:
    words = ["prune", "-m", workshop / "teacher", "-o", tmp_path / "a", "--keep", "ffn=0.5", "--method", "soft_top_k",
             "--masks", "steps=4", "--masks", "batch_size=2"]  # fmt: skip
    text = ["-d", workshop / "train.txt"]
    code, plan, _ = invoke(capsys, *words, *text, "--dry-run")
    assert code == 0
    assert json.loads(plan)["method"] == "soft_top_k"
    code, out, err = invoke(capsys, *words, *text, "--json")
    assert code == 0
    assert "FFN" in err
    details = json.loads(out)["details"]
    assert details["steps"] == 4
    assert details["plan"]["layers"] == json.loads(plan)["layers"]
    assert [place.name for place in tmp_path.iterdir()] == ["a"]  # no checkpoints are left
    code, _, err = invoke(capsys, *words)
    assert code == 2
    assert "needs training data" in err
    code, _, err = invoke(capsys, *words, *text, "--masks", "steps")
    assert code == 2
    assert "--masks steps: needed KEY=VALUE" in err


def test_run_shows_its_plan(capsys: pytest.CaptureFixture[str], small_run: Path, tmp_path: Path) -> None:
    code, out, _ = invoke(capsys, "run", small_run / "recipe.yaml", "-o", tmp_path / "none", "--dry-run")
    assert code == 0
    assert "2. distill" in out
    assert "export/float/onnx from the float model" in out
    assert not (tmp_path / "none").exists()


def test_report_compare_and_validate_read_a_run(
    capsys: pytest.CaptureFixture[str], small_run: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    shutil.copytree(small_run, place)  # `validate` writes its verdicts beside the report
    code, out, _ = invoke(capsys, "report", place)
    assert code == 0
    assert "nats/token" in out
    code, out, err = invoke(capsys, "report", place, "--markdown", "--plots", tmp_path / "plots")
    assert code == 0
    assert out.startswith("### small: passed\n\n| Model | Size |")
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"quality-against-size.svg", "quality-against-size.png",
                                                               "memory-over-context.svg", "time-split.png"}  # fmt: skip
    assert "time-split.png" in err
    code, out, _ = invoke(capsys, "compare", place, place, "--max-regression", "1%", "--html", tmp_path / "c.html")
    assert code == 0
    assert "No regression of more than 1.0%" in (tmp_path / "c.html").read_text()
    code, out, _ = invoke(capsys, "compare", place, place, "--markdown", "--max-regression", "1%")
    assert "No regression of more than 1.0%." in out
    code, _, err = invoke(capsys, "validate", place, "--target", "pixel-9", "--budget", "memory <= 1kB", "--junit",
                          tmp_path / "j.xml")  # fmt: skip
    assert code == 1
    assert "peak_memory_bytes" in err
    assert "<failure" in (tmp_path / "j.xml").read_text()
    code, _, err = invoke(capsys, "validate", place, "--target", "pixel-9", "--require", "measured", "--budget",
                          "tokens_per_second >= 1")  # fmt: skip
    assert code == 1


def test_doctor_looks_at_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "doctor", "--json")
    assert code in (0, 1)
    assert "torch" in out


NONSENSE = {
    "no model": (["evaluate", "-m", "{empty}", "--text", "{valid}"], "config.json"),
    "no such model": (["evaluate", "-m", "{tmp}/none", "--text", "{valid}"], "none"),
    "family not in the table": (["prune", "-m", "{alien}", "-o", "{out}", "--keep", "ffn=0.5"], "Supported"),
    "pickle": (["quantize", "-m", "{pickle}", "-o", "{out}", "--scheme", "integer"], "pickle"),
    "truncated weights": (["quantize", "-m", "{truncated}", "-o", "{out}", "--scheme", "integer"], "truncated"),
    "empty text": (["evaluate", "-m", "{teacher}", "--text", "{tmp}/empty.txt"], "empty"),
    "binary text": (["evaluate", "-m", "{teacher}", "--text", "{tmp}/binary.txt"], "binary"),
    "missing text": (["prune", "-m", "{teacher}", "-o", "{out}", "--keep", "ffn=0.5", "-d", "{tmp}/no.txt"], "no.txt"),
    "bad share": (["prune", "-m", "{teacher}", "-o", "{out}", "--keep", "ffn=7", "-d", "{valid}"], "ffn_keep"),
    "bad keep": (["prune", "-m", "{teacher}", "-o", "{out}", "--keep", "heads"], "ffn=SHARE"),
    "keep and plan": (["prune", "-m", "{teacher}", "-o", "{out}"], "either --keep"),
    "unknown scheme": (["quantize", "-m", "{teacher}", "-o", "{out}", "--scheme", "magic"], "magic"),
    "no such bits": (["quantize", "-m", "{teacher}", "-o", "{out}", "--scheme", "palettize", "--bits", "5"], "5"),
    "quantize twice": (["quantize", "-m", "{quantized}", "-o", "{out}", "--scheme", "integer"], "quantized already"),
    "plan and choices": (["prune", "-m", "{teacher}", "-o", "{out}", "--plan", "p.json", "--method", "taylor", "--no-rotate"], "--method, --rotate/--no-rotate beside --plan"),
    "prune after quantize": (["prune", "-m", "{quantized}", "-o", "{out}", "--keep", "ffn=0.5", "-d", "{train}"], "quantize"),
    "palettes to ONNX": (["export", "-m", "{palettized}", "-o", "{out}", "--format", "onnx"], "palett"),
    "unknown format": (["export", "-m", "{teacher}", "-o", "{out}", "--format", "gguf"], "gguf"),
    "unknown recipe key": (["run", "{recipe}", "-o", "{out}", "--set", "prune.ffn_kep=1"], "did you mean 'ffn_keep'?"),
    "output holds something": (["prune", "-m", "{teacher}", "-o", "{tmp}", "--keep", "ffn=0.5", "-d", "{train}"], "holds"),
    "run into a foreign folder": (["run", "{recipe}", "-o", "{tmp}"], "holds no dwindle run"),
    "no run": (["report", "{tmp}"], "report.json"),
    "no artifact": (["bench", "{teacher}"], "model.onnx"),
    "unknown target": (["validate", "{run}", "--target", "iphone-99"], "iphone-99"),
    "unknown budget": (["validate", "{run}", "--target", "pixel-9", "--budget", "tokns >= 3"], "no metric"),
    "unknown place to bench": (["bench", "{run}/export/onnx", "--on", "moon"], "moon"),
    "a damaged report": (["report", "{damaged}"], "cannot be read as a report"),
    "a report of another schema": (["report", "{newer}"], "found schema 2"),
    "a damaged report in a comparison": (["compare", "{run}", "{damaged}"], "cannot be read as a report"),
    "one run is no comparison": (["compare", "{run}"], "two runs"),
    "unknown metric": (["compare", "{run}", "{run}", "--metric", "byts"], "did you mean 'bytes'?"),
    "bad percent": (["compare", "{run}", "{run}", "--max-regression", "much"], "much"),
    "bad number": (["evaluate", "-m", "{teacher}", "--text", "{valid}", "--tokens", "few"], "few"),
}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(workshop: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of nonsense, and of good things at the wrong place."""
    tmp = tmp_path_factory.mktemp("shelf")
    (tmp / "empty").mkdir()
    (tmp / "empty.txt").write_text("")
    (tmp / "binary.txt").write_bytes(b"\x00\x01\xff" * 100)
    for name in ("alien", "pickle", "truncated"):
        shutil.copytree(workshop / "teacher", tmp / name)
    config = json.loads((tmp / "alien" / "config.json").read_text())
    (tmp / "alien" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    (tmp / "pickle" / "model.safetensors").rename(tmp / "pickle" / "pytorch_model.bin")
    weights = tmp / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, text in {"damaged": '{"schema": 1, "steps": [', "newer": '{"schema": 2}'}.items():
        (tmp / name).mkdir()
        (tmp / name / "report.json").write_text(text)
    steps = small_run / "steps"
    return {"tmp": tmp, "damaged": tmp / "damaged", "newer": tmp / "newer", "empty": tmp / "empty", "alien": tmp / "alien", "pickle": tmp / "pickle", "truncated": tmp / "truncated",
            "teacher": workshop / "teacher", "valid": workshop / "valid.txt", "train": workshop / "train.txt",
            "quantized": steps / "03-quantize-onnx" / "model", "palettized": steps / "03-quantize-apple" / "model",
            "recipe": small_run / "recipe.yaml", "run": small_run}  # fmt: skip


@pytest.mark.parametrize("case", list(NONSENSE))
def test_nonsense_ends_with_code_2_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], shelf: dict[str, Path], tmp_path: Path, case: str
) -> None:
    words, told = NONSENSE[case]
    before = sorted(shelf["tmp"].rglob("*"))
    code, _, err = invoke(capsys, *(w.format(out=tmp_path / "out", **shelf) for w in words))
    assert code == 2, err
    assert told in err
    assert sorted(shelf["tmp"].rglob("*")) == before
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("command", ["run", "quantize"])
def test_a_full_disk_is_told_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
    shelf: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr("dwindle.storage.shutil.disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=0))
    words = {
        "run": ["run", shelf["recipe"], "-o", tmp_path / "out"],
        "quantize": ["quantize", "-m", shelf["teacher"], "-o", tmp_path / "out", "--scheme", "integer"],
    }[command]
    code, _, err = invoke(capsys, *words)
    assert code == 2
    assert "0 are free" in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sigterm_ends_a_command_like_ctrl_c(recipe_of: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of().to_yaml())
    folder = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "dwindle.pipeline.cli", "run", str(recipe), "-o", str(folder)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "run.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert "Interrupted. Finished steps are kept" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("writer failed: No space left on device"), "no space left on the device"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory",
        ),
        (MemoryError(), "not enough memory (MemoryError)"),
    ],
)
def test_no_room_is_told_without_a_traceback(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 2
    assert f"Error: {told}" in capsys.readouterr().err


def test_what_a_foreign_file_names_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "\x1b[2Jno\u202ewhere"])
    told = capsys.readouterr().err
    assert "\\x1b[2Jno\\u202ewhere" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("flags", [["--tokens", "1"], ["--tokens", "-5"], ["--context", "0"]])
def test_evaluate_refuses_lengths_that_measure_nothing(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    code, _, err = invoke(capsys, "evaluate", "-m", "none", "--text", "none.txt", *flags)
    assert (code, "needed: at least" in err) == (2, True)


def test_an_output_that_holds_something_else_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], workshop: Path
) -> None:
    train = workshop / "train.txt"
    for words in (["prune", "--keep", "ffn=0.5"], ["quantize", "--scheme", "integer"],
                  ["distill", "-t", "none", "-d", train]):  # fmt: skip
        code, _, err = invoke(capsys, *words, "-m", "none", "-o", workshop)
        assert (code, "something else than a model" in err) == (2, True), err


def test_an_output_that_is_read_is_not_replaced(
    capsys: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workshop / "teacher", model)
    before = hash_folder(model)
    for words in (["prune", "--keep", "ffn=0.5", "-m", model], ["quantize", "--scheme", "integer", "-m", model],
                  ["distill", "-t", model, "-m", workshop / "teacher", "-d", workshop / "train.txt"],
                  ["adapters", "merge", "none", "-m", model]):  # fmt: skip
        code, _, err = invoke(capsys, *words, "-o", model)
        assert (code, f"would replace what is read: {model}" in err) == (2, True), err
    assert hash_folder(model) == before


def test_a_path_that_the_system_refuses_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise IsADirectoryError(21, "Is a directory", "/some/place")

    monkeypatch.setattr("dwindle.pipeline.doctor.examine", refused)
    code, _, err = invoke(capsys, "doctor")
    assert (code, "/some/place: Is a directory." in err) == (2, True)


def test_runs_are_called_by_their_folder_wherever_one_stands(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dwindle.pipeline.write_reports import read_runs

    monkeypatch.chdir(small_run)
    assert [run.name for run in read_runs([Path(), small_run.parent / "out"])] == [".", str(small_run.parent / "out")]
    assert read_runs([Path()])[0].name == "out"


def test_the_summary_shows_brackets_as_they_are() -> None:
    from dataclasses import replace

    from dwindle.pipeline.summary import summary

    from .sample_report import sample_report

    report = sample_report()
    assert "[/b]:x:" in summary(replace(report, artifacts=(replace(report.artifacts[0], variant="[/b]:x:"),)))


def test_the_demo_writes_nothing_beside_other_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    code, _, err = invoke(capsys, "demo", "-o", tmp_path)
    assert (code, "holds no dwindle run" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_demo_may_lie_in_a_folder_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dwindle.pipeline import demo

    monkeypatch.setattr(demo, "write_text", lambda place, text: None)
    monkeypatch.setattr(demo, "corpus", lambda *_: [])
    monkeypatch.setattr(demo, "TASK_STORIES", 0)
    folder = tmp_path / "a, [b] #1"
    assert demo.demo_recipe(folder).data.train == (str(folder / "data" / "train.txt"),)


def test_a_warning_with_a_foreign_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from dwindle.pipeline.cli import _Lines

    _Lines().emit(logging.LogRecord("dwindle", logging.WARNING, "", 0, "left out: %s", ("a\x1b[2Jb",), None))
    assert capsys.readouterr().err.endswith("left out: a\\x1b[2Jb\n")


def test_a_report_in_a_folder_that_cannot_be_written_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small_run: Path
) -> None:
    from dataclasses import replace

    from dwindle.errors import OutputError

    def refused(*_: Any) -> None:
        raise OutputError("report.html: cannot be written (Read-only file system). Choose another output.")

    monkeypatch.setattr("dwindle.pipeline.write_reports.rewrite_html", refused)
    monkeypatch.setattr("dwindle.pipeline.measured_report.measured_report", lambda report, _: replace(report))
    code, out, err = invoke(capsys, "report", small_run)
    assert (code, "nats/token" in out, "stays as it was" in err) == (0, True, True)
    assert invoke(capsys, "report", small_run, "--html")[0] == 2
