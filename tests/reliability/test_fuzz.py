"""The fuzzer in short: some cases of every reader, and hypothesis's own inputs on those that are cheap."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import valid_files
from fuzz import case_of, fuzz
from fuzz_targets import Finding, Target, Watch, classify, targets

CASES = 2_000
"""Of all targets together, divided by what they cost."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="session")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Target], Watch]:
    kept = os.environ.get("DWINDLE_VALID_FILES")
    root = tmp_path_factory.mktemp("fuzz")
    files = valid_files.make(Path(kept) if kept else root / "files")
    (root / "scratch").mkdir()
    return targets(files, root / "scratch"), Watch(root / "scratch")


def test_no_case_ends_in_anything_but_success_or_an_error_of_ours(fuzzed: tuple[dict[str, Target], Watch]) -> None:
    known, watch = fuzzed
    wrong = []
    for target in known.values():
        cases = max(3, CASES // (len(known) * max(1, target.cost // 10)))
        _, found = fuzz(target, cases, watch)
        wrong += [f"{target.name} case {number}: {told}" for number, told in found.values()]
    assert not wrong, "\n".join(wrong)


def test_a_case_is_found_again_by_its_number(fuzzed: tuple[dict[str, Target], Watch]) -> None:
    target = fuzzed[0]["config.json"]
    assert case_of(target, 7) == case_of(target, 7) != case_of(target, 8)


def test_the_fuzzer_sees_what_must_not_happen(fuzzed: tuple[dict[str, Target], Watch], tmp_path: Path) -> None:
    """Each kind of finding is made on purpose: a fuzzer that sees nothing finds nothing."""
    import os
    import pickle

    def loads(data: bytes) -> None:
        pickle.loads(data)

    acts: dict[str, Any] = {
        "ZeroDivisionError": lambda data: 1 / 0,
        "writes": lambda data: (tmp_path / "outside").write_text("x"),
        "pickle.find_class": loads,
        "os.system": lambda data: os.system("true"),
        "takes longer": _busy,
    }
    for told, act in acts.items():
        with pytest.raises(Finding, match=told):
            classify(Target("x", "bytes", (b"",), act), pickle.dumps(os.getcwd), fuzzed[1], seconds=0.5)


def _busy(data: bytes) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "name",
    ["safetensors header", "shard index", "lineage.json", "vocabulary_map.json", "adapter_config.json",
     "adapter_card.json", "record.json", "checkpoint.json", "checkpoint index (pickle)", "budget", "number", "loss",
     "corpus .jsonl", "corpus .csv", "corpus .txt", "artifact manifest", "budgets file", "task .json", "task .csv",
     "corpus manifest", "adapter package"],
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_hypothesis_finds_nothing_either(name: str, data: bytes, fuzzed: tuple[dict[str, Target], Watch]) -> None:
    known, watch = fuzzed
    classify(known[name], data, watch)
