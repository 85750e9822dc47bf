r"""Cut a KeepPlan out of a model: a new stock model of the smaller shape, filled with what stays.

What the result computes is exactly the full model with the same things masked:

- **FFN units**: gate and up lose rows (and biases), down columns. The reference has the units' activations zero.
- **KV groups**: q, k and v lose whole heads, o their columns. The reference has the heads' outputs zero; where queries
  and keys are normalized over all heads at once (OLMo 2), it has their queries and keys zero as well.
- **Layers**: the reference hands its input on.
- **Hidden width**: the reference has the channels zero in the embedding and in what o and down give (before the norm
  that follows them in Gemma and OLMo 2), so they are zero everywhere. Its norms still divide by D; over D' channels

      x / sqrt(sum x^2 / D + eps) = sqrt(D / D') x / sqrt(sum x^2 / D' + eps D / D')

  so the norms' weights take the factor sqrt(D / D') and the config eps D / D'. Norms of queries and keys share that
  eps without having lost width: q and k are scaled by the root of its growth, which their norm takes out again; over
  N of N' heads' rows the same identity holds. Gemma scales its embedding by sqrt(width): the embedding takes
  sqrt(D / D'), and a tied head's surplus of it is taken out of the final norm.
- **Experts**: router rows go with their experts. The reference has the router's scores of the others -inf before its
  softmax, so that they are never chosen and the weights of the chosen sum up without them, as the family does it.
- **Units of experts**: as FFN units, each expert its own. A shared expert is cut like an FFN; router and the gate of a
  shared expert read the hidden width as gate and up do.
- **Turned width** (`rotation`): the same with channels along the principal axes, that is with what the embedding, o
  and down give projected onto them.

With `readers` (`compensation`) down and o have other weights; the reference then has those.

Memory: the full model plus the pruned one; of a checkpoint that stays on disk (`folder_step`) one layer of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dwindle.anatomy import Part, anatomy_of, module
from dwindle.errors import RecipeError
from dwindle.experts import built_layout
from dwindle.model_source import quiet_transformers
from dwindle.prune.head_rows import group_rows, head_rows
from dwindle.prune.keep_plan import KeepPlan, LayerKeep, require_float
from dwindle.prune.parameters import read_parameter, row_slices
from dwindle.prune.smaller_config import smaller_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dwindle.bundle import ModelBundle

__all__ = ["Cut", "apply"]


def apply(
    bundle: ModelBundle, plan: KeepPlan, *, readers: Mapping[str, Tensor] | None = None, axes: Tensor | None = None
) -> PreTrainedModel:
    """Return a new, smaller model; the bundle's own is left as it is.

    `readers` are refitted weights of down and o, `axes` [D, D] the principal axes a plan with `rotated` needs. Raises
    RecipeError for a quantized model, a plan made for another one, or missing axes. The vocabulary stays whole: it is
    cut together with the tokenizer, by `cut_vocabulary`.
    """
    require_float(bundle)
    plan.require(bundle)
    if plan.rotated and axes is None:
        raise RecipeError("prune: the plan turns the hidden width, which needs calibration data. Give some.")
    made: dict[str, Tensor] = {}
    cut = Cut(bundle, plan, made.__setitem__, axes)
    model = _unfilled(bundle, plan)
    with torch.no_grad():
        cut.ends()
        for new, keep in enumerate(plan.layers):
            cut.layer(new, keep, readers or {})
        if plan.after.tied:
            made[f"{bundle.anatomy.head}.weight"] = made[f"{bundle.anatomy.embedding}.weight"]
        built = built_layout(anatomy_of(model.config), made, model.state_dict().keys())
        model.load_state_dict(built, strict=True, assign=True)
    model.tie_weights()
    return model.to(bundle.model.device).train(bundle.model.training)


class _EmptyIsMeta(TorchFunctionMode):
    """Weights that modules allocate with torch.empty have no memory; buffers, which they compute, are real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _unfilled(bundle: ModelBundle, plan: KeepPlan) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = smaller_config(bundle, plan)
    attention = bundle.model.config._attn_implementation
    with _EmptyIsMeta(), quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    model.generation_config = bundle.model.generation_config
    return model


@dataclass
class Cut:
    """Makes the tensors of the smaller model from those of the full one, and gives each away as it is made."""

    bundle: ModelBundle
    plan: KeepPlan
    give: Callable[[str, Tensor], None]
    """Takes a tensor's name in the smaller model and the tensor, which is nobody else's."""
    axes: Tensor | None = None
    """[D, D] float64: the principal axes that a plan with `rotated` needs."""
    dtype: torch.dtype = torch.float32
    """What the tensors are rounded to."""
    tokens: Tensor | None = None
    """Rows of embedding and head to keep; None: all."""

    def __post_init__(self) -> None:
        self.turn = self.axes[:, : self.plan.width] if self.plan.rotated and self.axes is not None else None
        """[D, D'] float64, orthonormal columns."""
        before, after = self.plan.shape, self.plan.after
        self.growth = math.sqrt(before.width / after.width)
        """sqrt(D / D')."""
        self.head_growth = math.sqrt(before.heads / after.heads)
        self.channels = None if self.plan.channels is None else torch.tensor(self.plan.channels)

    def layer(self, new: int, keep: LayerKeep, readers: Mapping[str, Tensor]) -> None:
        """Make the smaller model's layer `new` of what `keep` says; `readers` are refitted weights of down and o."""
        anatomy = self.bundle.anatomy
        here = anatomy.layer_path(new)
        for part, name in anatomy.parts(keep.layer).items():
            place = here + name.removeprefix(anatomy.layer_path(keep.layer))
            self._linear(keep, part, name, place, readers.get(name))
        for name in anatomy.layer_norms(keep.layer):
            self._norm(keep, name, here + name.removeprefix(anatomy.layer_path(keep.layer)))
        if self.plan.shape.has_experts(keep.layer):
            self._mixture(new, keep, readers)

    def ends(self) -> None:
        """Make the embedding, the final norm, and the head where it is not the embedding."""
        anatomy = self.bundle.anatomy
        scaled = anatomy.traits.embedding_scale != 1
        self._table(anatomy.embedding, anatomy.embedding, None, self.growth if scaled else 1)
        if not self.plan.after.tied:
            stored = anatomy.embedding if anatomy.tied else anatomy.head
            self._table(stored, anatomy.head, anatomy.final_norm, 1)
        final = 1.0 if scaled and anatomy.tied else self.growth
        self._put(f"{anatomy.final_norm}.weight", self._norm_weight(anatomy.final_norm, final))

    def _table(self, name: str, new: str, norm: str | None, factor: float) -> None:
        """Make an embedding or head [V, D'], some rows at a time."""
        vocab = self.plan.shape.vocab
        made = torch.empty(vocab, self.plan.width, dtype=self.dtype)
        for start, stop in row_slices((vocab, self.plan.shape.width)):
            rows = read_parameter(self.bundle, f"{name}.weight", start, stop)
            made[start:stop] = (self._narrow(rows, norm) * factor).float()
        self.give(f"{new}.weight", made if self.tokens is None else made[self.tokens])

    def _weight(self, name: str, kind: str = "weight") -> Tensor:
        return read_parameter(self.bundle, f"{name}.{kind}")

    def _put(self, name: str, tensor: Tensor) -> None:
        made = tensor.to(torch.float32).to(self.dtype)
        self.give(name, (made.clone() if made is tensor else made).contiguous())

    def _narrow(self, weight: Tensor, norm: str | None) -> Tensor:
        """Return a weight [O, D] for D' channels; turning takes the weights of the norm before it along."""
        if self.turn is None:
            return weight if self.channels is None else weight[:, self.channels.to(weight.device)]
        scale = 1 if norm is None else self._weight(norm).double()
        return (weight.double() * scale) @ self.turn.to(weight.device)

    def _written(self, weight: Tensor) -> Tensor:
        """Return a weight [D, I], or a bias [D], for D' channels."""
        if self.turn is None:
            return weight if self.channels is None else weight[self.channels.to(weight.device)]
        return self.turn.T.to(weight.device) @ weight.double()

    def _norm_weight(self, name: str, factor: float) -> Tensor:
        """Return the weights of a norm over the width with its effect, offset + weight, times a factor."""
        weight, offset = self._weight(name), self.bundle.anatomy.traits.norm_offset
        if self.turn is not None:
            return torch.full((self.plan.width,), factor, device=weight.device)
        kept = weight if self.channels is None else weight[self.channels.to(weight.device)]
        return kept if factor == 1 else (kept.double() + offset) * factor - offset

    def _norm(self, keep: LayerKeep, name: str, new: str) -> None:
        if not name.endswith(("q_norm", "k_norm")):
            self._put(f"{new}.weight", self._norm_weight(name, self.growth))
            return
        weight = self._weight(name)
        if self.bundle.anatomy.traits.qk_norm == "full" and keep.kv_groups is not None:
            rows = (head_rows if name.endswith("q_norm") else group_rows)(self.plan.shape, keep.kv_groups)
            weight = weight[rows.to(weight.device)].double() * self.head_growth
        self._put(f"{new}.weight", weight)

    def _linear(self, keep: LayerKeep, part: Part, name: str, new: str, refitted: Tensor | None) -> None:
        linear = module(self.bundle.model, name)
        writes, kept = part in ("o", "down"), self._kept(keep, part)
        biased = getattr(linear, "bias", None) is not None
        weight, bias = self._weight(name), self._weight(name, "bias") if biased else None
        if kept is not None:
            kept = kept.to(weight.device)
        if writes:
            narrowed = refitted if refitted is not None else weight if kept is None else weight[:, kept]
            weight, bias = self._written(narrowed), None if bias is None else self._written(bias)
        else:
            scale = self._normalized_scale(part)
            norm = self.bundle.anatomy.layer_norms(keep.layer)[0 if part in ("q", "k", "v", "qkv") else 1]
            weight = self._narrow(weight if kept is None else weight[kept], norm) * scale
            bias = None if bias is None else (bias if kept is None else bias[kept]) * scale
        self._put(f"{new}.weight", weight)
        if bias is not None:
            self._put(f"{new}.bias", bias)

    def _mixture(self, new: int, keep: LayerKeep, readers: Mapping[str, Tensor]) -> None:
        """Make router and experts, under their names in files."""
        anatomy, kept = self.bundle.anatomy, keep.kept_experts(self.plan.shape.experts)
        norm = anatomy.layer_norms(keep.layer)[1]
        router = self._weight(anatomy.router(keep.layer))
        rows = torch.tensor(kept, device=router.device)
        self._put(f"{anatomy.router(new)}.weight", self._narrow(router[rows], norm))
        if self.plan.shape.shared_width:
            gate = self._weight(anatomy.shared_gate(keep.layer))
            self._put(f"{anatomy.shared_gate(new)}.weight", self._narrow(gate, norm))
        for place, expert in enumerate(kept):
            units = None if keep.expert_units is None else torch.tensor(keep.expert_units[place], device=router.device)
            names, places = anatomy.expert_parts(keep.layer, expert), anatomy.expert_parts(new, place)
            for part in ("gate", "up"):
                weight = self._weight(names[part])
                self._put(f"{places[part]}.weight", self._narrow(weight if units is None else weight[units], norm))
            down = readers.get(names["down"])
            if down is None:
                weight = self._weight(names["down"])
                down = weight if units is None else weight[:, units]
            self._put(f"{places['down']}.weight", self._written(down))

    def _normalized_scale(self, part: Part) -> float:
        """Return the factor on q and k that makes their norm's eps count as much as in the full model."""
        kind = self.bundle.anatomy.traits.qk_norm
        if kind == "none" or part not in ("q", "k"):
            return 1.0
        return self.growth / (self.head_growth if kind == "full" else 1.0)

    def _kept(self, keep: LayerKeep, part: Part) -> Tensor | None:
        """Return the kept rows of a linear (columns of o and down), or None for all."""
        shape = self.plan.shape
        if part in ("gate", "up", "down", "gate_up"):
            if keep.ffn_units is None:
                return None
            units = torch.tensor(keep.ffn_units)
            return torch.cat([units, units + shape.ffn_width]) if part == "gate_up" else units
        if keep.kv_groups is None:
            return None
        queries, keys = head_rows(shape, keep.kv_groups), group_rows(shape, keep.kv_groups)
        if part == "qkv":
            first = shape.heads * shape.head_dim
            return torch.cat([queries, first + keys, first + shape.kv_heads * shape.head_dim + keys])
        return queries if part in ("q", "o") else keys
