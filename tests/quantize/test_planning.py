"""From a target to a plan, with and without a text, in memory and from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dwindle.bundle import ModelBundle
from dwindle.errors import RecipeError
from dwindle.quantize import BitPlan, QuantizeOptions, plan, plan_folder, run, run_folder
from dwindle.quantize import planning as room
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

BIG_ROWS = {"hidden_size": 64, "intermediate_size": 96}


def text(bundle: ModelBundle, windows: int = 16, role: str = "calibration") -> TokenSet:
    ids = torch.randint(0, 256, (windows, 16), generator=torch.Generator().manual_seed(1))
    return TokenSet(ids=ids, role=role, source="drawn", sha256="0" * 64, text_bytes=ids.numel(),  # type: ignore[arg-type]
                    tokenizer_sha256=encoding_sha256(bundle.tokenizer))  # fmt: skip


@pytest.fixture
def bundle(tiny_bundle: Any) -> ModelBundle:
    made: ModelBundle = tiny_bundle("llama", **BIG_ROWS)
    return made


@pytest.mark.parametrize(("scheme", "asked"), [("palettize", 3.5), ("integer", 4.0)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_target_is_kept_and_used(bundle: ModelBundle, scheme: str, asked: float, calibrated: bool) -> None:
    options = QuantizeOptions(scheme=scheme, target_bits_per_weight=asked)  # type: ignore[arg-type]
    found = plan(bundle, options, text(bundle) if calibrated else None)
    assert asked - 0.6 < found.linear_bits_per_weight <= asked
    assert len({layer.format.bits for layer in found.layers}) > 1
    assert (found.grade, found.measured_kl is not None) == (("kl", True) if calibrated else ("error", False))
    packed, record = run(bundle, options, text(bundle) if calibrated else None, plan=found)
    assert record.after.bits_per_weight_linear == pytest.approx(found.linear_bits_per_weight)
    assert packed.size().bytes == found.model_bytes


def test_a_byte_target_counts_everything(bundle: ModelBundle) -> None:
    whole = run(bundle, QuantizeOptions(bits=4))[0].size().bytes
    options = QuantizeOptions(target_bytes=whole - 100)
    packed, _ = run(bundle, options)
    assert whole - 1500 < packed.size().bytes <= whole - 100


def test_an_unreachable_target_names_the_nearest(bundle: ModelBundle) -> None:
    with pytest.raises(RecipeError, match=r"no allocation reaches target_bits_per_weight=0\.5.*the least is"):
        plan(bundle, QuantizeOptions(target_bits_per_weight=0.5))


def test_a_target_that_asks_for_nothing_is_said(bundle: ModelBundle) -> None:
    found = plan(bundle, QuantizeOptions(target_bits_per_weight=12.0))
    assert any("asks for nothing" in note for note in found.notes)
    assert {layer.format.bits for layer in found.layers} == {8}


def test_allowed_bits_are_kept(bundle: ModelBundle) -> None:
    found = plan(bundle, QuantizeOptions(target_bits_per_weight=3.5, allowed_bits=(2, 6)))
    assert {layer.format.bits for layer in found.layers} == {2, 6}


@pytest.mark.parametrize(("scheme", "target"), [("integer", 8.2), ("palettize", 8.6)])
def test_widths_whose_tables_pass_the_target_are_not_all_that_is_tried(
    bundle: ModelBundle, scheme: Any, target: float
) -> None:
    found = plan(bundle, QuantizeOptions(scheme=scheme, target_bits_per_weight=target))
    assert found.linear_bits_per_weight <= target
    assert {layer.format.bits for layer in found.layers} - {8}


def test_nothing_left_to_plan_is_refused(bundle: ModelBundle) -> None:
    for target in (3.5, None):
        with pytest.raises(RecipeError, match="keeps every linear float"):
            plan(bundle, QuantizeOptions(target_bits_per_weight=target, keep_float=("model.layers.*",)))


def test_large_models_are_planned_by_second_order(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MEASURED_WEIGHTS", 0)
    found = plan(bundle, QuantizeOptions(target_bits_per_weight=3.5), text(bundle))
    assert (found.grade, found.measured_kl) == ("fisher", None)
    assert found.predicted_kl is not None
    assert found.predicted_kl > 0


def test_a_folder_is_planned_and_coded_like_the_model_in_memory(bundle: ModelBundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "model")
    stored = ModelBundle.load(tmp_path / "model")
    for options, calibration in [
        (QuantizeOptions(target_bits_per_weight=3.5), None),
        (QuantizeOptions(scheme="integer", target_bits_per_weight=4.0, method="gptq"), text(stored)),
        (QuantizeOptions(bits=2, method="learned", scope="block", iterations=5), text(stored)),
    ]:
        in_memory, told = plan(stored, options, calibration), plan_folder(tmp_path / "model", options, calibration)
        assert in_memory.to_json() == told.to_json()
        place = tmp_path / f"packed-{options.scheme}-{options.method}"
        record = run_folder(tmp_path / "model", place, options, calibration)
        packed, same = run(stored, options, calibration)
        assert ModelBundle.load(place).content_sha256 == packed.content_sha256
        assert (record.before, record.after) == (same.before, same.after)
        for one, other in zip(record.details["layers"], same.details["layers"], strict=True):
            assert one.pop("relative_mse") == pytest.approx(other.pop("relative_mse"), rel=1e-5)  # float32 sums
            assert one == other


@pytest.mark.parametrize("values", [{"method": "learned"}, {"method": "qat"}, {"tune_steps": 3}], ids=str)
def test_a_folder_refuses_what_needs_the_whole_model(
    bundle: ModelBundle, tmp_path: Path, values: dict[str, Any]
) -> None:
    bundle.save(tmp_path / "model")
    with pytest.raises(RecipeError, match="needs the whole model in memory"):
        run_folder(tmp_path / "model", tmp_path / "out", QuantizeOptions(**values), text(bundle))
    assert not (tmp_path / "out").exists()


def test_a_plan_is_applied_as_it_is(bundle: ModelBundle, tmp_path: Path) -> None:
    options = QuantizeOptions(target_bits_per_weight=3.5)
    made = plan(bundle, options)
    made.write(tmp_path / "bits.json")
    from dwindle.quantize.layer_plan import ModelShapes, plan_layers

    known = ModelShapes.of(bundle)
    read = BitPlan.read(
        tmp_path / "bits.json", plan_layers(bundle, options), known.shapes, set(bundle.anatomy.linear_names())
    )
    assert read.formats == made.formats
    assert run(bundle, options, plan=read)[0].content_sha256 == run(bundle, options)[0].content_sha256


def test_the_text_must_be_for_calibration(bundle: ModelBundle) -> None:
    from dwindle.errors import DataError

    with pytest.raises(DataError):
        run(bundle, QuantizeOptions(), text(bundle, role="evaluation"))
