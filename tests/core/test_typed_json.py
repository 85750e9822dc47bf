"""Values of another type than their field declares are named, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from dwindle.typed_json import require_types


@dataclass(frozen=True)
class Inner:
    count: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float = 0.5
    whole: bool = True
    maybe: int | None = None
    many: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner(1)
    table: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    free: Any = None


def test_declared_types_pass() -> None:
    require_types(Outer("a", 1, False, 3, [1, 2], (2, "b"), "b", Inner(2), {"x": 1}, ({"y": []},), object()))
    require_types(Outer("a"))


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        ("name", 1), ("name", None), ("share", "1"), ("share", True), ("share", float("nan")), ("share", 10**30),
        ("whole", 1), ("maybe", 1.5), ("maybe", True), ("many", 5), ("many", [1, "a"]), ("pair", [1]),
        ("pair", [1, 2]), ("kind", "c"), ("kind", []), ("inner", {"count": 1}), ("inner", Inner("x")),  # type: ignore[arg-type]
        ("table", []), ("table", {"x": "y"}), ("table", {1: 1.0}), ("rows", ({1: 2},)), ("rows", "ab"),
    ],
)  # fmt: skip
def test_others_are_named(field_name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Outer\.{field_name} is ") as caught:
        require_types(Outer(**{"name": "a", field_name: value}))
    assert str(caught.value).count("Outer.") == 1


def test_all_are_named_up_to_eight() -> None:
    wrong = Outer(1, "a", 1, "a", 1, 1, 1, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Outer\.name is 1; Outer\.share is 'a'.* and 1 more$"):
        require_types(wrong)
