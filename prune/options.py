"""How to prune: which axes, by what score, and what is done to make up for it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from dwindle.errors import RecipeError
from dwindle.prune.mask_options import MaskOptions
from dwindle.prune.vocabulary_options import VocabularyOptions

__all__ = ["DepthMethod", "Method", "PruneOptions"]

Method = Literal["activation", "magnitude", "taylor", "fisher", "soft_top_k"]
DepthMethod = Literal["block_influence", "leave_one_out"]


@dataclass(frozen=True)
class PruneOptions:
    """What to keep, and how to choose it. A share of 1 leaves its axis alone."""

    ffn_keep: float = 1.0
    """Share of the FFN units to keep in every layer; with experts those of the shared one."""
    heads_keep: float = 1.0
    """Share of the KV groups (a KV head with its queries) to keep in every layer."""
    width_keep: float = 1.0
    """Share of the hidden width to keep."""
    layers_keep: float = 1.0
    """Share of the layers to keep."""
    experts_keep: float = 1.0
    """Share of the experts to keep in every layer that has any; never fewer than a token passes."""
    expert_width_keep: float = 1.0
    """Share of the units to keep in every expert."""
    vocabulary_keep: float = 1.0
    """Largest share of the vocabulary to keep, by how often the given text holds each token. See `vocabulary`."""
    vocabulary_size: int | None = None
    """The same as a number of tokens. Not together with `vocabulary_keep`."""
    vocabulary_min_count: int | None = None
    """Tokens that the text holds less often go, even where the share leaves room; alone, it cuts those and no more.
    None: as `VocabularyOptions` says, where the vocabulary is cut."""
    parameters: int | None = None
    """Keep the most valuable FFN units, KV groups, layers and experts that fit into so many parameters, beyond the
    shares."""
    bytes: int | None = None
    """The same in bytes of weights as stored."""
    method: Method | None = None
    """Score of units, groups and channels; all but `magnitude` need calibration data. See `scores`. `soft_top_k` trains
    masks of units and groups on the training data. See `masks`. None: `activation`, and `fisher` for FFN units where
    a share of them is named and the model is in memory. See `method`."""
    masks: MaskOptions = field(default_factory=MaskOptions)
    """How the masks of `soft_top_k` are trained."""
    depth_method: DepthMethod = "block_influence"
    """Score of layers; both need calibration data. See `depth_scores`."""
    rotate: bool | None = None
    """Turn the hidden width onto its principal axes before cutting it, instead of choosing among its channels; None:
    where the family allows it and there is calibration data. See `rotation`."""
    compensate: bool = True
    """Refit the layer that reads what was cut, where there is calibration data. See `compensation`."""
    damping: float = 1e-3
    """Share of the mean second moment added to the diagonal when refitting: how far not to trust a small sample."""
    multiple: int = 32
    """FFN and hidden width are rounded to a multiple of this, the vocabulary up to one: quantization groups and matrix
    units want it."""

    def __post_init__(self) -> None:
        wrong = []
        for name in ("ffn_keep", "heads_keep", "width_keep", "layers_keep", "experts_keep", "expert_width_keep",
                     "vocabulary_keep"):  # fmt: skip
            share = getattr(self, name)
            if not 0 < share <= 1:
                wrong.append(f"{name}={share!r} (needed: above 0, at most 1)")
        for name, least in (("parameters", 1), ("bytes", 1), ("vocabulary_size", 1), ("vocabulary_min_count", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                wrong.append(f"{name}={value!r} (needed: a whole number of at least {least})")
        for name, kind in (("method", Method), ("depth_method", DepthMethod)):
            if getattr(self, name) not in get_args(kind) and not (name == "method" and self.method is None):
                wrong.append(f"{name}={getattr(self, name)!r} (needed: {' or '.join(get_args(kind))})")
        if self.method != "soft_top_k" and replace(self.masks, seed=0) != MaskOptions():
            wrong.append(f"masks beside method={self.method!r} (needed: method='soft_top_k', which trains them)")
        if not 0 < self.damping < 1:
            wrong.append(f"damping={self.damping!r} (needed: above 0, below 1)")
        if not self.multiple >= 1:
            wrong.append(f"multiple={self.multiple!r} (needed: a whole number of at least 1)")
        if self.vocabulary_keep != 1 and self.vocabulary_size is not None:
            wrong.append(f"vocabulary_keep={self.vocabulary_keep} and vocabulary_size={self.vocabulary_size} (needed: "
                         "one of them)")  # fmt: skip
        if wrong:
            raise RecipeError(f"prune: {'; '.join(wrong)}.")

    @property
    def budgeted(self) -> bool:
        """Return whether the counts follow from a number of parameters or bytes."""
        return self.parameters is not None or self.bytes is not None

    @property
    def vocabulary(self) -> VocabularyOptions | None:
        """Return how the vocabulary is cut, None where it is left alone.

        >>> PruneOptions(vocabulary_keep=0.5).vocabulary
        VocabularyOptions(keep=0.5, size=None, min_count=1, multiple=32)
        """
        if self.vocabulary_keep == 1 and self.vocabulary_size is None and self.vocabulary_min_count is None:
            return None
        keep = None if self.vocabulary_keep == 1 else self.vocabulary_keep
        rarest = {} if self.vocabulary_min_count is None else {"min_count": self.vocabulary_min_count}
        return VocabularyOptions(keep=keep, size=self.vocabulary_size, multiple=self.multiple, **rarest)

    def rounded(self, share: float, size: int) -> int:
        """Return how many of `size` stay: the nearest multiple, at least one multiple, at most all.

        >>> PruneOptions().rounded(0.5, 172), PruneOptions().rounded(1.0, 172)
        (96, 172)
        """
        if share == 1:
            return size
        return min(size, max(1, round(share * size / self.multiple)) * self.multiple)

    @staticmethod
    def counted(share: float, size: int) -> int:
        """Return how many of `size` stay: the nearest whole number, at least one.

        >>> PruneOptions.counted(0.5, 6), PruneOptions.counted(0.01, 6)
        (3, 1)
        """
        return max(1, round(share * size))
