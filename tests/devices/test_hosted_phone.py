"""What is asked of AI Hub, held to its own client where that is installed (it wants an older protobuf than exporters).

    python -m venv hub && hub/bin/pip install qai-hub==0.56.0 pytest pyyaml psutil && hub/bin/pip install --no-deps .
    hub/bin/python -m pytest --noconftest -c /dev/null tests/devices/test_hosted_phone.py

Jobs themselves need an account: a stand-in answers for the service.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dwindle.devices.bench_options import Protocol
from dwindle.devices.exported import open_exported
from dwindle.devices.hosted_phone import TYPES, aihub_events, input_specs
from dwindle.errors import MissingExtra, TargetError, UnsupportedModel

HUB: Any = importlib.import_module("qai_hub") if importlib.util.find_spec("qai_hub") else None
needs_the_client = pytest.mark.skipif(HUB is None, reason="AI Hub's client lives in an environment of its own")
PHONE = "Samsung Galaxy S24"
PROTOCOL = Protocol(prompt_tokens=4, decode_tokens=1, warm_up=0, repeats=2, context=32)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder as the exporter leaves it, a graph in it that nobody opens."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    config = {"vocab_size": 11, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
              "hidden_size": 16, "max_position_embeddings": 32}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {"format": "onnx", "context_length": 32, "runtime": {"operators": "fused", "kv_cache": "float32"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("model.onnx", "model.onnx.data", "README.md", "tokenizer.json"):
        (folder / name).write_text(name)
    return folder


class StandInService:
    """Stands in for AI Hub: answers what its client would, and notes what it was asked."""

    def __init__(self, summary: dict[str, Any] | None, compiled: str | None = "compiled") -> None:
        self.summary, self.compiled = summary, compiled
        self.asked: list[tuple[str, Any]] = []
        self.folders: list[set[str]] = []
        self.client = HUB.client if HUB else SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.__version__ = "a stand-in"
        self.Device: Callable[..., Any] = HUB.Device if HUB else lambda name: SimpleNamespace(name=name)

    def _bound(self, name: str, *given: Any, **named: Any) -> None:
        """Hold a call to the real client's signature, where there is one."""
        if HUB is not None:
            inspect.signature(getattr(HUB, name)).bind(*given, **named)
        self.asked.append((name, named))

    def get_devices(self, *given: Any, **named: Any) -> list[Any]:
        self._bound("get_devices", *given, **named)
        return [SimpleNamespace(name=PHONE), SimpleNamespace(name="Samsung Galaxy S25")]

    def submit_compile_job(self, model: str, *given: Any, **named: Any) -> Any:
        self._bound("submit_compile_job", model, *given, **named)
        self.folders.append({path.name for path in Path(model).iterdir()})
        if HUB is not None:
            assert HUB.client._get_model_dir_type(model) is HUB.client.SourceModelType.ONNX
        status = SimpleNamespace(message="an operator is not known")
        return SimpleNamespace(get_target_model=lambda: self.compiled, get_status=lambda: status)

    def submit_profile_job(self, *given: Any, **named: Any) -> Any:
        self._bound("submit_profile_job", *given, **named)
        found = {} if self.summary is None else {"execution_summary": self.summary}
        status = SimpleNamespace(message="the phone went away")
        return SimpleNamespace(download_profile=lambda: found, get_status=lambda: status)


SUMMARY = {"estimated_inference_time": 5000, "estimated_inference_peak_memory": 10**6, "first_load_time": 250_000,
           "all_inference_times": [5000, 6000, 7000]}  # fmt: skip


def events(monkeypatch: pytest.MonkeyPatch, service: StandInService, folder: Path, name: str = PHONE) -> list[Any]:
    monkeypatch.setattr("dwindle.devices.hosted_phone.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "qai_hub", service)  # type: ignore[arg-type]
    return list(aihub_events(name, open_exported(folder), PROTOCOL))


def test_a_prompt_and_a_token_are_compiled_and_timed(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    service = StandInService(SUMMARY)
    start, loaded, *repeats, note, end = events(monkeypatch, service, exported)
    assert (start["event"], note["event"], end["event"]) == ("start", "note", "end")
    assert loaded["load_seconds"] == 0.5
    assert [r["token_seconds"] for r in repeats] == [[0.005], [0.006]]
    assert {(r["first_token_seconds"], r["peak_memory_bytes"]) for r in repeats} == {(0.005, 10**6)}
    compiled = [named for name, named in service.asked if name == "submit_compile_job"]
    assert [named["input_specs"]["input_ids"] for named in compiled] == [((1, 4), "int64"), ((1, 1), "int64")]
    assert service.folders == [{"model.onnx", "model.onnx.data"}] * 2


def test_memory_that_was_not_told_stays_unknown(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    summary = {**SUMMARY, "estimated_inference_peak_memory": None, "all_inference_times": []}
    found = events(monkeypatch, StandInService(summary), exported)
    repeats = [event for event in found if event["event"] == "repeat"]
    assert [(r["peak_memory_bytes"], r["token_seconds"]) for r in repeats] == [(None, [0.005])]


@pytest.mark.parametrize(
    ("service", "name", "said"),
    [(StandInService(SUMMARY), "Samsung Galaxy S42", "no such device.*Samsung Galaxy S2"),
     (StandInService(SUMMARY, compiled=None), PHONE, "not compiled: an operator is not known"),
     (StandInService(None), PHONE, "did not finish: the phone went away")],
    ids=["device", "compile", "profile"],
)  # fmt: skip
def test_what_the_service_refuses(
    monkeypatch: pytest.MonkeyPatch, exported: Path, service: StandInService, name: str, said: str
) -> None:
    with pytest.raises(TargetError, match=said):
        events(monkeypatch, service, exported, name)


def test_the_clients_own_errors_become_ours(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    service = StandInService(SUMMARY)

    def refuse() -> list[Any]:
        raise service.client.Error("no configuration")

    monkeypatch.setattr(service, "get_devices", refuse)
    with pytest.raises(TargetError, match="AI Hub refuses: no configuration"):
        events(monkeypatch, service, exported)


def test_hosted_phones_need_their_client(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    monkeypatch.setattr("dwindle.devices.hosted_phone.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"dwindle\[aihub\]"):
        list(aihub_events(PHONE, open_exported(exported), PROTOCOL))


def test_only_graphs_go_to_hosted_phones(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    from dataclasses import replace

    monkeypatch.setattr("dwindle.devices.hosted_phone.find_spec", lambda name: object())
    with pytest.raises(UnsupportedModel, match="an ONNX folder is needed"):
        list(aihub_events(PHONE, replace(open_exported(exported), format="coreai"), PROTOCOL))


def test_fixed_shapes_for_hosted_phones(exported: Path) -> None:
    specs = input_specs(open_exported(exported), 1, 4)
    assert specs == {
        "input_ids": ((1, 1), "int64"),
        "attention_mask": ((1, 5), "int64"),
        "past_key_values.0.key": ((1, 2, 5, 4), "float32"),
        "past_key_values.0.value": ((1, 2, 5, 4), "float32"),
    }
    assert {kind for _, kind in specs.values()} <= set(TYPES)


@pytest.mark.parametrize("runtime", [{}, {"operators": "plain"}, {"operators": "fused", "kv_cache": "float16"}])
def test_graphs_that_have_no_fixed_shapes_or_types(exported: Path, runtime: dict[str, str]) -> None:
    manifest = {"format": "onnx", "context_length": 32, "runtime": runtime}
    (exported / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedModel, match="fixed shapes"):
        input_specs(open_exported(exported), 4, 0)


@needs_the_client
def test_the_client_takes_the_types_and_tells_the_summary_that_are_counted_on() -> None:
    known = inspect.getdoc(HUB.submit_compile_job) or ""
    assert all(f'"{kind}"' in known for kind in TYPES)
    assert '"float16"' not in known
    detail = HUB.client.api_pb.ProfileDetail(major_version=1, minor_version=2, execution_time=7, cold_load_time=9)
    summary = HUB.client._profile_pb_to_python_dict(detail)["execution_summary"]
    assert set(SUMMARY) <= set(summary)
    oldest = HUB.client._profile_pb_to_python_dict(HUB.client.api_pb.ProfileDetail())["execution_summary"]
    assert oldest["estimated_inference_peak_memory"] is None


@needs_the_client
def test_the_client_refuses_the_folder_as_it_is_exported(exported: Path) -> None:
    """That is why the graph is copied."""
    with pytest.raises(HUB.client.UserError, match="can only contain"):
        HUB.client._get_model_dir_type(str(exported))
