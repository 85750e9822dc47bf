"""Which scores a plan is made from: those of the method named, or the best known for each axis where none is.

FFN units go by Fisher information: on three models cut to half it gives the lowest loss of five scores, and it keeps
the lead after 300 steps of distillation (docs/pruning.md). KV groups and channels go by activation, which is better for
them (0.754 against 0.798 nats/token on the embedded teacher) and needs no backward pass. A budget weighs axes against
each other and needs one kind of score for all; a checkpoint larger than memory has no gradients; experts are few and
see other tokens each: these go by activation alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dwindle.prune.budget import Counts
from dwindle.prune.folder_bundle import FolderBundle
from dwindle.prune.scores import AxisScores, activation_axis_scores, magnitude_axis_scores
from dwindle.prune.shape import Shape

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle
    from dwindle.prune.options import PruneOptions
    from dwindle.token_set import TokenSet

__all__ = ["axis_scores", "method_name"]


def _units_by_fisher(bundle: ModelBundle, options: PruneOptions, counts: Counts) -> bool:
    """Return whether FFN units go by Fisher information, though no method was named."""
    cut = counts.ffn < Shape.of(bundle.anatomy).ffn_width
    dense = not bundle.anatomy.has_experts and not isinstance(bundle, FolderBundle)
    return options.method is None and cut and dense and not options.budgeted


def method_name(bundle: ModelBundle, options: PruneOptions, counts: Counts) -> str:
    """Return what a plan says of where its choice comes from."""
    if options.method is not None:
        return options.method
    return "fisher (FFN), activation" if _units_by_fisher(bundle, options, counts) else "activation"


def axis_scores(bundle: ModelBundle, options: PruneOptions, calibration: TokenSet | None, counts: Counts) -> AxisScores:
    """Return the options' scores of units, groups, channels, and of layers where some have to go."""
    from dwindle.prune.depth_scores import activation_and_influence, block_influence, leave_one_out
    from dwindle.prune.gradient_scores import gradient_axis_scores

    scores_layers = counts.layers < bundle.anatomy.layers or options.budgeted
    by_influence = scores_layers and options.depth_method == "block_influence"
    if calibration is None or options.method == "magnitude":
        found = magnitude_axis_scores(bundle)
    elif options.method in ("taylor", "fisher"):
        found = gradient_axis_scores(bundle, calibration, options.method)
    elif by_influence:  # also where masks will choose: they take the number of units from here
        found = activation_and_influence(bundle, calibration)
    else:
        found = activation_axis_scores(bundle, calibration)
    if calibration is None:
        return found
    if _units_by_fisher(bundle, options, counts):
        found = replace(found, ffn=gradient_axis_scores(bundle, calibration, "fisher").ffn)
    if scores_layers and found.layers is None:
        score = block_influence if options.depth_method == "block_influence" else leave_one_out
        found = replace(found, layers=score(bundle, calibration))
    return found
