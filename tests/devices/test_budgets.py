from __future__ import annotations

from pathlib import Path

import pytest

from dwindle.devices.budgets import parse_budgets, read_budgets
from dwindle.errors import RecipeError


@pytest.mark.parametrize(
    ("line", "metric", "limit"),
    [
        ("tokens_per_second >= 30", "tokens_per_second", 30),
        ("tokens_per_second>=30tok/s", "tokens_per_second", 30),
        ("memory <= 1.5GB", "peak_memory_bytes", 1.5e9),
        ("peak_memory_bytes <= 1_000_000", "peak_memory_bytes", 1e6),
        ("package < 2 MiB", "package_bytes", 2 * 2**20),
        ("time_to_first_token <= 250ms", "time_to_first_token_seconds", 0.25),
        ("ttft <= 1.5s", "time_to_first_token_seconds", 1.5),
        ("time_to_first_token_ms <= 300", "time_to_first_token_seconds", 0.3),
        ("peak_memory <= 1.5GB", "peak_memory_bytes", 1.5e9),
        ("package <= 1GB", "package_bytes", 1e9),
        ("load <= 2s", "load_seconds", 2),
        ("load_seconds <= 2", "load_seconds", 2),
    ],
)
def test_lines(line: str, metric: str, limit: float) -> None:
    (budget,) = parse_budgets([line])
    assert (budget.metric, budget.limit) == (metric, pytest.approx(limit))


def test_mapping_with_and_without_comparison() -> None:
    found = {b.metric: b for b in parse_budgets({"tokens_per_second": 30, "memory": "<= 1.5GB", "ttft": "2s"})}
    assert found["tokens_per_second"].comparison == ">="
    assert found["peak_memory_bytes"].text == "<= 1.5 GB"
    assert found["time_to_first_token_seconds"].comparison == "<="


def test_edges_hold_as_written() -> None:
    at_least, above = parse_budgets(["tokens_per_second >= 30"]) + parse_budgets(["tokens_per_second > 30"])
    assert at_least.holds(30)
    assert not above.holds(30)


def test_the_harder_of_two_counts() -> None:
    assert parse_budgets(["memory <= 2GB", "memory <= 1GB"])[0].limit == 1e9
    assert parse_budgets(["tokens_per_second >= 10", "tokens_per_second >= 30"])[0].limit == 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("token_per_second >= 30", "did you mean 'tokens_per_second'"),
        ("tokens_per_second", "is not METRIC >= NUMBER"),
        ("tokens_per_second >= fast", "is not METRIC >= NUMBER"),
        ("tokens_per_second <= 30", "good when high"),
        ("memory >= 1GB", "good when low"),
        ("memory == 1GB", "good when low"),
        ("task.x.exact_match = 0.8", "only you know which way"),
        ("task.x.exact_match => 0.8", "only you know which way"),
        ("memory <= 1.5 parsec", "parsec is no unit"),
        ("memory <= 1.5", r"1.5 of what\? Give a unit \(bytes"),
        ("time_to_first_token <= 300", r"300 of what\? Give a unit \(s, ms"),
        ("package <= 1GB @ 512", "length of a prompt, at least 1, for tokens_per_second"),
        ("ttft <= 1s @ 0", "length of a prompt, at least 1"),
        ("ttft <= 1s @ many", "is not METRIC"),
    ],
)
def test_mistakes(line: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_budgets([line])


def test_all_mistakes_at_once() -> None:
    with pytest.raises(RecipeError, match=r"2 mistake\(s\)"):
        parse_budgets(["speed >= 3", "memory >= 1GB", "package <= 3MB"])


def test_a_prompt_of_its_own() -> None:
    short, at, again = (parse_budgets([f"ttft <= 300ms{end}"])[0] for end in ("", " @ 512", "@1,024 tokens"))
    assert (short.at_tokens, at.at_tokens, again.at_tokens) == (None, 512, 1024)
    assert (at.key, at.text) == ("time_to_first_token_seconds @ 512", "<= 300 ms @ 512")
    both = parse_budgets(["ttft <= 300ms @ 512", "ttft <= 100ms", "ttft <= 200ms @ 512"])
    assert [(b.key, b.limit) for b in both] == [
        ("time_to_first_token_seconds @ 512", 0.2), ("time_to_first_token_seconds", 0.1)]  # fmt: skip
    (named,) = parse_budgets({"time_to_first_token_ms": "<= 300 @ 512"})
    assert (named.limit, named.at_tokens) == (0.3, 512)


@pytest.mark.parametrize(
    ("line", "metric", "comparison", "limit"),
    [
        ("kl <= 0.05", "kl_nats_per_token", "<=", 0.05),
        ("kl 0.05 nats", "kl_nats_per_token", "<=", 0.05),
        ("bits_per_byte <= 1.1", "bits_per_byte", "<=", 1.1),
        ("nats_per_token <= 2", "nats_per_token", "<=", 2),
        ("top1_agreement >= 90%", "top1_agreement", ">=", 0.9),
        ("agreement >= 0.9", "top1_agreement", ">=", 0.9),
        ("task.sums.exact_match >= 0.8", "task.sums.exact_match", ">=", 0.8),
        ("task.sums-2.loss <= 1.5", "task.sums-2.loss", "<=", 1.5),
    ],
)
def test_quality(line: str, metric: str, comparison: str, limit: float) -> None:
    (budget,) = parse_budgets([line])
    assert (budget.metric, budget.comparison, budget.limit) == (metric, comparison, pytest.approx(limit))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kl >= 0.05", "good when low"),
        ("top1_agreement <= 0.9", "good when high"),
        ("kl <= 0.05 GB", "GB is no unit"),
        ("task.sums.exact_match 0.8", "only you know"),
        ("task.sums >= 0.8", "no metric"),
        ("kl <= 0.05 @ 512", "length of a prompt"),
    ],
)
def test_quality_that_cannot_be_meant(line: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_budgets([line])


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "budgets.yaml"
    file.write_text("- tokens_per_second >= 30\n- kl <= 0.1\n")
    assert len(parse_budgets(read_budgets(file))) == 2
    file.write_text("budgets: {memory: 1.5GB}\n")
    assert parse_budgets(read_budgets(file))[0].limit == 1.5e9
    for wrong in ("3\n", "[]\n", "- {a: b}\n"):
        file.write_text(wrong)
        with pytest.raises(RecipeError, match="needed a list of lines"):
            read_budgets(file)
    for place in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_budgets(place)


def test_a_file_that_says_a_budget_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("memory: 1GB\nmemory: 2GB\n")
    with pytest.raises(RecipeError, match="key 'memory' stands twice"):
        read_budgets(tmp_path / "b.yaml")
