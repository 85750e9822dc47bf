from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dwindle.anatomy import module
from dwindle.bundle import ModelBundle
from dwindle.divergence import forward_kl
from dwindle.errors import DataError, RecipeError
from dwindle.prune.mask_options import MaskOptions, MaskSchedule
from dwindle.prune.masked_model import AxisMasks, MaskAxis, MaskedModel
from dwindle.prune.masks import UnmaskedTeacher, learn_masks, train_masks
from dwindle.prune.options import PruneOptions
from dwindle.prune.planning import plan_from_scores
from dwindle.prune.scores import AxisScores, activation_scores, magnitude_scores
from dwindle.prune.surgery import apply
from dwindle.token_set import TokenSet
from dwindle.tokenization import encoding_sha256

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"]
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))
QUICK = MaskOptions(steps=6, batch_size=4)

Factory = Callable[..., Any]


def tokens_of(bundle: Any, windows: int = 24, tokens: int = 17, role: Any = "train") -> TokenSet:
    ids = torch.randint(0, 256, (windows, tokens), generator=torch.Generator().manual_seed(9))
    return TokenSet(ids, role, "random", "0", 1, encoding_sha256(bundle.tokenizer))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(bundle: Any, kept: int, axis: MaskAxis = "ffn", options: MaskOptions = QUICK) -> MaskedModel:
    """A masked model with random scores."""
    n = 64 if axis == "ffn" else bundle.anatomy.kv_heads
    masks = AxisMasks(normal(bundle.anatomy.layers, n), MaskSchedule(n, kept, 6, options))
    return MaskedModel(bundle.model, bundle.anatomy, {axis: masks}).eval()


def cut(bundle: Any, scores: AxisScores, **shares: float) -> Any:
    """The pruned model, uncompensated."""
    return apply(bundle, plan_from_scores(bundle, PruneOptions(multiple=1, **shares), scores))


def state_of(bundle: Any) -> dict[str, Any]:
    model = bundle.model
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "training": model.training,
        "hooks": sum(len(m._forward_pre_hooks) for m in model.modules()),
        "gradients": sum(p.grad is not None for p in model.parameters()),
    }


def assert_untouched(bundle: Any, before: dict[str, Any]) -> None:
    after = state_of(bundle)
    weights = before.pop("weights")
    assert all(torch.equal(p, weights[name]) for name, p in after.pop("weights").items())
    assert after == before


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_masks_are_the_pruned_model(tiny_bundle: Factory, family: str) -> None:
    bundle = tiny_bundle(family)
    model = masked(bundle, 24)
    scores = AxisScores(ffn=list(model.masks()["ffn"].double()))
    pruned = cut(bundle, scores, ffn_keep=24 / 64)
    assert pruned.config.intermediate_size == 24
    assert torch.allclose(logits_of(model), logits_of(pruned), atol=1e-5)
    assert not torch.allclose(logits_of(model), logits_of(bundle.model), atol=1e-2)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])  # its query norm sees what is cut
def test_hard_masks_of_groups_are_the_pruned_model(tiny_bundle: Factory, family: str) -> None:
    bundle = tiny_bundle(family, num_attention_heads=8, num_key_value_heads=4)
    model = masked(bundle, 2, "kv_groups")
    scores = AxisScores(groups=list(model.masks()["kv_groups"].double()))
    pruned = cut(bundle, scores, heads_keep=0.5)
    assert torch.allclose(logits_of(model), logits_of(pruned), atol=1e-5)
    assert not torch.allclose(logits_of(model), logits_of(bundle.model), atol=1e-2)


def test_soft_masks_reach_the_units_and_only_their_scores_get_gradients(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    before = state_of(bundle)
    model = masked(bundle, 32).train()
    masks = model.masks()["ffn"]
    assert torch.allclose(masks.sum(1), torch.tensor([32.0, 32.0]))  # a warm-up of one step
    loss, _ = UnmaskedTeacher(bundle).loss(model, IDS)
    loss.backward()
    ((name, scores),) = model.named_parameters()
    assert name == "axes.ffn.scores"
    assert scores.grad is not None
    assert (scores.grad.abs().sum(1) > 0).all()
    assert_untouched(bundle, before)
    # Masks of ones change nothing.
    everything = MaskedModel(
        bundle.model, bundle.anatomy, {"ffn": AxisMasks(normal(2, 64), MaskSchedule(64, 64, 6, QUICK))}
    )
    assert torch.equal(logits_of(everything), logits_of(bundle.model))
    assert torch.allclose(logits_of(everything.train()), logits_of(bundle.model), atol=1e-6)


def test_the_schedules_follow_the_optimizer_steps(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    options = MaskOptions(steps=10, gradient_accumulation=2, first_temperature=1.0, last_temperature=1e-3)
    schedule = MaskSchedule(64, 16, 10, options)
    model = MaskedModel(bundle.model, bundle.anatomy, {"ffn": AxisMasks(normal(2, 64), schedule)}).train()
    sums = []
    for step in (0, 0, 1, 1, 2, 2):
        UnmaskedTeacher(bundle).at(step, 10).loss(model, IDS)
        sums.append(model.masks()["ffn"][0].sum().item())
    assert sums == pytest.approx([40, 40, 16, 16, 16, 16], abs=1e-4)
    assert schedule.temperature_at(9) == schedule.temperature_at(10) == pytest.approx(1e-3)


def test_a_batch_cut_into_more_pieces_has_the_masks_of_its_step(
    tiny_bundle: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle()
    options = MaskOptions(steps=4, batch_size=4, log_every=1)
    whole = train_masks(bundle, {"ffn": 0.5}, tokens_of(bundle), options)
    calls = []

    def short_of_memory(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(len(student))
        if len(calls) == 2:  # in the second step
            raise torch.OutOfMemoryError("out of memory")
        return forward_kl(student, teacher)

    monkeypatch.setattr("dwindle.prune.masks.forward_kl", short_of_memory)
    cut = train_masks(bundle, {"ffn": 0.5}, tokens_of(bundle), options)
    assert len(calls) == 2 + 3 * 2
    losses = [[line.loss for line in one.training.history] for one in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch.allclose(whole.scores["ffn"][0], cut.scores["ffn"][0], atol=1e-4)


def test_the_size_of_the_scores_does_not_matter() -> None:
    schedule = MaskSchedule(64, 20, 4, MaskOptions())
    start = normal(3, 64)
    masks = AxisMasks(start, schedule).soft(2)
    # Up to the constant in the root of the norm.
    assert torch.allclose(AxisMasks(50 * start + 7, schedule).soft(2), masks, atol=0.01)
    assert torch.allclose(AxisMasks(start, schedule, unit=8.0).soft(2), masks, atol=1e-6)
    assert torch.allclose(AxisMasks(torch.zeros(3, 64), schedule).soft(2), torch.tensor(20 / 64), atol=1e-6)
    assert AxisMasks(torch.zeros(3, 64), schedule).kept().tolist() == [list(range(20))] * 3


def misleading(tiny_bundle: Factory) -> tuple[Any, set[int]]:
    """A model in which every second unit is loud and read by nothing."""
    bundle = tiny_bundle()
    loud = set(range(0, 64, 2))
    with torch.no_grad():
        for layer in range(2):
            parts = bundle.anatomy.parts(layer)
            module(bundle.model, parts["up"]).weight[sorted(loud)] *= 30
            module(bundle.model, parts["down"]).weight[:, sorted(loud)] = 0
    return bundle, loud


def test_units_that_nothing_reads_are_found(tiny_bundle: Factory) -> None:
    bundle, loud = misleading(tiny_bundle)
    tokens = tokens_of(bundle)
    before = state_of(bundle)
    lines: list[int] = []
    options = MaskOptions(
        steps=60, batch_size=8, learning_rate=0.3, first_temperature=8.0, last_temperature=0.2, log_every=1
    )
    found = train_masks(bundle, {"ffn": 0.5}, tokens, options, on_step=lambda line: lines.append(line.step))
    assert_untouched(bundle, before)
    assert lines == list(range(1, 61))
    for layer, units in enumerate(found.units["ffn"]):
        assert units.tolist() == [u for u in range(64) if u not in loud]
        mask = found.scores["ffn"][layer]
        assert float(mask.sum()) == pytest.approx(32)
        assert set(mask.topk(32).indices.tolist()) == set(units.tolist())
    assert found.model is None
    pruned = cut(bundle, AxisScores(ffn=found.scores["ffn"]), ffn_keep=0.5)
    assert torch.allclose(logits_of(pruned), logits_of(bundle.model), atol=1e-4)
    start = activation_scores(bundle, tokens_of(bundle, tokens=16, role="calibration"))
    assert set(start[0].topk(32).indices.tolist()) == loud
    ones = learn_masks(bundle, 0.5, tokens, options)
    assert [units.tolist() for units in ones] == [units.tolist() for units in found.units["ffn"]]


def test_both_axes_learn_together_and_alike_every_time(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle("qwen3", num_attention_heads=8, num_key_value_heads=4)
    found = [
        train_masks(bundle, {"ffn": 0.4, "kv_groups": 0.5}, tokens_of(bundle, role="calibration"), QUICK)
        for _ in range(2)
    ]
    assert [len(units) for units in found[0].units["ffn"]] == [26, 26]
    assert [len(units) for units in found[0].units["kv_groups"]] == [2, 2]
    for axis in ("ffn", "kv_groups"):
        for one, two in zip(found[0].scores[axis], found[1].scores[axis], strict=True):
            assert torch.equal(one, two)
    scores = AxisScores(ffn=found[0].scores["ffn"], groups=found[0].scores["kv_groups"])
    keep = plan_from_scores(bundle, PruneOptions(ffn_keep=26 / 64, heads_keep=0.5, multiple=1), scores)
    assert keep.ffn_units == tuple(tuple(units.tolist()) for units in found[0].units["ffn"])
    assert keep.kv_groups == tuple(tuple(units.tolist()) for units in found[0].units["kv_groups"])


@pytest.mark.parametrize("weight_rate", [None, 1e-3])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_bundle: Factory, tmp_path: Path, weight_rate: float | None
) -> None:
    bundle = tiny_bundle()
    options = MaskOptions(
        steps=10, batch_size=4, gradient_accumulation=2, checkpoint_every=3, weight_rate=weight_rate
    )  # fmt: skip
    whole = train_masks(bundle, {"ffn": 0.5}, tokens_of(bundle), options)

    def stop(line: Any) -> None:
        if line.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_masks(bundle, {"ffn": 0.5}, tokens_of(bundle), options, folder=tmp_path, on_step=stop)
    resumed = train_masks(bundle, {"ffn": 0.5}, tokens_of(bundle), options, folder=tmp_path)
    assert all(map(torch.equal, resumed.scores["ffn"], whole.scores["ffn"]))
    if whole.model is not None:
        assert torch.equal(logits_of(resumed.model), logits_of(whole.model))
    assert [line.loss for line in resumed.training.history] == [line.loss for line in whole.training.history]
    with pytest.raises(RecipeError, match="another run"):
        train_masks(bundle, {"ffn": 0.4}, tokens_of(bundle), options, folder=tmp_path)


def test_weights_learn_along_in_a_copy(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    before = state_of(bundle)
    tokens = tokens_of(bundle)
    still = MaskOptions(steps=30, batch_size=8)
    joint = MaskOptions(steps=30, batch_size=8, weight_rate=3e-3)
    assert joint.training.learning_rate == 3e-3
    found = train_masks(bundle, {"ffn": 0.5}, tokens, joint)
    assert_untouched(bundle, before)
    assert found.model is not None
    assert not found.model.training
    copied = bundle.derive(found.model, "prune", {}, {})
    losses = []
    for source, learned in ((copied, found), (bundle, train_masks(bundle, {"ffn": 0.5}, tokens, still))):
        pruned = cut(source, AxisScores(ffn=learned.scores["ffn"]), ffn_keep=0.5)
        with torch.no_grad():
            ids = tokens.ids[:, :-1]
            losses.append(forward_kl(pruned(ids).logits.flatten(0, 1), bundle.model(ids).logits.flatten(0, 1)).item())
    assert losses[0] < losses[1]


def test_given_scores_are_the_start(tiny_bundle: Factory) -> None:
    bundle = tiny_bundle()
    start = [torch.arange(64.0) ** 4, -torch.arange(64.0)]
    still = MaskOptions(steps=2, batch_size=4, learning_rate=1e-9)
    units = learn_masks(bundle, 0.25, tokens_of(bundle), still, start=start)
    assert [u.tolist() for u in units] == [list(range(48, 64)), list(range(16))]
    ties = learn_masks(bundle, 0.25, tokens_of(bundle), still, start=[torch.zeros(64)] * 2)
    assert ties[0].tolist() == list(range(16))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"ffn": 1.0}, r"ffn=1.0 of 64 leaves nothing"),
        ({"ffn": 0.0, "kv_groups": 0.2}, r"ffn=0.0 of 64, kv_groups=0.2 of 2"),
        ({"ffn": 1.5}, r"ffn=1.5"),
        ({}, "no axis"),
    ],
)
def test_shares_that_cannot_be_meant(tiny_bundle: Factory, keep: Any, message: str) -> None:
    bundle = tiny_bundle()
    with pytest.raises(RecipeError, match=message):
        train_masks(bundle, keep, tokens_of(bundle), QUICK)


def test_what_does_not_fit_the_model_is_refused(tiny_bundle: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    tokens = tokens_of(bundle)
    with pytest.raises(DataError, match="role is 'evaluation'"):
        learn_masks(bundle, 0.5, tokens_of(bundle, role="evaluation"), QUICK)
    with pytest.raises(DataError, match="context is 64"):
        learn_masks(bundle, 0.5, tokens_of(bundle, tokens=66), QUICK)
    with pytest.raises(RecipeError, match=r"ffn of shapes \(64,\) \(needed: 2 of \(64,\)\)"):
        learn_masks(bundle, 0.5, tokens, QUICK, start=[torch.ones(64)])
    with pytest.raises(RecipeError, match="train_masks"):
        learn_masks(bundle, 0.5, tokens, MaskOptions(weight_rate=1e-3))
    with monkeypatch.context() as patched:
        patched.setattr(ModelBundle, "quantized", property(lambda _: True))
        with pytest.raises(RecipeError, match="Prune first, then quantize"):
            learn_masks(bundle, 0.5, tokens, QUICK)
    bundle.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="another tokenizer"):
        learn_masks(bundle, 0.5, tokens, QUICK)


def test_bad_options_are_named_at_once() -> None:
    with pytest.raises(RecipeError, match=r"weight_rate=0.*masks_warmup_share=2.*last_temperature=9"):
        MaskOptions(weight_rate=0, masks_warmup_share=2, last_temperature=9)
    with pytest.raises(RecipeError, match=r"steps=0"):
        MaskOptions(steps=0)


@pytest.mark.slow
def test_learned_masks_beat_magnitude_on_the_embedded_teacher() -> None:
    from dwindle.data.document import Document
    from dwindle.data.packing import pack
    from dwindle.measure import Meter
    from dwindle.starter import TEACHER, corpus

    bundle = ModelBundle.load(TEACHER)
    documents = [Document(text, "story world") for text in corpus(0, 160)]
    tokens = pack(documents[:-20], bundle.tokenizer, role="train", context=128, seed=0)
    held = pack(documents[-20:], bundle.tokenizer, role="train", context=128, seed=0)
    text = TokenSet(held.ids[:16].reshape(1, -1), "evaluation", "held", "1", 1, held.tokenizer_sha256)
    learned = train_masks(bundle, {"ffn": 0.5}, tokens, MaskOptions(steps=24, batch_size=4))
    sample = TokenSet(tokens.ids[:32, :128], "calibration", "sample", "2", 1, tokens.tokenizer_sha256)
    nats = {}
    for name, scores in {
        "learned": list(learned.scores["ffn"]),
        "activation": activation_scores(bundle, sample),
        "magnitude": magnitude_scores(bundle),
    }.items():
        pruned = cut(bundle, AxisScores(ffn=scores), ffn_keep=0.5)
        measured = Meter(text, context=128).measure(bundle.derive(pruned, "prune", {}, {}))
        assert measured.nats_per_token is not None
        nats[name] = measured.nats_per_token
    assert nats["learned"] < nats["activation"], nats
    assert nats["learned"] < nats["magnitude"], nats
