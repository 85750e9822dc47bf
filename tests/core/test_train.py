"""The loop in one process, against a plain oracle written here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dwindle.data_order import windows_of_step
from dwindle.errors import DataError, GateFailed, RecipeError
from dwindle.sharding import repeated_layers
from dwindle.train import NextToken, TrainLine, TrainOptions, train

sys.path.insert(0, str(Path(__file__).parent))
import tiny_training as tiny


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def oracle(options: TrainOptions, windows: int = 21) -> tuple[dict[str, Tensor], list[float]]:
    """The same training with nothing of ours but the order of the data, in fp64: no pieces, rates by hand."""
    model, ids = tiny.TinyModel().double(), tiny.tiny_tokens(windows).ids
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=options.betas, weight_decay=options.weight_decay, foreach=False,
    )  # fmt: skip
    losses, steps = [], options.steps or 0
    for step in range(steps):
        for group in optimizer.param_groups:
            fall = math.sqrt(max(0, step - 0.75 * steps) / (0.25 * steps))
            group["lr"] = options.learning_rate * min((step + 1) / (0.25 * steps), 1.0) * (1 - fall)
        batch = ids[windows_of_step(windows, options.batch_size, options.seed, step)]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        if options.clip_norm is not None and norm > options.clip_norm:
            for p in model.parameters():
                p.grad.mul_(options.clip_norm / (norm + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return weights(model), losses


@pytest.mark.parametrize("pieces", [1, 2, 8])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_pieces_equal_the_big_batch(pieces: int, clip_norm: float | None) -> None:
    options = TrainOptions(
        steps=16, batch_size=8, gradient_accumulation=pieces, warmup_share=0.25, decay_share=0.25, log_every=1,
        clip_norm=clip_norm, learning_rate=3e-3,
    )  # fmt: skip
    expected, losses = oracle(options)
    model = tiny.TinyModel().double()
    result = train(model, tiny.TinyLoss(), tiny.tiny_tokens(), options)
    assert [line.loss for line in result.history] == pytest.approx(losses, abs=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-9, rtol=0)


def test_it_learns_and_says_so() -> None:
    lines: list[TrainLine] = []
    options = replace(tiny.OPTIONS, steps=80, log_every=20, precision="fp32")
    result = train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, on_step=lines.append)
    assert result.steps == 80
    assert result.tokens == 80 * 8 * tiny.TOKENS
    assert len(lines) == 80
    assert result.first_loss == lines[0].loss
    assert result.last_loss == pytest.approx(sum(line.loss for line in lines[-20:]) / 20)
    assert result.last_loss < 0.8 * result.first_loss
    assert [line.step for line in result.history] == [20, 40, 60, 80]
    assert result.history[0].parts["twice"] == pytest.approx(2 * result.history[0].loss)
    assert result.seconds > 0
    assert result.history[0].tokens_per_second > 0


def test_bf16_trains_nearly_alike_and_keeps_fp32_weights() -> None:
    options = replace(tiny.OPTIONS, steps=40)
    exact = train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options)
    model = tiny.TinyModel()
    rough = train(model, tiny.TinyLoss(), tiny.tiny_tokens(), replace(options, precision="bf16"))
    assert rough.last_loss == pytest.approx(exact.last_loss, rel=0.02)
    assert rough.last_loss != exact.last_loss
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_frozen_weights_stay_and_are_not_stored(tmp_path: Path) -> None:
    model = tiny.TinyModel()
    model.layers.requires_grad_(False)
    model.register_buffer("codes", torch.zeros(4, dtype=torch.uint8))
    before = weights(model)
    train(model, tiny.TinyLoss(), tiny.tiny_tokens(), tiny.OPTIONS, folder=tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("layers."), name
    index = (tmp_path / "checkpoints" / "step-00000012" / ".metadata").read_bytes()
    assert b"buffer/calls" in index
    assert b"buffer/codes" not in index
    assert b"layers.0.mix" not in index


def test_the_callers_state_is_left_alone() -> None:
    model = tiny.TinyModel().eval()
    model.norm.train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train(model, tiny.TinyLoss(), tiny.tiny_tokens(), tiny.OPTIONS)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in (model, model.layers, model.norm)] == [False, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_norms_and_biases_do_not_decay() -> None:
    class Nothing:
        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
            return 0.0 * model(batch).sum(), {}

    model = tiny.TinyModel()
    before = weights(model)
    options = TrainOptions(steps=1, batch_size=1, learning_rate=0.1, weight_decay=0.5, decay_share=0.0)
    train(model, Nothing(), tiny.tiny_tokens(), options)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(bad: float, tmp_path: Path) -> None:
    class Diverging(tiny.TinyLoss):
        steps = 0

        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
            self.steps += 1
            loss, parts = super().loss(model, batch)
            return (loss * bad if self.steps > 6 else loss), parts

    model = tiny.TinyModel()
    options = replace(tiny.OPTIONS, gradient_accumulation=1)
    with pytest.raises(GateFailed, match=r"step 7 of 12 has loss (nan|inf) and gradient norm nan.*Lower learning_rate"):
        train(model, Diverging(), tiny.tiny_tokens(), options, folder=tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    resumed = train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path)
    assert resumed.steps == 12


def test_the_log_is_plain_json_lines(tmp_path: Path) -> None:
    train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), replace(tiny.OPTIONS, log_every=5), folder=tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert list(lines[0]) == [
        "step", "tokens", "loss", "parts", "learning_rate", "grad_norm", "tokens_per_second", "seconds",
    ]  # fmt: skip


def test_only_training_tokens_are_accepted() -> None:
    tokens = replace(tiny.tiny_tokens(), role="calibration")
    with pytest.raises(DataError, match="has the role 'calibration', but 'train' is needed"):
        train(tiny.TinyModel(), tiny.TinyLoss(), tokens, tiny.OPTIONS)


@pytest.mark.parametrize("shape", [(0, 12), (4, 1), (12,)])
def test_a_token_set_without_a_prediction_is_refused(shape: tuple[int, ...]) -> None:
    tokens = replace(tiny.tiny_tokens(), ids=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(DataError, match=r"tiny.txt: the token set has the shape .*at least one window of at least 2"):
        train(tiny.TinyModel(), tiny.TinyLoss(), tokens, tiny.OPTIONS)


def test_the_repeated_layers_are_the_longest_outermost_list() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(2, 2)])
    model.body = nn.Module()
    model.body.layers = nn.ModuleList([nn.Sequential(inner), nn.Linear(2, 2)])
    assert repeated_layers(model) == list(model.body.layers)
    assert repeated_layers(nn.Linear(2, 2)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_as_a_cpu_does(precision: Literal["fp32", "bf16"], tmp_path: Path) -> None:
    options = replace(tiny.OPTIONS, precision=precision)
    expected = train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options)
    model = tiny.TinyModel().cuda()
    with pytest.raises(tiny.Interrupted):
        train(model, tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path, on_step=tiny.interrupt_at(7))
    found = train(tiny.TinyModel().cuda(), tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path)
    assert found.last_loss == pytest.approx(expected.last_loss, abs=1e-4 if precision == "fp32" else 5e-2)


def test_a_model_without_trainable_weights_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no trainable weights\. Unfreeze some"):
        train(tiny.TinyModel().requires_grad_(False), tiny.TinyLoss(), tiny.tiny_tokens(), tiny.OPTIONS)


def test_next_token_is_the_models_own_loss(tiny_bundle) -> None:  # type: ignore[no-untyped-def]
    model = tiny_bundle("llama").model
    batch = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    loss, parts = NextToken().loss(model, batch)
    assert loss.item() == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), abs=1e-5)
    assert parts == {}


def test_a_loss_that_runs_away_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    class Climbing(tiny.TinyLoss):
        steps = 0

        def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
            self.steps += 1
            loss, parts = super().loss(model, batch)
            return loss + max(0, self.steps - 4) * 5.0, parts

    options = replace(tiny.OPTIONS, gradient_accumulation=1, log_every=2, checkpoint_every=3, divergence_margin=2.5)
    with pytest.raises(GateFailed, match=r"diverges. Steps 5 to 6 have a mean loss of .* divergence_margin=2.5"):
        train(tiny.TinyModel(), Climbing(), tiny.tiny_tokens(), options, folder=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path).steps == 12
    free = replace(options, divergence_margin=None)
    assert train(tiny.TinyModel(), Climbing(), tiny.tiny_tokens(), free).steps == 12


def test_ctrl_c_in_a_checkpoint_is_ctrl_c_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch wraps whatever ends its writing; wrapped, the command would end with 1 in place of 130."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    options, write, written = replace(tiny.OPTIONS, checkpoint_every=3), FileSystemWriter.write_data, []

    def second_is_cut_off(*given: Any) -> Any:
        written.append(given)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(FileSystemWriter, "write_data", second_is_cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(tiny.TinyModel(), tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path).steps == 12


def test_activation_checkpointing_gives_the_same_bits_and_keeps_less() -> None:
    def run(on: bool) -> tuple[dict[str, Tensor], int, nn.Module]:
        model, kept = tiny.TinyModel(dropout=0.3), 0

        class Counting(tiny.TinyLoss):
            def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Mapping[str, float]]:
                nonlocal kept
                total = 0

                def pack(saved: Tensor) -> Tensor:
                    nonlocal total
                    total += saved.numel()
                    return saved

                with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                    found = super().loss(model, batch)
                kept = total
                return found

        train(model, Counting(), tiny.tiny_tokens(), replace(tiny.OPTIONS, activation_checkpointing=on))
        return weights(model), kept, model

    (plain, plain_kept, _), (again, again_kept, model) = run(False), run(True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert again_kept < plain_kept
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_evaluations_stand_in_the_log_and_change_nothing(tmp_path: Path) -> None:
    modes = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled(), step))
        torch.rand(3)
        return {"nats_per_token": float(len(modes))}

    options = replace(tiny.OPTIONS, log_every=2, evaluate_every=5)
    plain, watched = tiny.TinyModel(dropout=0.1), tiny.TinyModel(dropout=0.1)
    train(plain, tiny.TinyLoss(), tiny.tiny_tokens(), options)
    result = train(watched, tiny.TinyLoss(), tiny.tiny_tokens(), options, folder=tmp_path, evaluate=evaluate)
    found = {line.step: line.parts.get("evaluation_nats_per_token") for line in result.history}
    assert found == {2: None, 4: None, 6: 1.0, 8: None, 10: 2.0, 12: 3.0}
    assert modes == [(False, False, step) for step in (6, 10, 12)]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
