"""What stays: layers, in each of them FFN units and KV groups, the hidden width, and tokens; as JSON to edit.

A plan is decided before anything is cut, names the model it was made for by the hash of its weights, and predicts the
parameters of the result exactly. Indices are ascending and those of the full model; `null` in the JSON keeps all.
Every kept layer keeps equally many units and groups, so that one `intermediate_size` and one number of heads describe
the result and any stock loader takes it; so do all layers with experts, and all experts. In such a layer `ffn_units`
are those of the shared expert. Edit the indices at will: `parameters_after` is counted again, and the
shares of score are those of the choice the plan was made with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, offenders
from dwindle.experts import stored_parameter
from dwindle.prune.shape import Shape
from dwindle.prune.vocabulary_plan import VocabularyPlan
from dwindle.storage import write_json
from dwindle.typed_json import require_types

if TYPE_CHECKING:
    from dwindle.bundle import ModelBundle

__all__ = ["KeepPlan", "LayerKeep", "require_float", "weights_sha256"]

_SCHEMA = 2
_LARGEST_SIZE = 1 << 24

Indices = tuple[int, ...]


@dataclass(frozen=True)
class LayerKeep:
    """What one kept layer keeps."""

    layer: int
    """Its index in the full model."""
    ffn_units: Indices | None = None
    """Indices of the kept units; None: all."""
    kv_groups: Indices | None = None
    """Indices of the kept KV heads, each with its queries; None: all."""
    ffn_score: float = 1.0
    """Sum of the kept units' scores over the sum of all."""
    kv_score: float = 1.0
    """The same of the groups."""
    experts: Indices | None = None
    """Indices of the kept experts; None: all."""
    expert_units: tuple[Indices, ...] | None = None
    """For each kept expert the indices of its kept units; None: all."""
    experts_score: float = 1.0
    """The same share of the experts."""
    expert_units_score: float = 1.0
    """The same of the kept experts' units."""

    def __post_init__(self) -> None:
        for name in ("ffn_units", "kv_groups", "experts"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.expert_units is not None:
            object.__setattr__(self, "expert_units", tuple(map(tuple, self.expert_units)))

    def kept_experts(self, experts: int) -> Indices:
        """Return the indices of the experts that stay of so many."""
        return tuple(range(experts)) if self.experts is None else self.experts


@dataclass(frozen=True)
class KeepPlan:
    """A choice along every axis of one model."""

    method: str
    """Where the choice comes from."""
    model_sha256: str
    """`weights_sha256` of the model it was made for."""
    shape: Shape
    """That model's shape."""
    layers: tuple[LayerKeep, ...]
    """The layers that stay, ascending."""
    width: int
    """Hidden width after."""
    channels: Indices | None = None
    """Indices of the kept channels of the hidden width; None: all, or `rotated`."""
    rotated: bool = False
    """The width is cut along its principal axes, found again from the calibration text when the plan is applied."""
    width_score: float = 1.0
    """Share of the channels' scores (rotated: of the variance) that is kept."""
    layer_scores: tuple[float, ...] = ()
    """The score of every layer of the full model, where layers were chosen."""
    vocabulary: VocabularyPlan | None = None
    """The tokens that stay; None: all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "layer_scores", tuple(self.layer_scores))
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
        wrong = list(self._faults())
        if wrong:
            raise RecipeError(f"prune plan: {offenders(wrong)}. Keep ascending indices, equally many in every layer.")

    def _faults(self) -> Iterator[str]:
        yield from _index_faults("layers", tuple(keep.layer for keep in self.layers), self.shape.layers)
        mixed = [keep for keep in self.layers if self.shape.has_experts(keep.layer)]
        dense = [keep for keep in self.layers if keep not in mixed]
        for name, layers, size in (
            ("ffn_units", dense, self.shape.ffn_width), ("ffn_units", mixed, self.shape.shared_width),
            ("kv_groups", self.layers, self.shape.kv_heads), ("experts", mixed, self.shape.experts),
        ):  # fmt: skip
            counts = set()
            for keep in layers:
                indices: Indices | None = getattr(keep, name)
                counts.add(size if indices is None else len(indices))
                if indices is not None:
                    yield from _index_faults(f"layer {keep.layer} {name}", indices, size)
            if len(counts) > 1:
                yield f"layers keep different numbers of {name} {sorted(counts)}, one number is needed"
        yield from _expert_faults(dense, mixed, self.shape)
        if self.channels is not None:
            yield from _index_faults("channels", self.channels, self.shape.width)
            if self.rotated or len(self.channels) != self.width:
                yield f"width={self.width} and rotated={self.rotated} beside {len(self.channels)} channels"
        elif not (1 <= self.width <= self.shape.width if self.rotated else self.width == self.shape.width):
            yield f"width={self.width} of {self.shape.width} without channels or rotation"
        if self.vocabulary is not None and self.vocabulary.vocabulary != self.shape.vocab:
            yield f"tokens of a vocabulary of {self.vocabulary.vocabulary:,} for one of {self.shape.vocab:,}"

    @property
    def after(self) -> Shape:
        """Return the shape of the result. Turning the width unties a tied head: its norm's weight went into it."""
        before = self.shape
        kinds = {before.has_experts(keep.layer): keep for keep in reversed(self.layers)}
        nothing = LayerKeep(0)
        dense, mixed = kinds.get(False, nothing), kinds.get(True, nothing)
        groups = _left(self.layers[0].kv_groups, before.kv_heads)
        return replace(
            before.keeping([keep.layer for keep in self.layers]), width=self.width, kv_heads=groups,
            heads=groups * before.queries_per_group, tied=before.tied and not self.rotated,
            ffn_width=_left(dense.ffn_units, before.ffn_width),
            shared_width=_left(mixed.ffn_units, before.shared_width),
            experts=_left(mixed.experts, before.experts),
            expert_width=before.expert_width if mixed.expert_units is None else len(mixed.expert_units[0]),
            vocab=before.vocab if self.vocabulary is None else len(self.vocabulary.tokens),
        )  # fmt: skip

    @property
    def parameters_before(self) -> int:
        """Return the parameters of the full model."""
        return self.shape.parameters

    @property
    def parameters_after(self) -> int:
        """Return the parameters the pruned model will have."""
        return self.after.parameters

    @property
    def kept_width(self) -> int:
        """Return the FFN units of a layer after."""
        return self.after.ffn_width

    @property
    def ffn_units(self) -> tuple[Indices, ...]:
        """Return per kept layer the indices of its kept FFN units."""
        sizes = [self.shape.units(keep.layer) for keep in self.layers]
        return tuple(
            tuple(range(size)) if keep.ffn_units is None else keep.ffn_units
            for keep, size in zip(self.layers, sizes, strict=True)
        )

    @property
    def kv_groups(self) -> tuple[Indices, ...]:
        """Return per kept layer the indices of its kept KV groups."""
        return tuple(tuple(range(self.shape.kv_heads)) if k.kv_groups is None else k.kv_groups for k in self.layers)

    @property
    def kept_score(self) -> tuple[float, ...]:
        """Return per kept layer the share of the FFN units' scores that stays."""
        return tuple(keep.ffn_score for keep in self.layers)

    def require(self, bundle: ModelBundle) -> None:
        """Raise RecipeError unless the plan was made for this very model."""
        found = Shape.of(bundle.anatomy)
        differing = [
            f"{name} {value:,} where the model has {getattr(found, name):,}" if isinstance(value, int) else name
            for name, value in asdict(self.shape).items()
            if value != getattr(found, name)
        ]
        if differing:
            raise RecipeError(f"prune plan: made for another model ({offenders(differing)}). Plan from this model.")
        digest = weights_sha256(bundle)
        if digest != self.model_sha256:
            raise RecipeError(
                f"prune plan: made for the model with the weights {self.model_sha256[:12]}, this one has "
                f"{digest[:12]}. Make a plan from this model."
            )
        if self.vocabulary is not None:
            self.vocabulary.require(bundle)

    def to_json(self) -> dict[str, Any]:
        """Return the object `save` writes."""
        counts = {"parameters_before": self.parameters_before, "parameters_after": self.parameters_after}
        tokens = None if self.vocabulary is None else self.vocabulary.to_json()
        return {"schema": _SCHEMA, "kind": "keep_plan", **counts, **asdict(self), "vocabulary": tokens}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Return the plan that `to_json` gave; raise RecipeError for anything else."""
        values = dict(data) if isinstance(data, Mapping) else {}
        marks = (values.pop("kind", None), values.pop("schema", None))
        for counted in ("parameters_before", "parameters_after"):
            values.pop(counted, None)
        if marks != ("keep_plan", _SCHEMA) or not set(values) <= set(cls.__dataclass_fields__):
            keys = offenders(sorted(map(str, data))) if isinstance(data, Mapping) else type(data).__name__
            raise RecipeError(f"this is no keep plan of schema {_SCHEMA} (found: {keys}).")
        try:
            shape, layers = Shape(**values.pop("shape")), tuple(LayerKeep(**keep) for keep in values.pop("layers"))
            tokens = values.pop("vocabulary", None)
            vocabulary = None if tokens is None else VocabularyPlan.from_json(tokens)
            require_types(shape)
            _require_sizes(shape)
            made = cls(shape=shape, layers=layers, vocabulary=vocabulary, **values)
            require_types(made)
            return made
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"this keep plan is incomplete or damaged: {error}.") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, self.to_json())


def _require_sizes(shape: Shape) -> None:
    """Raise ValueError for sizes that no model has: lists are made of as many entries."""
    wrong = [name for name, value in asdict(shape).items()
             if isinstance(value, int) and not 0 <= value <= _LARGEST_SIZE]  # fmt: skip
    if shape.qk_norm not in ("none", "head", "full"):
        wrong.append("qk_norm")
    if wrong or not (shape.layers and shape.width and shape.heads and shape.kv_heads):
        raise ValueError(f"no model has this shape ({offenders(wrong) or 'a size of 0'})")


def _index_faults(name: str, indices: Indices, size: int) -> Iterator[str]:
    if not indices:
        yield f"{name} (keeps nothing)"
    elif not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        yield f"{name} (entries that are no whole numbers)"
    elif list(indices) != sorted(set(indices)):
        yield f"{name} (not ascending, or an index twice)"
    elif indices[0] < 0 or indices[-1] >= size:
        yield f"{name} (index {indices[0] if indices[0] < 0 else indices[-1]} of {size})"


def _expert_faults(dense: Sequence[LayerKeep], mixed: Sequence[LayerKeep], shape: Shape) -> Iterator[str]:
    for keep in dense:
        if keep.experts is not None or keep.expert_units is not None:
            yield f"layer {keep.layer} experts (it has none)"
    widths = set()
    for keep in mixed:
        kept = keep.kept_experts(shape.experts)
        if len(kept) < shape.top_k:
            yield f"layer {keep.layer} experts ({len(kept)} where each token passes {shape.top_k})"
        if keep.expert_units is None:
            widths.add(shape.expert_width)
            continue
        if len(keep.expert_units) != len(kept):
            yield f"layer {keep.layer} expert_units ({len(keep.expert_units)} lists for {len(kept)} experts)"
        for expert, units in zip(kept, keep.expert_units, strict=False):
            widths.add(len(units))
            yield from _index_faults(f"layer {keep.layer} expert {expert}", units, shape.expert_width)
    if len(widths) > 1:
        yield f"experts keep different numbers of units {sorted(widths)}, one number is needed"


def _left(indices: Indices | None, size: int) -> int:
    return size if indices is None else len(indices)


def require_float(bundle: ModelBundle) -> None:
    """Raise RecipeError for a quantized model: its codes cannot be cut without quantizing again."""
    if bundle.quantized:
        raise RecipeError("prune: the model is quantized. Prune first, then quantize: codes cannot be cut and kept.")


def weights_sha256(bundle: ModelBundle) -> str:
    """Return one hash over the weights as stored, tensor by tensor: the same with every version of transformers."""
    import torch

    from dwindle.prune.parameters import parameter_names, read_parameter, row_slices

    digest = hashlib.sha256()
    for name in parameter_names(bundle):
        shape = stored_parameter(bundle.model, bundle.anatomy, name).shape
        digest.update(f"{name}\0{bundle.storage_dtype}\0{list(shape)}\n".encode())
        for start, stop in row_slices(shape):
            rows = read_parameter(bundle, name, start, stop).to(bundle.storage_dtype).cpu().contiguous()
            digest.update(rows.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
