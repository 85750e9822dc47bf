from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwindle.quantize.clipping import newton_clip, refined_clip
from dwindle.quantize.fake_quantize import (
    FakeInteger,
    FakePalette,
    fake_quantized,
    inside_cells,
    nearest_entries,
    power_of_two_unit,
    sum_by_entry,
)
from dwindle.quantize.integers import round_to_nearest
from dwindle.quantize.palettize import palettize
from dwindle.quantize.stand_in import StandIn
from dwindle.weights import AffineWeight, PalettizedWeight, QuantizedWeight
from tests.conftest import TINY_FAMILIES


def weight(seed: int = 0, outputs: int = 16, inputs: int = 64) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def with_rows(dense: Tensor) -> PalettizedWeight:
    rows = dense.abs().amax(1).half()
    plain = palettize(dense / rows.float()[:, None], 3, 8)
    return PalettizedWeight(plain.indices, plain.palettes, 3, 8, rows)


STARTS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "symmetric": lambda w: round_to_nearest(w, 4, 32),
    "one scale a row": lambda w: round_to_nearest(w, 3, 64),
    "balanced": lambda w: round_to_nearest(w, 2, 16, balanced=True),
    "asymmetric": lambda w: round_to_nearest(w, 3, 32, symmetric=False),
    "palettes": lambda w: palettize(w, 2, 8),
    "one bit": lambda w: palettize(w, 1, 16),
    "row scales": with_rows,
}


def codes(found: QuantizedWeight) -> Tensor:
    return found.codes if isinstance(found, AffineWeight) else found.indices


def disturbed(module: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("trained", [True, False])
def test_training_begins_at_the_start_and_ends_at_what_is_stored(name: str, trained: bool) -> None:
    dense = weight()
    start = STARTS[name](dense)
    module = fake_quantized(inside_cells(dense + 0.03 * weight(5), start) if trained else None, start)
    assert torch.equal(module(), start.dequantize())
    disturbed(module)
    stored = module.finish()
    assert stored.spec() == start.spec()
    assert torch.equal(module(), stored.dequantize())
    assert not torch.equal(stored.dequantize(), start.dequantize())


@pytest.mark.parametrize("name", STARTS)
def test_inside_cells_moves_only_the_weights_that_another_code_would_take(name: str) -> None:
    dense = weight()
    start = STARTS[name](dense)
    moved = inside_cells(dense, start)
    assert (moved - dense).abs().max() < 0.1 * dense.abs().max()
    far = inside_cells(-dense, start)
    assert torch.equal(fake_quantized(far, start)(), start.dequantize())


@pytest.mark.parametrize("balanced", [True, False])
def test_integer_gradients_are_exact_and_pass_through_to_the_weights_inside(balanced: bool) -> None:
    dense, outer = weight(), weight(2)
    start = round_to_nearest(dense, 2, 16, balanced=balanced)
    module = FakeInteger(dense, start)
    (module() * outer).sum().backward()
    scale = start.scales.float().requires_grad_()
    spread = scale.repeat_interleave(16, 1)
    ((start.codes.float() - start.centre) * spread * outer).sum().backward()
    assert module.f.grad is not None
    assert scale.grad is not None
    assert torch.allclose(module.f.grad.view_as(scale) / module.first.view_as(scale), scale.grad, atol=1e-5)
    steps = dense / spread.detach() + start.centre
    inside = (steps >= -0.5) & (steps <= 3.5)
    assert 0.5 < inside.float().mean() < 1
    assert module.latent is not None
    assert module.latent.grad is not None
    assert torch.allclose(module.latent.grad / module.unit, outer * inside, rtol=1e-5)


@pytest.mark.parametrize("name", STARTS)
def test_moving_tables_flip_no_code(name: str) -> None:
    dense = weight()
    start = STARTS[name](dense)
    module = fake_quantized(inside_cells(dense, start), start)
    before = codes(module.finish())
    with torch.no_grad():
        for parameter in {"f", "palettes", "rows"} & dict(module.named_parameters()).keys():
            module.get_parameter(parameter).mul_(1.5)
    assert torch.equal(codes(module.finish()), before)


def test_palette_gradients_are_exact_and_pass_through_to_the_weights() -> None:
    dense, outer = weight(), weight(2)
    start = with_rows(dense)
    module = FakePalette(inside_cells(dense, start), start)
    (module() * outer).sum().backward()
    palettes, rows = start.palettes.float().requires_grad_(), start.row_scales.float().requires_grad_()
    entries = start.indices.view(2, -1).long()
    (palettes.gather(1, entries).view(16, 64) * rows[:, None] * outer).sum().backward()
    assert torch.allclose(module.palettes.grad / module.unit, palettes.grad, atol=1e-5)
    assert torch.allclose(module.rows.grad / module.row_unit, rows.grad, atol=1e-5)
    assert torch.allclose(module.latent.grad / module.latent_unit, outer, rtol=1e-5)


def test_sum_by_entry_is_index_add() -> None:
    values, entries = weight(0, 3, 50), torch.randint(0, 8, (3, 50), generator=torch.Generator().manual_seed(0))
    for row, found in enumerate(sum_by_entry(values, entries, 8)):
        assert torch.allclose(found, torch.zeros(8).index_add(0, entries[row], values[row]), atol=1e-6)


def test_nearest_entries_are_the_nearest() -> None:
    values, palettes = weight(0, 2, 200), weight(1, 2, 8).sort(1).values
    brute = (values[:, :, None] - palettes[:, None, :]).abs().argmin(-1)
    assert torch.equal(nearest_entries(values, palettes), brute)


def test_units_are_powers_of_two_near_the_root_mean_square() -> None:
    assert power_of_two_unit(torch.zeros(3)) == 1.0
    assert power_of_two_unit(torch.full((4,), 0.3)) == 0.25


def test_values_and_codes_are_those_of_torchaos_fake_quantizer() -> None:
    qat = pytest.importorskip("torchao.quantization.qat")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    dense = weight(3).view(-1, 32)
    exponents = torch.arange(len(dense)) % 4 - 5
    dense = dense / dense.abs().amax(1, keepdim=True) * 7.5 * torch.exp2(exponents.float())[:, None]  # scales 2^e
    theirs = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int4, granularity.PerGroup(32), is_symmetric=True))
    expected = theirs(dense.view(16, 64))
    start = round_to_nearest(dense.view(16, 64), 4, 32, clip_candidates=1)
    clipped = AffineWeight(start.codes, theirs.scale.half().view_as(start.scales), None, 4, 32)  # max|W| / 7.5
    assert torch.equal(FakeInteger(dense.view(16, 64), clipped)(), expected)


def squared_error(groups: Tensor, clip: Tensor, bits: int, balanced: bool) -> Tensor:
    zero = 2 ** (bits - 1) - (0.5 if balanced else 0.0)
    scale = (clip / (2 ** (bits - 1) - (0 if balanced else 1)))[:, None]
    level = (groups / scale + zero).round().clamp(0, 2**bits - 1) - zero
    return (level * scale - groups).square().sum(1)


@pytest.mark.parametrize(("bits", "balanced", "newton_excess"), [(2, True, 1.07), (3, False, 1.05), (4, False, 1.02)])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_the_clip_is_the_best_of_a_fine_grid(bits: int, balanced: bool, newton_excess: float, shape: str) -> None:
    torch.manual_seed(0)
    groups = torch.randn(2, 20_000) if shape == "normal" else torch.distributions.Laplace(0.0, 1.0).sample((2, 20_000))
    qmax, zero = 2.0 ** (bits - 1) - (0 if balanced else 1), 2 ** (bits - 1) - (0.5 if balanced else 0.0)
    largest = groups.abs().amax(1)
    grid = torch.stack([squared_error(groups, largest * r, bits, balanced) for r in torch.linspace(0.02, 1, 100)])
    best = grid.amin(0)
    clip = newton_clip(groups, qmax)
    assert (squared_error(groups, clip, bits, balanced) <= newton_excess * best).all()
    refined = refined_clip(groups, clip, -zero, 2**bits - 1 - zero, qmax)
    assert (squared_error(groups, refined, bits, balanced) <= 1.005 * best).all()
    assert (squared_error(groups, refined, bits, balanced) <= squared_error(groups, clip, bits, balanced)).all()


def test_a_weighted_clip_follows_the_weights() -> None:
    torch.manual_seed(0)
    groups = torch.randn(1, 5000)
    inner = (groups.abs() < 1).float() + 1e-3
    assert newton_clip(groups, 7.0, inner) < newton_clip(groups, 7.0)
    assert torch.equal(newton_clip(groups, 7.0, torch.full_like(groups, 2.0)), newton_clip(groups, 7.0))
    assert newton_clip(torch.zeros(2, 5), 7.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_stand_in_computes_with_other_weights_and_leaves_the_model_alone(
    family: str, tiny_bundle: Callable[..., Any]
) -> None:
    bundle = tiny_bundle(family)
    before = {name: value.clone() for name, value in bundle.model.named_parameters()}
    names = [*bundle.anatomy.linear_names(), bundle.anatomy.embedding]
    starts = {n: round_to_nearest(bundle.model.get_submodule(n).weight, 4, bundle.model.get_submodule(n).weight.shape[1])
              for n in names}  # fmt: skip
    norm = f"{bundle.anatomy.final_norm}.weight"
    standin = StandIn(bundle.model, {n: fake_quantized(None, s) for n, s in starts.items()},
                      {norm: before[norm] * 2})  # fmt: skip
    ids = torch.arange(24).view(2, 12)
    ours = standin(input_ids=ids, use_cache=False).logits
    ours.sum().backward()
    assert all(p.grad is not None for p in standin.parameters())
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in bundle.model.named_parameters())
    with torch.no_grad():
        for name, start in starts.items():
            bundle.model.get_submodule(name).weight.copy_(start.dequantize())
        bundle.model.get_parameter(norm).mul_(2)
        assert torch.equal(ours, bundle.model(input_ids=ids, use_cache=False).logits)
