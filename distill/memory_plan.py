"""What a distillation will take, before it is started: bytes per process by purpose, tokens per second, the cache.

The arithmetic of the engine as it is (`train`, `sharding`), P student and Q teacher parameters, n processes:

    weights      4 P / n               float32, sharded by FSDP2
    gradients    4 P / n
    moments      8 P / n               AdamW's two
    gathered     4 (root + 2 layers), and the gradient of one layer         while n > 1; the next layer comes early
    bf16 copies  2 P, with activation checkpointing 2 (root + 2 layers)     under autocast, which keeps what it casts
    activations  piece x (numbers a layer saves) x layers, with checkpointing piece x width x layers and one layer
    loss         a chunk of logits, the gradients of the hidden states and of the head: never piece x vocabulary
    teacher      4 Q / n, and gathered as above; no gradients; offloaded, 4 (root + layer) and none gathered

A layer saves, per token, with D width, F FFN width, A = H d query numbers, K d key numbers: 4 (normalized input and its
copy, twice) + 2 (inputs of q, k, v and of gate, up) times D, 2 A + 2 K d + H in attention, 4 F in the MLP, and 2 D more
for each further norm. Under bf16 the linears' inputs are cast one by one (5 D) and halve with F, A and K d. A test
counts what a real layer saves.

Time: 6 P (8 P with checkpointing) + 2 Q operations per token, attention left out, at the share of a GPU's peak that
trainers of this size reach. It is an estimate from published peaks; nothing was measured on these GPUs, and the time
that an offloaded teacher spends on reading is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dwindle.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from dwindle.anatomy import Anatomy
    from dwindle.distill.options import DistillOptions

__all__ = ["GPUS", "Gpu", "MemoryPlan", "ModelSize", "layer_numbers", "memory_plan"]

CACHE_BYTES_PER_TOKEN = 60
"""Most that a cached teacher takes per token; see `logit_cache`."""
UTILIZATION = (0.25, 0.35, 0.45)
"""Share of a GPU's peak that training is assumed to reach: low, middle, high. Well-tuned sharded training of models of
this size is reported at 0.4 and above; two models in turn and float32 masters cost some of that."""
USABLE = 0.92
"""Share of a GPU's memory that tensors may fill; the rest is the context, kernels and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """A training GPU, by its data sheet."""

    memory_bytes: float
    bf16_flops: float
    """Dense peak of its tensor cores."""
    fp32_flops: float
    """Peak without them."""


GPUS: Mapping[str, Gpu] = {
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12),
    "h100-80gb": Gpu(80e9, 989e12, 67e12),
    "h200-141gb": Gpu(141e9, 989e12, 67e12),
    "l40s-48gb": Gpu(48e9, 362e12, 91.6e12),
    "rtx-4090-24gb": Gpu(24e9, 165e12, 82.6e12),
}
"""NVIDIA's data sheets."""


@dataclass(frozen=True)
class ModelSize:
    """What the arithmetic needs of a model."""

    parameters: int
    active_parameters: int
    """Parameters a token meets: fewer in a mixture of experts."""
    layer: int
    """Parameters of the largest decoder layer."""
    root: int
    """Parameters outside the layers: embedding, head, final norm."""

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> ModelSize:
        """Return the sizes of a model, which may be on the meta device."""
        from dwindle.sharding import repeated_layers

        layers = [sum(p.numel() for p in layer.parameters()) for layer in repeated_layers(model)]
        total = sum(p.numel() for p in model.parameters())
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        share = (getattr(config, "num_experts_per_tok", None) or count) / count
        return cls(total, total - round(experts * (1 - share)), max(layers), total - sum(layers))


@dataclass(frozen=True)
class MemoryPlan:
    """The answer: bytes per process by purpose, and what the run takes."""

    processes: int
    gpu: str
    piece_tokens: int
    """Tokens of one forward and backward pass of one process."""
    bytes_per_process: Mapping[str, int]
    tokens_per_second: tuple[float, float, float]
    """Of all processes together: low, middle, high. An estimate."""
    tokens: int | None
    cache_bytes: int | None
    advice: tuple[str, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """Return the bytes of one process."""
        return sum(self.bytes_per_process.values())

    @property
    def fits(self) -> bool:
        """Return whether a process fits its GPU."""
        return self.total_bytes <= USABLE * GPUS[self.gpu].memory_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        hours = None if self.tokens is None else [self.tokens / rate / 3600 for rate in self.tokens_per_second]
        return {
            "processes": self.processes, "gpu": self.gpu, "piece_tokens": self.piece_tokens,
            "bytes_per_process": dict(self.bytes_per_process), "total_bytes": self.total_bytes,
            "memory_bytes": GPUS[self.gpu].memory_bytes, "fits": self.fits,
            "tokens_per_second": {"value": self.tokens_per_second[1], "range": [*self.tokens_per_second[::2]],
                                  "basis": "estimated"},
            "tokens": self.tokens, "hours": None if hours is None else {"value": hours[1], "range": hours[::-2]},
            "cache_bytes": self.cache_bytes, "advice": list(self.advice),
        }  # fmt: skip

    def table(self) -> str:
        """Return the answer for a person."""
        low, middle, high = self.tokens_per_second
        lines = [f"{self.processes} processes on {self.gpu}, {self.piece_tokens:,} tokens a piece", ""]
        lines += [f"  {name:28} {size / 1e9:9.2f} GB" for name, size in self.bytes_per_process.items()]
        verdict = "fits" if self.fits else "does not fit"
        lines += [f"  {'together':28} {self.total_bytes / 1e9:9.2f} GB   {verdict} "
                  f"{USABLE:.0%} of {GPUS[self.gpu].memory_bytes / 1e9:.0f} GB", ""]  # fmt: skip
        lines += [f"estimated: {middle:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"]
        if self.tokens is not None:
            lines[-1] += f", {self.tokens / middle / 3600:,.1f} hours for {self.tokens:,} tokens"
        if self.cache_bytes is not None:
            lines += [f"a cache of the teacher would take up to {self.cache_bytes / 1e9:,.2f} GB on disk"]
        return "\n".join([*lines, *self.advice])


def layer_numbers(anatomy: Anatomy, layer: int = 0) -> tuple[int, int]:
    """Return how many numbers a layer saves per token for its backward pass: (always float32, in the linears' type).

    The second part is halved by bf16, where it holds one more copy of the width for each linear that reads it.
    """
    queries, keys = anatomy.heads * anatomy.head_dim, anatomy.kv_heads * anatomy.head_dim
    norms = len(_NORMS_OF_WIDTH & {name.rpartition(".")[2] for name in anatomy.layer_norms(layer)})
    wide = norms * (2 * anatomy.width + 1) + anatomy.heads
    if anatomy.traits.qk_norm != "none":
        wide += 2 * (queries + keys)
    experts = anatomy.experts_of(layer)
    routed = 0 if experts is None else experts.top_k * experts.width
    return wide, 2 * queries + 2 * keys + 4 * (anatomy.ffn_width[layer] + routed)


_NORMS_OF_WIDTH = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                   "post_feedforward_layernorm"}  # fmt: skip


def memory_plan(
    student: ModelSize,
    anatomy: Anatomy,
    teacher: ModelSize,
    options: DistillOptions,
    *,
    context: int,
    processes: int = 8,
    gpu: str = "h100-80gb",
    loss_bytes: int = 1 << 30,
    offloaded: bool = False,
) -> MemoryPlan:
    """Return what `options` take on `processes` GPUs, for windows of `context` tokens.

    `anatomy` is the student's, `loss_bytes` the bound of the loss's chunks; `offloaded` says that the
    teacher is read layer by layer. Raises RecipeError for an unknown GPU or a
    batch that cannot be cut.
    """
    pieces = options.gradient_accumulation * processes
    wrong = [] if gpu in GPUS else [f"gpu={gpu!r} is unknown{did_you_mean(gpu, GPUS)}"]
    if processes < 1:
        wrong.append(f"{processes} processes (needed: at least 1)")
    elif options.batch_size % pieces:
        wrong.append(f"batch_size={options.batch_size} cannot be cut into {pieces} pieces "
                     f"({options.gradient_accumulation} for each of {processes} processes)")  # fmt: skip
    if wrong:
        raise RecipeError(f"distill: plan: {'; '.join(wrong)}.")
    piece = options.batch_size // pieces * context
    sizes = _bytes(student, anatomy, teacher, options, piece, processes, loss_bytes)
    if offloaded:
        sizes |= {"teacher weights": 4 * (teacher.root + teacher.layer)}
        sizes.pop("teacher's gathered layers", None)
    operations = (8 if options.activation_checkpointing else 6) * student.active_parameters
    operations += 2 * teacher.active_parameters
    peak = GPUS[gpu].bf16_flops if options.precision == "bf16" else GPUS[gpu].fp32_flops
    low, middle, high = (processes * peak * share / operations for share in UTILIZATION)
    tokens = options.tokens if options.steps is None else options.steps * options.batch_size * context
    made = MemoryPlan(processes, gpu, piece, sizes, (low, middle, high), tokens,
                      None if tokens is None else tokens * CACHE_BYTES_PER_TOKEN)  # fmt: skip
    return made if made.fits else _advised(made, options, piece // context)


def _bytes(
    student: ModelSize, anatomy: Anatomy, teacher: ModelSize, options: DistillOptions, piece: int, n: int, loss: int
) -> dict[str, int]:
    """Return the bytes of one process by purpose."""
    again, half = options.activation_checkpointing, options.precision == "bf16"
    window = student.root + 2 * student.layer
    wide, narrow = layer_numbers(anatomy)
    readers = (5 if half else 2) * anatomy.width
    saved = 4 * wide + (2 if half else 4) * (narrow + readers)
    layers = (4 * anatomy.width * anatomy.layers + saved) if again else saved * anatomy.layers
    found = {
        "student weights": 4 * student.parameters // n,
        "gradients": 4 * student.parameters // n,
        "AdamW moments": 8 * student.parameters // n,
        "gathered layers": 4 * (window + student.layer) if n > 1 else 0,
        "bf16 copies": (2 * (window if again else student.parameters)) if half else 0,
        "activations": piece * layers,
        "loss": loss + 4 * piece * anatomy.width + 4 * anatomy.vocab * anatomy.width,
        "teacher weights": 4 * teacher.parameters // n,
        "teacher's gathered layers": 4 * (teacher.root + 2 * teacher.layer) if n > 1 else 0,
        "teacher's activations": piece * saved,
    }
    return {name: size for name, size in found.items() if size}


def _advised(made: MemoryPlan, options: DistillOptions, windows: int) -> MemoryPlan:
    """Return the plan with what would make it smaller, the cheapest first."""
    advice = []
    if not options.activation_checkpointing:
        advice.append("activation_checkpointing: keep the inputs of layers only")
    if windows > 1:
        advice.append(f"gradient_accumulation={2 * options.gradient_accumulation}: smaller pieces, the same gradient")
    if options.precision == "fp32":
        advice.append("precision=bf16: half the activations")
    advice.append("more processes: weights, gradients and moments are shared out")
    advice.append("--offload-teacher: of the teacher one layer at a time, read from the disk")
    advice.append("a cached teacher: no teacher in memory")
    told = tuple(f"to make it smaller: {line}" for line in advice)
    return MemoryPlan(made.processes, made.gpu, made.piece_tokens, made.bytes_per_process, made.tokens_per_second,
                      made.tokens, made.cache_bytes, told)  # fmt: skip
