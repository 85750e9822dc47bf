"""What may be asked for, and the refusal of everything that may not, all at once."""

from __future__ import annotations

from typing import Any

import pytest

from dwindle.errors import RecipeError
from dwindle.quantize import QuantizeOptions
from dwindle.quantize.options import METHODS


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scheme": "magic"}, "scheme='magic' (needed: palettize or integer)"),
        ({"bits": 5}, "bits=5 (needed with palettize: 1, 2, 3, 4, 6, 8)"),
        ({"scheme": "integer", "bits": 6}, "bits=6 (needed with integer: 2, 3, 4, 8)"),
        ({"allowed_bits": (2, 5)}, "allowed_bits=[2, 5]"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "channel"}, "group_size='channel'"),
        ({"symmetric": False}, "palettes have no zero points"),
        ({"scheme": "integer", "row_scales": True}, "integers have scales of their own"),
        ({"embedding_scheme": "zip"}, "embedding_scheme='zip'"),
        ({"embedding_bits": 5}, "embedding_bits=5 (needed: 2, 3, 4, 8"),
        ({"embedding_scheme": "palettize", "embedding_bits": 5}, "embedding_bits=5 (needed: 1, 2, 3, 4, 6, 8"),
        ({"histogram_bins": 5000}, "histogram_bins=5000"),
        ({"target_bits_per_weight": 0.0}, "target_bits_per_weight=0.0"),
        ({"target_bytes": 0}, "target_bytes=0"),
        ({"target_bits_per_weight": 3.5, "target_bytes": 10}, "needed: one of the two"),
        ({"method": "gptq"}, "method='gptq' (needed with palettize: kmeans, lnq, learned, qat)"),
        ({"scheme": "integer", "method": "lnq"}, "needed with integer: rtn, hqq, gptq, awq, learned, qat"),
        ({"importance": "luck"}, "importance='luck'"),
        ({"iterations": 0}, "iterations=0"),
        ({"scope": "layer"}, "scope='layer' (needed: model or block)"),
        ({"scope": "block", "guided": True}, "scope=block with guided=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"tune_steps": -1}, "tune_steps=-1"),
        ({"own_windows": -1}, "own_windows=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
    ids=str,
)
def test_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        QuantizeOptions(**values)
    assert said in str(error.value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        QuantizeOptions(bits=7, embedding_bits=5, method="magic", batch_size=0)
    assert all(f"{name}=" in str(error.value) for name in ("bits", "embedding_bits", "method", "batch_size"))


def test_the_default_method_follows_the_calibration_text() -> None:
    for scheme, (without, with_text) in {"palettize": ("kmeans", "lnq"), "integer": ("rtn", "gptq")}.items():
        options = QuantizeOptions(scheme=scheme)  # type: ignore[arg-type]
        assert (options.method_used(False), options.method_used(True)) == (without, with_text)
    for scheme, methods in METHODS.items():
        for method in methods:
            options = QuantizeOptions(scheme=scheme, method=method)  # type: ignore[arg-type]
            assert options.method_used(True) == method


def test_one_name_or_many_may_be_given() -> None:
    options = QuantizeOptions(keep_float="lm_head", runtimes="coreml", allowed_bits=(4, 2, 2))  # type: ignore[arg-type]
    assert (options.keep_float, options.runtimes, options.allowed_bits) == (("lm_head",), ("coreml",), (2, 4))
    assert not options.mixed
    assert QuantizeOptions(target_bytes=10).mixed
