"""The prune step on a checkpoint folder, for models that do not fit into memory as floats.

The plan is the one that `planning` makes, the tensors those of `step.run` followed by `save`, from the same functions:
a `FolderBundle` gives them weights by name and passes of the calibration text that hold one layer at a time. One pass
scores units, groups, channels and layers; one more finds the principal axes, where the width is turned; and one
collects what the refit needs, each layer being refitted, cut and written when the text has gone through it. Without a
refit a layer is read, cut and written.

What is the same to the last bit: everything but the principal axes, whose sums are added up in another order.

Peak memory: one layer in float32 and the activations of some thousand tokens in it; for the refit of its down the
second moments, 8 F^2 bytes and half as much again, F the FFN width; the embedding as stored; and up to 0.5 GB of
hidden states, which go to a temporary file beyond that. Measured on a Llama of 1.1 billion random weights (width 2048,
FFN 5632, 22 layers, fp16 shards) with 4,096 tokens: half the FFN refitted 2.4 GB resident, Python and PyTorch
included; half the heads and a quarter of the layers without a refit 1.8 GB.

Gradients (taylor, fisher), masks that are trained (soft_top_k), a pass per layer (leave_one_out) and experts need the
whole model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dwindle.anatomy import anatomy_of
from dwindle.bundle import ModelBundle, not_storable, require_model_place
from dwindle.clock import StepClock
from dwindle.errors import RecipeError
from dwindle.model_source import skeleton_of
from dwindle.prune.folder_bundle import FolderBundle
from dwindle.prune.keep_plan import KeepPlan, LayerKeep
from dwindle.prune.planning import plan
from dwindle.prune.smaller_config import smaller_config
from dwindle.prune.step import cut_details, prepared, recorded_options
from dwindle.prune.surgery import Cut
from dwindle.prune.vocabulary_surgery import with_plan_tokens
from dwindle.report import StepRecord
from dwindle.shard_writer import SHARD_BYTES, ShardWriter
from dwindle.storage import atomic_folder, hash_json, require_space
from dwindle.time_left import TimeLeft

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.prune.options import PruneOptions
    from dwindle.prune.vocabulary_counts import Corpora
    from dwindle.token_set import TokenSet

__all__ = ["needs_whole_model", "plan_folder", "run_folder"]

_WHOLE_MODEL = ("taylor", "fisher", "soft_top_k")
_SPARE_BYTES = 32_000_000
"""Room asked for beyond the weights: tokenizer, configs, and the file system's own."""

_log = logging.getLogger("dwindle")


def needs_whole_model(options: PruneOptions, anatomy: Anatomy) -> list[str]:
    """Return what of the options and the model cannot be worked on layer by layer."""
    wrong = [f"method={options.method}"] if options.method in _WHOLE_MODEL else []
    chooses = options.layers_keep < 1 or options.budgeted
    if chooses and options.depth_method != "block_influence":
        wrong.append(f"depth_method={options.depth_method}")
    return wrong + _with_experts(anatomy)


def _with_experts(anatomy: Anatomy) -> list[str]:
    return [f"a model with experts ({anatomy.model_type})"] if anatomy.has_experts else []


def plan_folder(
    folder: str | Path | FolderBundle, options: PruneOptions, calibration: TokenSet | None = None, *,
    corpora: Corpora | None = None, device: torch.device | str = "cpu",
) -> KeepPlan:  # fmt: skip
    """Return what to keep of a checkpoint folder, whose weights are read one layer at a time.

    Raises RecipeError for what needs the whole model, and what `plan` raises.
    """
    bundle = folder if isinstance(folder, FolderBundle) else FolderBundle.open(folder, device)
    _require_layerwise(needs_whole_model(options, bundle.anatomy))
    return plan(bundle, options, calibration, corpora=corpora)


def run_folder(
    folder: str | Path | FolderBundle, output: str | Path, options: PruneOptions, calibration: TokenSet | None = None,
    *, keep_plan: KeepPlan | None = None, corpora: Corpora | None = None, device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
) -> StepRecord:  # fmt: skip
    """Write the smaller checkpoint to `output` and return the record (sizes only).

    Raises RecipeError, before any work, for what needs the whole model, OutputError for a place that cannot take the
    result, GateFailed for weights that do not fit into the stored type, and what `plan` and `step.run` raise.
    """
    output = Path(output)
    require_model_place(output)
    with StepClock() as clock:
        bundle = folder if isinstance(folder, FolderBundle) else FolderBundle.open(folder, device)
        if keep_plan is None:
            chosen = plan_folder(bundle, options, calibration, corpora=corpora)
        else:
            _require_layerwise(_with_experts(bundle.anatomy))
            chosen = keep_plan
        chosen.require(bundle)
        require_space(output, chosen.after.parameters * bundle.storage_dtype.itemsize + _SPARE_BYTES)
        axes, refits, skipped = prepared(bundle, options, chosen, calibration)
        inputs = {"plan": hash_json(chosen.to_json())}
        if calibration is not None:
            inputs["calibration"] = calibration.sha256
        described = _described(bundle, options, chosen, inputs)
        work = _Work(bundle, chosen, axes, calibration if refits else None, options.damping)
        with atomic_folder(output) as partial:
            work.write(partial, shard_bytes)
            described.write_description(partial)
        _log.info("saved %s", output)
        sizes = bundle.size(), described.size()
    return StepRecord("prune", *sizes, seconds=clock.seconds, peak_rss_bytes=clock.peak_rss_bytes, skipped=skipped,
                      details=cut_details(chosen, work.refitted))  # fmt: skip


def _require_layerwise(wrong: list[str]) -> None:
    if wrong:
        raise RecipeError(
            f"prune: {' and '.join(wrong)} needs the whole model in memory, and this one is worked on layer by layer. "
            "Choose activation or magnitude and block_influence; or load it with ModelBundle and call prune.run."
        )


def _described(bundle: FolderBundle, options: PruneOptions, chosen: KeepPlan, inputs: dict[str, str]) -> ModelBundle:
    """Return a bundle of the result without weights: what its folder holds beside them."""
    skeleton: Any = skeleton_of(smaller_config(bundle, chosen))
    skeleton.generation_config = bundle.model.generation_config
    lineage = bundle.lineage.adding("prune", recorded_options(options), inputs)
    made = ModelBundle(skeleton, bundle.tokenizer, anatomy_of(skeleton.config), lineage, bundle.storage_dtype,
                       bundle.vocabulary_map)  # fmt: skip
    return made if chosen.vocabulary is None else with_plan_tokens(made, chosen.vocabulary)


class _Work:
    """Cuts and writes, a layer at a time."""

    def __init__(
        self, bundle: FolderBundle, plan: KeepPlan, axes: Tensor | None, calibration: TokenSet | None, damping: float
    ) -> None:
        """Without `calibration` nothing is refitted."""
        self._bundle, self._plan = bundle, plan
        self._refits = iter(()) if calibration is None else self._refitted(calibration, damping)
        tokens = None if plan.vocabulary is None else torch.tensor(plan.vocabulary.kept)
        self._cut = Cut(bundle, plan, self._take, axes, bundle.storage_dtype, tokens)
        self._broken: list[str] = []
        self.refitted = 0

    def _refitted(self, calibration: TokenSet, damping: float) -> Iterator[tuple[str, Tensor]]:
        from dwindle.prune.compensation import refits

        yield from refits(self._bundle, self._plan, calibration, damping)

    @torch.no_grad()
    def write(self, folder: Path, shard_bytes: int) -> None:
        """Write all tensors; raise GateFailed if some are not finite in the stored type."""
        layers = self._plan.layers
        left = TimeLeft(len(layers))
        with ShardWriter(folder, len(self._bundle.source.names) + 1, shard_bytes) as self._writer:
            self._cut.ends()
            for new, keep in enumerate(layers):
                self._cut.layer(new, keep, self._readers(keep))
                if not self.refitted:  # else the pass of the text tells how far it is
                    _log.info("prune: cutting, layer %d/%d, %s", new + 1, len(layers), left.after(new + 1))
        if self._broken:
            raise not_storable(self._broken, self._bundle.storage_dtype)

    def _readers(self, keep: LayerKeep) -> dict[str, Tensor]:
        """Return the refitted weights of a layer; the text goes through it now."""
        loses = (keep.ffn_units is not None) + (keep.kv_groups is not None)
        found = dict(islice(self._refits, loses))
        self.refitted += len(found)
        return found

    def _take(self, name: str, tensor: Tensor) -> None:
        if not torch.isfinite(tensor).all():
            self._broken.append(name)
        self._writer.add(name, tensor)
