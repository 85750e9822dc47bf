"""The byte target that a device sets: what one app may use of its memory, less all that is not weights. Torch-free.

`dwindle.devices` estimates the peak memory of a model as

    weights x copies + KV cache of the context x copies + logits of the prompt x copies + fixed cost of the runtime

where weights are held as often as their use has it (`devices.memory_cost.resident_weight_bytes`). Embedding and
head have the size that the options give them; solved for the linears at the middle of every range, with the memory an
app may use without asking (`memory.default` of the profile), that is the target. A device also decides the format: a
plan may only use bits that its runtime executes there, which is the common part of what the runtime carries anywhere
(`formats`) and what the profile lists.

An estimate with a range stays one: the explanation names both ends, and `dwindle validate` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwindle.devices.cost_model import DEFAULT_PROMPT_TOKENS, PRODUCTS
from dwindle.devices.memory_cost import MEMORY_COSTS, memory_cost, resident_weight_bytes
from dwindle.devices.workload import LayerLoad, Workload
from dwindle.errors import DoesNotFit, RecipeError
from dwindle.quantize.formats import carried_bits

if TYPE_CHECKING:
    from dwindle.anatomy import Anatomy
    from dwindle.devices.device_profile import DeviceProfile
    from dwindle.quantize.options import QuantizeOptions

__all__ = ["CONTEXT_TOKENS", "DeviceTarget", "device_target", "format_name"]

CONTEXT_TOKENS = 4096
"""Tokens that the KV cache is sized for where nobody states a number; fewer if the model takes fewer."""
_CACHE_BYTES = 2
"""Bytes of a number in the KV cache: fp16."""
_FORMAT_NAMES = {("coreai", "neural-engine"): "coreai-engine"}
"""(runtime, compute unit) -> name in `formats.RUNTIMES`, where it is not the runtime's."""
_WIDEST = {"palettize": "palette", "integer": "int"}


@dataclass(frozen=True)
class DeviceTarget:
    """What `target=NAME` stands for. `explanation` says in lines how it came about."""

    target_bytes: int
    """The whole model may take so many."""
    runtimes: tuple[str, ...]
    """Names in `formats.RUNTIMES`."""
    allowed_bits: tuple[int, ...]
    """Bits per linear that the runtimes execute on this device."""
    explanation: tuple[str, ...]


def device_target(
    profile: DeviceProfile, anatomy: Anatomy, options: QuantizeOptions, context: int | None = None
) -> DeviceTarget:
    """Return the target of a model on a device; the KV cache is sized for `context` tokens.

    The runtimes are those of the options, or the first of the profile that carries the options' scheme. Raises
    RecipeError if the device has none, or none of their bits in common with the options; DoesNotFit if no memory is
    left for weights.
    """
    tokens = min(CONTEXT_TOKENS, anatomy.context) if context is None else context
    if not 1 <= tokens <= anatomy.context:
        raise RecipeError(f"quantize: a context of {tokens:,} tokens (needed: 1 to {anatomy.context:,}, what the model "
                          "takes).")  # fmt: skip
    allowed = _allowed_bits(profile, options)
    chosen = tuple(allowed) if options.runtimes else tuple(allowed)[:1]
    common = tuple(sorted(set.intersection(*(set(allowed[name]) for name in chosen))))
    if not common:
        each = "; ".join(f"{name} takes {', '.join(map(str, allowed[name]))}" for name in chosen)
        raise RecipeError(
            f"quantize: no bits are carried by all runtimes on {profile.title} ({each}). Change runtimes or "
            "allowed_bits, or use a target per runtime."
        )
    tables = _tables(anatomy, options)
    sizes = [_weight_bytes(profile, anatomy, name, tokens, tables) for name in chosen]
    name, (low, middle, high) = min(zip(chosen, sizes, strict=True), key=lambda item: item[1][1])
    if middle < 1:
        raise DoesNotFit(
            f"quantize: {profile.title} leaves no memory for weights: {_megabytes(_memory(profile))} for an app, and "
            f"the KV cache of {tokens:,} tokens with {name}'s own needs take more. Lower the context."
        )
    lines = _explanation(profile, anatomy, name, tokens, tables, middle)
    lines.append(f"between {_megabytes(low)} and {_megabytes(high)} over the range of these estimates; "
                 f"bits {', '.join(map(str, common))}")  # fmt: skip
    formats = tuple(format_name(profile, runtime) for runtime in chosen)
    return DeviceTarget(middle, formats, common, tuple(lines))


def _allowed_bits(profile: DeviceProfile, options: QuantizeOptions) -> dict[str, tuple[int, ...]]:
    """Return runtime of the profile -> bits that scheme, options, runtime and device agree on; never none."""
    from dataclasses import replace

    found, refused = {}, []
    present = {format_name(profile, runtime): runtime for runtime in profile.runtimes}
    wanted = options.runtimes or tuple(present)
    for name in wanted:
        if name not in present:
            refused.append(f"{name} does not run there")
            continue
        try:
            bits = carried_bits(replace(options, runtimes=(name,)))
        except RecipeError:
            bits = ()
        listed = profile.runtimes[present[name]].weight_formats
        kept = tuple(b for b in bits if f"{_WIDEST[options.scheme]}{b}" in listed)
        if kept:
            found[present[name]] = kept
        else:
            refused.append(f"{name} takes {', '.join(listed)}")
    if not found or (options.runtimes and refused):
        asked = f"scheme={options.scheme}"
        if options.allowed_bits:
            asked += f" with allowed_bits={list(options.allowed_bits)}"
        raise RecipeError(
            f"quantize: {profile.title} cannot carry {asked}: {'; '.join(refused)}. It runs {', '.join(present)}. "
            "Change scheme, allowed_bits or runtimes."
        )
    return found


def format_name(profile: DeviceProfile, runtime: str) -> str:
    """Return the name in `formats.RUNTIMES` of a profile's runtime: one engine may take other formats than another."""
    return _FORMAT_NAMES.get((runtime, profile.runtimes[runtime].unit), runtime)


def _memory(profile: DeviceProfile) -> float:
    return profile.memory.default.at()


def _cache_bytes(anatomy: Anatomy, tokens: int) -> int:
    return 2 * anatomy.layers * anatomy.kv_heads * anatomy.head_dim * _CACHE_BYTES * tokens


def _logit_bytes(anatomy: Anatomy, tokens: int) -> int:
    return 4 * min(DEFAULT_PROMPT_TOKENS, tokens) * anatomy.vocab


def _tables(anatomy: Anatomy, options: QuantizeOptions) -> Workload:
    """Return embedding and head as the options store them, without linears."""
    from dwindle.quantize.layer_plan import end_format

    shape = (anatomy.vocab, anatomy.width)
    count = -(-end_format(anatomy.embedding, shape, options).stored_bits(shape) // 8)
    form = f"{_WIDEST[options.embedding_scheme]}{options.embedding_bits}"
    tables = [LayerLoad(anatomy.embedding, shape[0] * shape[1], count, anatomy.tied, form)]
    tables += [] if anatomy.tied else [LayerLoad(anatomy.head, shape[0] * shape[1], count, True, form)]
    return Workload(tuple(tables), 0, anatomy.context, anatomy.vocab, sum(table.bytes for table in tables))


def _more_logits(runtime: str, tables: Workload) -> int:
    """Return the copies of the logits that come on top where the head is several products."""
    return PRODUCTS.get(runtime, {}).get(tables.head_format or "", 1) - 1


def _weight_bytes(
    profile: DeviceProfile, anatomy: Anatomy, runtime: str, tokens: int, tables: Workload
) -> tuple[int, int, int]:
    """Return the bytes left for weights if everything else is dear, in the middle, and cheap."""
    cost, held = memory_cost(runtime), resident_weight_bytes(tables, runtime).running
    more = _more_logits(runtime, tables)
    copies = cost.weight_copies("linear", packed=True)
    low, middle, high = (
        tables.weight_bytes
        + math.floor(
            (
                _memory(profile)
                - held[end]
                - cost.cache_copies[end] * _cache_bytes(anatomy, tokens)
                - (cost.logit_copies[end] + (more if end else 0)) * _logit_bytes(anatomy, tokens)
                - cost.fixed_bytes[end]
            )
            / copies[end]
        )
        for end in (2, 1, 0)
    )
    return low, middle, high


def _explanation(
    profile: DeviceProfile, anatomy: Anatomy, runtime: str, tokens: int, tables: Workload, weights: int
) -> list[str]:
    cost, copies = memory_cost(runtime), memory_cost(runtime).weight_copies("linear", packed=True)[1]
    cache = cost.cache_copies[1] * _cache_bytes(anatomy, tokens)
    logits = (cost.logit_copies[1] + _more_logits(runtime, tables)) * _logit_bytes(anatomy, tokens)
    known = "measured" if runtime in MEMORY_COSTS else "estimated"
    return [
        f"{profile.title}, {runtime} from {profile.runtimes[runtime].minimum_os} on",
        f"{_megabytes(_memory(profile))} that one app may use ({profile.memory.default.trust})",
        f"less {_megabytes(cache)} for the KV cache of {tokens:,} tokens",
        f"less {_megabytes(logits)} for logits and {_megabytes(cost.fixed_bytes[1])} for the runtime",
        f"less {_megabytes(resident_weight_bytes(tables, runtime).running[1])} for the embedding"
        f"{'' if anatomy.tied else ' and the head'}",
        f"divided by {copies:g} copies of the linears ({known}), plus {_megabytes(tables.weight_bytes)} as stored",
        f"leaves {_megabytes(weights)} for the model",
    ]


def _megabytes(count: float) -> str:
    """Return a size as people write it.

    >>> _megabytes(3.5e9), _megabytes(524_288)
    ('3.50 GB', '0.5 MB')
    """
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:.1f} MB"
